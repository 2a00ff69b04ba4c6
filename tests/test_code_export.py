"""One self-contained file for each class: complete, closed, always the same, or refused."""

import ast
import importlib
import sys
from pathlib import Path

import pytest

import transdiff_pipelines
from transdiff_pipelines import code_export
from transdiff_pipelines.code_export import ExportError, self_contained_source
from transdiff_pipelines.loaders import hub


CLASSES = [
    getattr(transdiff_pipelines, name)
    for name in transdiff_pipelines.__all__
    if getattr(getattr(transdiff_pipelines, name), "__module__", "").startswith("transdiff_pipelines.")
    and isinstance(getattr(transdiff_pipelines, name), type)
]
# What diffusers itself brings along.
EXPECTED_LIBRARIES = {"torch", "diffusers", "numpy", "PIL", "tqdm"}


def exported(cls: type) -> str:
    if "Pipeline" in cls.__name__:
        return self_contained_source(cls, "A note.", hub._STAND_INS, hub._LEFT_OUT)
    return self_contained_source(cls, "A note.")


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_a_file_defines_its_class_and_imports_nothing_unusual(cls: type) -> None:
    source = exported(cls)
    tree = ast.parse(source)
    top_level = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    modules = {getattr(node, "module", None) or node.names[0].name for node in top_level}
    libraries = {module.split(".")[0] for module in modules} - set(sys.stdlib_module_names)
    assert libraries <= EXPECTED_LIBRARIES
    assert not any(isinstance(node, ast.ImportFrom) and node.level for node in ast.walk(tree))

    namespace = {"__name__": "exported"}
    sys.modules["exported"] = type(sys)("exported")  # dataclasses look their module up
    try:
        exec(compile(source, "exported.py", "exec"), namespace)
    finally:
        del sys.modules["exported"]
    # copyreg leaves __slotnames__ in a class once one of its objects was copied
    assert set(vars(namespace[cls.__name__])) == set(vars(cls)) - {"__slotnames__"}


def test_conversion_stays_in_the_package() -> None:
    source = exported(transdiff_pipelines.TransDiffPipeline)
    assert "convert_original" not in source
    assert "self_contained_source" not in source
    assert "class TransDiffLoraLoaderMixin" in source


def test_the_same_class_gives_the_same_file() -> None:
    cls = transdiff_pipelines.TransDiffPipeline
    assert exported(cls) == exported(cls)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Write modules of a package `sample`; returns the exported file of its class `sample.main.Main`."""
    monkeypatch.setattr(code_export, "PACKAGE", "sample")
    monkeypatch.syspath_prepend(tmp_path)

    def export(main: str, left_out=(), stand_ins=None, **modules: str) -> str:
        for name, source in {"__init__": "", "main": main, **modules}.items():
            path = tmp_path / "sample" / f"{name}.py"
            path.parent.mkdir(exist_ok=True)
            path.write_text(source)
        importlib.invalidate_caches()
        return self_contained_source(importlib.import_module("sample.main").Main, "A note.", stand_ins, left_out)

    yield export
    for name in [name for name in sys.modules if name.split(".")[0] == "sample"]:
        del sys.modules[name]


def test_only_what_is_reached_is_taken_with_its_comment_and_its_effects(package) -> None:
    source = package(
        "from .tools import helper, other\n\n\nclass Main:\n    def run(self):\n        return helper()\n",
        tools=(
            "import math\nimport os\n\nREGISTRY = []\n# Half a turn.\nHALF = math.pi\n\n\n"
            "def helper():\n    return HALF\n\n\ndef other():\n    return os.sep\n\n\n"
            "REGISTRY.append(helper)\nprint(other)\n"
        ),
    )
    assert "# Half a turn.\nHALF = math.pi" in source
    assert "REGISTRY.append(helper)" in source
    assert source.index("HALF =") < source.index("def helper") < source.index("REGISTRY.append") < source.index("Main")
    assert "other" not in source
    assert "import os" not in source


def test_imports_inside_functions_are_followed(package) -> None:
    source = package(
        "class Main:\n    def run(self):\n        from .tools import helper\n\n        return helper()\n",
        tools="from .more import value as value\n\n\ndef helper():\n    return value\n",
        more="value = 7\n",
    )
    namespace: dict = {}
    exec(source, namespace)
    assert namespace["Main"]().run() == 7


def test_bases_are_left_out_and_annotations_get_stand_ins(package) -> None:
    source = package(
        "from .tools import Mixin, Model\n\n\nclass Main(\n    Mixin,\n    dict,\n):\n    model: Model\n",
        tools="class Mixin:\n    pass\n\n\nclass Model:\n    pass\n",
        left_out=("Mixin",),
        stand_ins={"Model": "ModelMixin"},
    )
    namespace: dict = {}
    exec(source, namespace)
    assert namespace["Main"].__bases__ == (dict,)
    assert namespace["Model"].__name__ == "ModelMixin"


@pytest.mark.parametrize(
    ("main", "tools", "message"),
    [
        ("from .tools import a as b\n\n\nclass Main:\n    x = b\n", "a = 1\n", "imports a as b"),
        ("from __future__ import annotations\n\n\nclass Main:\n    pass\n", "", "__future__"),
        ("from . import tools\n\n\nclass Main:\n    x = tools.a\n", "a = 1\n", "import names, not modules"),
        (
            "from .tools import user\n\nsize = 1\n\n\nclass Main:\n    x = size, user\n",
            "size = 2\nuser = size\n",
            "size means two things",
        ),
        ("class Base:\n    pass\n\n\nclass Main:\n    pass\n\n\nMain.__module__ = '__main__'\n", "", "no module"),
        ("from .tools import Mixin\n\n\nclass Main(Mixin):\n    x = Mixin\n", "class Mixin:\n    pass\n", "left out"),
    ],
)
def test_what_one_file_cannot_hold_is_refused(package, main: str, tools: str, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        package(main, tools=tools, left_out=("Mixin",))
