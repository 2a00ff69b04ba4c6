"""One self-contained source file for a class of this package, made from the package's own sources.

The Hub's custom code is a single file for the pipeline and a single file for each component. What a class needs is
found definition by definition: the file holds the class, the functions, classes and constants of the package that
it reaches, in an order in which Python can run them, and the imports from elsewhere that these use.
"""

import ast
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from importlib.util import find_spec, resolve_name
from pathlib import Path


PACKAGE = __name__.split(".")[0]

_NAMED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


class ExportError(ValueError):
    """A source that cannot be put into one file as it stands."""


def self_contained_source(
    cls: type, note: str, stand_ins: Mapping[str, str] | None = None, left_out: Collection[str] = ()
) -> str:
    """Source of a module that defines `cls` and imports nothing from this package.

    Args:
        cls: a class defined at the top level of one of the package's modules.
        note: a paragraph for the file's docstring.
        stand_ins: class of the package to the diffusers class that takes its place, e.g. in annotations.
        left_out: base classes to do without; they may be used as bases only.

    Raises:
        ExportError: two modules mean different things by one name, or a module does something that a single file
            cannot hold (an internal import under another name, `from __future__`, a name left out used elsewhere).
    """
    bundle = _Bundle(stand_ins or {}, left_out)
    bundle.add(cls.__module__, cls.__name__)
    docstring = bundle.module(cls.__module__).docstring
    return f'"""{docstring}\n\n{note.strip()}\n"""\n\n{bundle.imports_text()}\n\n\n{bundle.definitions_text()}'


class _Module:
    """The top level of a module of the package: what it defines, what it imports, what it does on import."""

    def __init__(self, name: str):
        spec = find_spec(name) if name != "__main__" else None
        if spec is None or spec.origin is None:
            raise ExportError(f"there is no module {name} with a source; define the class in a module of its own")
        self.name, self.parent = name, spec.parent
        text = Path(spec.origin).read_text(encoding="utf-8")
        tree = ast.parse(text)
        self.lines = text.splitlines()
        self.docstring = (ast.get_docstring(tree) or name).strip()
        self.definitions: dict[str, ast.stmt] = {}
        self.internal: dict[str, tuple[str, str]] = {}  # name here: the module it comes from, its name there
        self.external: dict[str, str] = {}  # name here: the statement that imports it
        self.effects: list[ast.stmt] = []
        for statement in tree.body:
            self._sort_in(statement)

    def _sort_in(self, statement: ast.stmt) -> None:
        if isinstance(statement, (ast.Import, ast.ImportFrom)):
            self._sort_in_import(statement)
        elif isinstance(statement, ast.If) and ast.unparse(statement.test).endswith("TYPE_CHECKING"):
            for inner in statement.body:
                self._sort_in(inner)
        elif isinstance(statement, _NAMED):
            self.definitions[statement.name] = statement
        elif names := _assigned_names(statement):
            self.definitions |= dict.fromkeys(names - {"__all__"}, statement)
        elif not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)):  # a docstring
            self.effects.append(statement)

    def _sort_in_import(self, statement: ast.Import | ast.ImportFrom) -> None:
        source = self.imported_module(statement)
        for alias in statement.names:
            name = alias.asname or alias.name.split(".")[0]
            if source is not None and source.split(".")[0] == PACKAGE:
                if alias.asname not in (None, alias.name):
                    raise ExportError(f"{self.name} imports {alias.name} as {alias.asname}; import it by its own name")
                self.internal[name] = (source, alias.name)
            elif source == "__future__":
                raise ExportError(f"{self.name} has a __future__ import, which would hold for other modules' code too")
            else:
                origin = "" if source is None else f"from {source} "
                self.external[name] = f"{origin}import {alias.name}" + (f" as {alias.asname}" if alias.asname else "")

    def imported_module(self, statement: ast.Import | ast.ImportFrom) -> str | None:
        """The absolute name of the module a `from` import reads; None for a plain import."""
        if isinstance(statement, ast.Import):
            return None
        return resolve_name("." * statement.level + (statement.module or ""), self.parent)

    def local_imports(self, statement: ast.stmt) -> list[ast.ImportFrom]:
        """Imports from the package inside a function of `statement`."""
        return [
            node
            for node in ast.walk(statement)
            if isinstance(node, ast.ImportFrom) and (self.imported_module(node) or "").split(".")[0] == PACKAGE
        ]

    def _first_line(self, statement: ast.stmt) -> int:
        """Where a statement begins, with its decorators and the comment above."""
        first = min([statement.lineno, *(node.lineno for node in getattr(statement, "decorator_list", []))])
        while first > 1 and self.lines[first - 2].lstrip().startswith("#"):
            first -= 1
        return first

    def text(self, statement: ast.stmt, left_out: Collection[str]) -> str:
        """The statement as it is written, with the comment above it, without imports and bases that are not there."""
        first = self._first_line(statement)
        lines: dict[int, str] = dict(enumerate(self.lines[first - 1 : statement.end_lineno], start=first))
        for node in self.local_imports(statement):
            for number in range(node.lineno, (node.end_lineno or node.lineno) + 1):
                del lines[number]
        if isinstance(statement, ast.ClassDef) and any(_name(base) in left_out for base in statement.bases):
            kept = [ast.unparse(base) for base in statement.bases if _name(base) not in left_out]
            kept += [ast.unparse(keyword) for keyword in statement.keywords]
            # The class statement may take several lines; it ends where the body begins.
            for number in range(statement.lineno, self._first_line(statement.body[0])):
                del lines[number]
            lines[statement.lineno] = f"class {statement.name}({', '.join(kept)}):"
        return "\n".join(lines[number] for number in sorted(lines))


