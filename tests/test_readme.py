"""The Python of README and of the pages is run as it stands, in order, on the bundled model; links lead on."""

import ast
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from tiny import tiny_encoder, tiny_pipeline, tiny_transformer

import transdiff_pipelines
from benchmarks import model_sizes
from docs.run_page import python_blocks, run_page
from transdiff_pipelines import DIGITS, EMOJI, TransDiffPipeline
from transdiff_pipelines.data import imagenet_id2label
from transdiff_pipelines.pipelines.class_labels import ClassNames


ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def links(page):
    return [link for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")) if "://" not in link]


@pytest.fixture(scope="module")
def shallow(tmp_path_factory):
    """The bundled models by name, with one layer of each network left, and ten steps where none are named."""
    models = {"DIGITS": DIGITS, "EMOJI": EMOJI}
    return {name: shallow_copy(model, tmp_path_factory.mktemp("shallow")) for name, model in models.items()}


def shallow_copy(model, folder):
    pipe = TransDiffPipeline.from_pretrained(model)
    networks = {name: getattr(pipe, name) for name in ("condition_encoder", "transformer")}
    pipe.register_modules(
        **{name: type(model).from_config(model.config, num_layers=1) for name, model in networks.items()}
    )
    pipe.register_to_config(num_inference_steps=10)
    pipe.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("page", ["README.md", "docs/diffusers.md", "docs/tour.md"])
def test_python_blocks_run(page, tmp_path, shallow, monkeypatch):
    is_long = page == "docs/tour.md"  # it draws hundreds of images, and nobody looks at them here
    if is_long:
        for name, folder in shallow.items():
            monkeypatch.setattr(transdiff_pipelines, name, folder)
    if "torchao" in "".join(python_blocks(ROOT / page)) and find_spec("torchao") is None:
        pytest.skip("torchao is missing: make test-quantization")
    run_page(ROOT / page, tmp_path, num_inference_steps=4 if is_long else None)
    assert any(tmp_path.iterdir())
    drawn = {Path(link).name for link in links(ROOT / page) if link.startswith("images/tour/")}
    assert drawn <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.slow
def test_the_tour_fits_models_of_other_sizes(tmp_path, monkeypatch):
    """As the page says, only the folder changes: a model of 8 pixels and one layer runs the blocks that have sizes."""
    pipe = tiny_pipeline(condition_encoder=tiny_encoder(num_layers=1), transformer=tiny_transformer(num_layers=1))
    pipe.resize_class_embeddings([str(digit) for digit in range(10)])
    monkeypatch.setattr(TransDiffPipeline, "from_pretrained", lambda _: pipe)
    blocks = [block for block in python_blocks(ROOT / "docs/tour.md") if re.search(r"\b(side|last|resize)\b", block)]
    assert len(blocks) == 3
    page = tmp_path / "page.md"
    page.write_text("".join(f"```python\n{block}```\n" for block in blocks), encoding="utf-8")
    run_page(page, tmp_path)
    assert pipe.image_side == 8
    assert {path.name for path in tmp_path.glob("*.png")} == {"denoising.png", "editing.png"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_linked_files_exist(page):
    assert [link for link in links(page) if not (page.parent / link).exists()] == []


def test_the_table_of_the_published_models_is_what_its_command_prints():
    assert model_sizes.table() in (ROOT / "README.md").read_text(encoding="utf-8")


def test_labels_of_published_models_are_names_of_imagenet():
    """Blocks marked `py` need weights that are not here, so that of these only names and syntax are looked at."""
    blocks = re.findall(r"```py\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert blocks
    names = ClassNames(imagenet_id2label())
    for block in blocks:
        calls = [
            node for node in ast.walk(ast.parse(block)) if getattr(getattr(node, "func", None), "id", "") == "pipe"
        ]
        labels = [node.value for call in calls for node in ast.walk(call.args[0]) if isinstance(node, ast.Constant)]
        assert labels
        assert all(isinstance(label, int) or names.id_of(label) >= 0 for label in labels)


def test_pages_name_configurations_and_modules_that_exist():
    for page in [*PAGES, *(ROOT / name for name in ("training/README.md", "benchmarks/README.md", "CONTRIBUTING.md"))]:
        text = page.read_text(encoding="utf-8")
        for module in re.findall(r"-m ((?:training|benchmarks)(?:\.\w+)+)", text):
            place = ROOT / module.replace(".", "/")
            assert place.with_suffix(".py").is_file() or (place / "__main__.py").is_file(), f"{page.name}: {module}"
        for config in re.findall(r"training/configs/\w+\.yaml", text):
            assert (ROOT / config).is_file(), f"{page.name}: {config}"
