"""Imports go downwards: the order of folders, and no circles, also not inside functions or for type checkers alone."""

import ast
import sys
from collections.abc import Iterable, Iterator
from graphlib import CycleError, TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]

# From top to bottom: a line imports from itself and from lines below. What "|" parts within a line does not import
# each other. A module has the place of the longest name here that it begins with.
ORDER = """
benchmarks
benchmarks.common
training
training.data training.model training.distributed training.outputs
training.settings
transdiff_cli
transdiff_pipelines.demo
transdiff_pipelines.generation | transdiff_pipelines.write_cards
transdiff_pipelines.sources
transdiff_pipelines
transdiff_pipelines.registration | transdiff_pipelines.pipelines
transdiff_pipelines.loaders
transdiff_pipelines.code_export | transdiff_pipelines.model_card
transdiff_pipelines.schedulers | transdiff_pipelines.models
transdiff_pipelines.latents | transdiff_pipelines.files | transdiff_pipelines.hub_access | transdiff_pipelines.data
transdiff_pipelines.presets transdiff_pipelines.diffusers_internals transdiff_pipelines.attribution
transdiff_pipelines.devices
"""

# Imports that close a circle and wait for whoever works on these modules. The list shrinks, and never grows.
WAITING: set[tuple[str, str]] = set()

Graph = dict[str, set[str]]


def modules(root: Path) -> dict[str, Path]:
    """Every module of src/, training/ and benchmarks/ by its name; a folder's name is its `__init__`."""
    folders = [*(root / "src").iterdir(), root / "training", root / "benchmarks"]
    found = {}
    for path in (path for folder in folders for path in folder.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        parts = parts[1:] if parts[0] == "src" else parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(module: str, path: Path, known: Iterable[str]) -> Iterator[str]:
    """The modules of this repository that a module imports, wherever the import stands."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            source = resolve_name("." * node.level + (node.module or ""), package)
            names = [f"{source}.{alias.name}" for alias in node.names]
            yield from (name if name in known else source for name in names if name in known or source in known)


def import_graph(root: Path = ROOT) -> Graph:
    known = modules(root)
    return {module: set(imported(module, path, known)) - {module} for module, path in sorted(known.items())}


def circle(graph: Graph) -> list[str]:
    """The modules of a circle of imports, the first once more at the end; empty where there is none."""
    try:
        TopologicalSorter({module: sorted(others) for module, others in graph.items()}).prepare()
    except CycleError as error:
        return list(reversed(error.args[1]))
    return []


def cut(graph: Graph, edges: set[tuple[str, str]]) -> Graph:
    return {module: {other for other in others if (module, other) not in edges} for module, others in graph.items()}


def faults(graph: Graph, order: str) -> list[str]:
    """Imports against the order, and modules without a place in it."""
    places = {
        name: (level, room)
        for level, line in enumerate(order.strip().splitlines())
        for room, names in enumerate(line.split("|"))
        for name in names.split()
    }

    def place(module: str) -> tuple[int, int] | None:
        names = [name for name in places if f"{module}.".startswith(f"{name}.")]
        return places[max(names, key=len)] if names else None

    found = [f"{module} has no place" for module in graph if place(module) is None]
    for module, other in ((module, other) for module, others in graph.items() for other in sorted(others)):
        here, there = place(module), place(other)
        if here and there and (there[0] < here[0] or (there[0] == here[0] and there[1] != here[1])):
            found.append(f"{module} imports {other}")
    return found


def test_imports_follow_the_order_of_folders():
    assert faults(cut(import_graph(), WAITING), ORDER) == []


def test_there_are_no_circles():
    assert circle(cut(import_graph(), WAITING)) == []


def test_nothing_waits_that_is_mended():
    graph = import_graph()
    for edge in WAITING:
        assert circle(cut(graph, WAITING - {edge})), f"{' -> '.join(edge)} closes no circle any more: take it out"


# What the import of `DiffusionPipeline` brings anyway, which is seven seconds of a processor to our tenth of one.
QUICK = {"torch", "diffusers", "accelerate", "numpy", "PIL", "huggingface_hub", "safetensors", "tqdm"}


def at_import(path: Path) -> Iterator[str]:
    """The packages that a module imports when it is imported: not those of its functions, or for type checkers."""
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield str(node.module).split(".")[0]
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            is_for_types = isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
            waiting += [] if is_for_types else ast.iter_child_nodes(node)


def test_what_drawing_does_not_need_is_not_imported():
    found = {
        (module, package)
        for module, path in modules(ROOT).items()
        if module.startswith("transdiff_pipelines") and not module.startswith("transdiff_pipelines.demo.")
        for package in set(at_import(path)) - QUICK - sys.stdlib_module_names - {"transdiff_pipelines"}
    }
    assert found == set()


SOURCES = {
    "src/package/__init__.py": "from .low import a",
    "src/package/low.py": "a = 1",
    "src/package/high/__init__.py": "",
    "src/package/high/one.py": "import package.low",
    "src/package/high/two.py": "from package import low",
    "src/other/__init__.py": "",
    "training/__init__.py": "",
    "benchmarks/__init__.py": "",
}
SMALL_ORDER = "benchmarks\ntraining\npackage.high | other\npackage\npackage.low"


def graph_of(tmp_path: Path, **changes: str) -> Graph:
    for name, text in (SOURCES | changes).items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return import_graph(tmp_path)


class TestTheRules:
    def test_a_tree_in_order(self, tmp_path):
        graph = graph_of(tmp_path)
        assert graph["package.high.one"] == graph["package.high.two"] == graph["package"] == {"package.low"}
        assert faults(graph, SMALL_ORDER) == circle(graph) == []

    @pytest.mark.parametrize(
        "text",
        [
            "import package.high.one",
            "from package.high.one import b",
            "from .high import one",
            "def f():\n    from .high import one",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from package.high.one import B",
        ],
    )
    def test_an_import_upwards_and_the_circle_it_closes(self, tmp_path, text):
        graph = graph_of(tmp_path, **{"src/package/low.py": text})
        assert faults(graph, SMALL_ORDER) == ["package.low imports package.high.one"]
        assert sorted(set(circle(graph))) == ["package.high.one", "package.low"]
        assert circle(cut(graph, {("package.low", "package.high.one")})) == []

    def test_a_circle_within_a_folder(self, tmp_path):
        graph = graph_of(
            tmp_path,
            **{"src/package/high/one.py": "from . import two", "src/package/high/two.py": "from .one import b"},
        )
        assert faults(graph, SMALL_ORDER) == []
        assert sorted(set(circle(graph))) == ["package.high.one", "package.high.two"]

    def test_a_neighbour_and_a_module_without_a_place(self, tmp_path):
        graph = graph_of(tmp_path, **{"src/other/__init__.py": "from package.high import one", "src/third/a.py": ""})
        assert faults(graph, SMALL_ORDER) == ["third.a has no place", "other imports package.high.one"]
