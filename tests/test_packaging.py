"""What setup.py declares: ranges that hold the tested versions, and a README whose links work on a package index."""

import re

import pytest
from declared import ROOT, constraints, requirements, run_setup
from packaging.requirements import Requirement

from transdiff_pipelines.diffusers_internals import TESTED_DIFFUSERS


ARGUMENTS, NAMES = run_setup()
REPOSITORY, VERSION, absolute_links = NAMES["REPOSITORY"], NAMES["VERSION"], NAMES["absolute_links"]
RANGES = [Requirement(line) for line in requirements(tuple(ARGUMENTS["extras_require"]))]
PINS = dict(
    line.split("==") for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if "==" in line
)
# What the machines of labs have, of which a GPU was used to check this package.
ELSEWHERE = {
    "torch": "2.11.0",
    "transformers": "5.17.0",
    "accelerate": "1.15.0",
    "huggingface_hub": "1.33.0",
}


@pytest.mark.parametrize("wanted", RANGES, ids=str)
def test_the_tested_version_is_in_the_range(wanted: Requirement) -> None:
    pins = {name.lower(): version for name, version in PINS.items()}
    if wanted.name.lower() in pins:
        assert wanted.specifier.contains(pins[wanted.name.lower()])


@pytest.mark.parametrize(("name", "version"), ELSEWHERE.items())
def test_what_others_have_is_in_the_range(name: str, version: str) -> None:
    [wanted] = [wanted for wanted in RANGES if wanted.name == name]
    assert wanted.specifier.contains(version)


def test_the_lowest_versions_are_the_lower_ends() -> None:
    lowest = dict(line.split("==") for line in constraints("lowest"))
    assert set(lowest) == {Requirement(line).name for line in requirements(("train",))}
    assert lowest["torch"] == PINS["torch"]
    for wanted in (wanted for wanted in RANGES if wanted.name in lowest):
        assert wanted.specifier.contains(lowest[wanted.name])
    assert TESTED_DIFFUSERS.split(" to ")[0] == ".".join(lowest["diffusers"].split(".")[:2])
    assert constraints("newest") == [f"torch=={PINS['torch']}"]


AT = f"{REPOSITORY}/blob/v{VERSION}/"
RAW = f"{REPOSITORY}/raw/v{VERSION}/"


@pytest.mark.parametrize(
    ("relative", "absolute"),
    [
        ("[tour](docs/tour.md)", f"[tour]({AT}docs/tour.md)"),
        ("[here](./docs/tour.md#colours)", f"[here]({AT}docs/tour.md#colours)"),
        ('![a](docs/a.png "A title")', f'![a]({RAW}docs/a.png "A title")'),
        ("[![a](docs/a.png)](docs/a.md)", f"[![a]({RAW}docs/a.png)]({AT}docs/a.md)"),
        ("[`code`](src/a.py) and [b](b)", f"[`code`]({AT}src/a.py) and [b]({AT}b)"),
        ('<img src="docs/a.SVG" width=3>', f'<img src="{RAW}docs/a.SVG" width=3>'),
        ("[a][1]\n\n[1]: docs/a.md\n", f"[a][1]\n\n[1]: {AT}docs/a.md\n"),
    ],
)
def test_relative_links_become_absolute(relative: str, absolute: str) -> None:
    assert absolute_links(relative) == absolute
    assert absolute_links(absolute) == absolute


@pytest.mark.parametrize(
    "text",
    [
        "[a](https://arxiv.org/abs/1) ![b](http://x/y.png) [c](mailto:a@b) [d](#below) [e](//host/f)",
        "`[a](b)` and\n```python\nx[0](y)  # [a](b)\n```\n",
    ],
)
def test_everything_else_stays(text: str) -> None:
    assert absolute_links(text) == text


def test_readme_on_a_package_index_leads_to_the_files() -> None:
    here = (ROOT / "README.md").read_text(encoding="utf-8")
    there = ARGUMENTS["long_description"]
    links = re.findall(r"\]\(([^)#\s]+)", there)
    assert len(links) == len(re.findall(r"\]\(([^)#\s]+)", here)) > 10
    assert [link for link in links if "://" not in link] == []
    for kind in (AT, RAW):
        own = [link.removeprefix(kind) for link in links if link.startswith(kind)]
        assert own
        assert [path for path in own if not (ROOT / path).exists()] == []
    # Nothing but links has changed.
    assert there.replace(AT, "").replace(RAW, "") == here


@pytest.mark.parametrize("page", [".ci/run", ".github/workflows/tests.yml", "README.md", "CONTRIBUTING.md"])
def test_only_targets_that_exist_are_run(page: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    text = (ROOT / page).read_text(encoding="utf-8")
    named = set(re.findall(r"\bmake ((?:test-|de)[a-z]+|test|check|format)\b(?!-)", text))
    for matrix in re.findall(r"target: \[(.+)\]", text):
        named |= {target.split()[0] for target in matrix.split(", ")}
    assert named
    assert named <= targets