class _Bundle:
    """Definitions of several modules, and the imports they need."""

    def __init__(self, stand_ins: Mapping[str, str], left_out: Collection[str]):
        self.stand_ins, self.left_out = stand_ins, left_out
        self.modules: dict[str, _Module] = {}
        self.origin: dict[str, str] = {}  # name in the file: what it means there, to find clashes
        self.chosen: dict[str, list[ast.stmt]] = {}  # by module
        self.imports: set[str] = set()

    def module(self, name: str) -> _Module:
        if name not in self.modules:
            self.modules[name] = _Module(name)
        return self.modules[name]

    def find(self, module: str, name: str) -> str:
        """The module that defines what `module` calls `name`, through however many imports."""
        while name not in self.module(module).definitions:
            if name not in self.module(module).internal:
                raise ExportError(f"{module} defines no {name}; import names, not modules")
            module, name = self.module(module).internal[name]
        return module

    def add(self, module: str, name: str) -> None:
        """Take in a definition, and everything it uses."""
        module = self.find(module, name)
        self._claim(name, module)
        self._choose(module, self.module(module).definitions[name])

    def _choose(self, module: str, statement: ast.stmt) -> None:
        statements = self.chosen.setdefault(module, [])
        if statement in statements:
            return
        statements.append(statement)
        self._add_uses(self.module(module), statement)
        for effect in self.module(module).effects:
            if any(self.origin.get(name) == module for name in _loaded_names(effect)):
                self._choose(module, effect)

    def _add_uses(self, module: _Module, statement: ast.stmt) -> None:
        internal = dict(module.internal)
        for node in module.local_imports(statement):
            internal |= {alias.name: (module.imported_module(node) or "", alias.name) for alias in node.names}
        for name in sorted(_loaded_names(statement, self.left_out)):
            if name in self.left_out and (name in internal or name in module.definitions):
                raise ExportError(f"{module.name} uses {name} other than as a base class, but it is to be left out")
            if name in self.stand_ins and (name in internal or name in module.definitions):
                self._claim(name, "a stand-in")
                self._import(self.stand_ins[name], f"from diffusers import {self.stand_ins[name]}")
            elif name in module.definitions:
                self.add(module.name, name)
            elif name in internal:
                self.add(*internal[name])
            elif name in module.external:
                self._import(name, module.external[name])

    def _import(self, name: str, statement: str) -> None:
        self._claim(name, statement)
        self.imports.add(statement)

    def _claim(self, name: str, meaning: str) -> None:
        other = self.origin.setdefault(name, meaning)
        if other != meaning:
            raise ExportError(f"{name} means two things: {other!r} and {meaning!r}; rename one of them")

    def imports_text(self) -> str:
        """The imports from elsewhere, one line a module: the standard library first, then the rest."""
        lines: dict[str, list[str]] = {}
        for statement in self.imports:
            head, _, name = statement.partition(" import ") if statement.startswith("from") else (statement, "", "")
            lines.setdefault(head, []).append(name)
        groups: list[list[str]] = [[], []]
        for head in sorted(lines):
            library = re.split(r"[ .]", head)[1]
            names = f" import {', '.join(sorted(lines[head]))}" if lines[head] != [""] else ""
            groups[library not in sys.stdlib_module_names].append(head + names)
        ordered = (sorted(group, key=lambda line: line.startswith("from")) for group in groups if group)
        return "\n\n".join("\n".join(group) for group in ordered)

    def definitions_text(self) -> str:
        """What was chosen: modules after those they import, each in its own order."""
        stood_in = sorted(name for name in self.stand_ins if name in self.origin)
        text = "".join(f"{name} = {self.stand_ins[name]}\n" for name in stood_in)
        if text:
            text = f"# model_index.json tells which classes these are; each comes from a file of its own.\n{text}"
        for name in self._ordered_modules():
            module, previous = self.module(name), None
            for statement in sorted(self.chosen[name], key=lambda statement: statement.lineno):
                if text:
                    both_short = previous is not None and not isinstance(statement, _NAMED)
                    text += "\n" if both_short and not isinstance(previous, _NAMED) else "\n\n"
                text += module.text(statement, self.left_out) + "\n"
                previous = statement
        return text

    def _ordered_modules(self) -> Iterator[str]:
        done: set[str] = set()

        def visit(name: str) -> Iterator[str]:
            if name in done or name not in self.chosen:
                return
            done.add(name)
            for module, imported in self.module(name).internal.values():
                if imported not in self.stand_ins and imported not in self.left_out:
                    yield from visit(self.find(module, imported))
            yield name

        for name in self.chosen:
            yield from visit(name)


def _name(node: ast.expr) -> str | None:
    return node.id if isinstance(node, ast.Name) else None


def _assigned_names(statement: ast.stmt) -> set[str]:
    """The names that an assignment at the top level binds; empty for any other statement."""
    if isinstance(statement, ast.Assign):
        targets = statement.targets
    elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
        targets = [statement.target]
    else:
        return set()
    names = {_name(target) for target in targets}
    return set() if None in names else {name for name in names if name is not None}


def _loaded_names(statement: ast.stmt, left_out: Collection[str] = ()) -> set[str]:
    """The names a statement reads, but for base classes that are left out."""
    nodes: list[ast.AST] = [statement]
    if isinstance(statement, ast.ClassDef):
        kept = [base for base in statement.bases if _name(base) not in left_out]
        nodes = [*kept, *statement.keywords, *statement.decorator_list, *statement.body]
    return {
        inner.id
        for node in nodes
        for inner in ast.walk(node)
        if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Load)
    }
