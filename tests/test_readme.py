"""The Python of README and of the pages is run as it stands, in order, on the bundled model; links lead on."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from docs.run_page import python_blocks, run_page


ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def links(page):
    return [link for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")) if "://" not in link]


@pytest.mark.parametrize("page", ["README.md", "docs/diffusers.md", "docs/tour.md"])
def test_python_blocks_run(page, tmp_path):
    if "torchao" in "".join(python_blocks(ROOT / page)) and find_spec("torchao") is None:
        pytest.skip("torchao is missing: make test-quantization")
    run_page(ROOT / page, tmp_path)
    assert any(tmp_path.iterdir())
    drawn = {Path(link).name for link in links(ROOT / page) if link.startswith("images/tour/")}
    assert drawn <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_linked_files_exist(page):
    assert [link for link in links(page) if not (page.parent / link).exists()] == []
