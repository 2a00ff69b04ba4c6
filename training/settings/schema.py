"""Dataclasses as typed configurations: from YAML and `--key=value` overrides, checked, and explained by `--help`.

A configuration is a tree of dataclasses whose fields are made by `option`. Nothing here knows what is configured.

The type of a field decides how its value is read, in the file and on the command line alike (see `values`): YAML's own
guesses (`010` is 8, `1:30` is 90, `no` is false) are switched off.
"""

from __future__ import annotations

import dataclasses
import difflib
import textwrap
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Any, Literal, get_type_hints

import yaml

from .values import ConfigError as ConfigError
from .values import TextLoader, convert, is_null, read_value, type_name
from .values import require as require


def option(default: Any, help: str, free_on_resume: bool | Literal["place"] = False) -> Any:
    """A dataclass field with a one-line explanation; lists get a fresh copy per instance.

    `free_on_resume` marks a setting that may change when what was configured goes on (see `settings_that_differ`): as
    a whole, or as a place, which may be written otherwise but neither set nor unset.
    """
    metadata = {"help": help, "free_on_resume": free_on_resume}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """`["--config", "f", "--a.b=1", "--c", "2"]` -> `(["f"], {"a.b": "1", "c": "2"})`."""
    files: list[str] = []
    overrides: dict[str, str] = {}
    remaining = list(arguments)
    while remaining:
        argument = remaining.pop(0)
        require(argument.startswith("--"), f"cannot read {argument!r}: write --config FILE or --key=value")
        key, equals, value = argument[2:].partition("=")
        if not equals:
            has_value = bool(remaining) and not remaining[0].startswith("--")
            require(has_value, f"--{key} has no value: write --{key}=VALUE")
            value = remaining.pop(0)
        if key == "config":
            files.append(value)
            continue
        twice = f"--{key} is given twice, as {overrides.get(key)!r} and as {value!r}: give it once"
        require(key not in overrides, twice)
        overrides[key] = value
    return files, overrides


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys and values of a file; unquoted values stay text, for `build` to read as their fields want them.

    Raises:
        ConfigError: if it is missing, cannot be read, or has a key twice.
    """
    require(path.is_file(), f"no config file {path}; ready-made ones are in training/configs")
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), TextLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as text in UTF-8: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    require(is_null(tree) or isinstance(tree, dict), f"{path} must hold keys and values")
    return {} if is_null(tree) else tree


def set_key(tree: dict[str, Any], key: str, text: str) -> None:
    """Set the dotted `key` of a tree to the `text` of an override; the check of names and types follows in `build`."""
    *sections, last = key.split(".")
    for section in sections:
        if is_null(tree.get(section)):
            tree[section] = {}
        tree = tree[section]
        require(isinstance(tree, dict), f"{key!r}: {section!r} is a value, not a section")
    require(
        not isinstance(tree.get(last), dict), f"{key!r} is a section: write --{key}.KEY=VALUE for each of its keys"
    )
    tree[last] = read_value(key, text)


def build(schema: Any, tree: Any, path: str = "") -> Any:
    """Make `schema` from nested dictionaries, checking every name and type."""
    where = f"section {path!r}" if path else "a config"
    require(isinstance(tree, dict), f"{where} must hold keys and values, not {tree!r}")
    hints = get_type_hints(schema, include_extras=True)
    names = [item.name for item in dataclasses.fields(schema)]
    values = {}
    for key, value in tree.items():
        full = f"{path}.{key}" if path else str(key)
        if key not in names:
            raise ConfigError(unknown_key(full, str(key), where, names))
        hint = hints[key]
        if dataclasses.is_dataclass(hint):
            values[key] = build(hint, {} if is_null(value) else value, full)
        else:
            values[key] = convert(value, hint, full)
    for name in names:  # sections left out are built too, so that their own checks run
        if name not in values and dataclasses.is_dataclass(hints[name]):
            values[name] = build(hints[name], {}, f"{path}.{name}" if path else name)
    return schema(**values)


def unknown_key(full: str, key: str, where: str, names: list[str]) -> str:
    close = difflib.get_close_matches(key.lower().replace("-", "_"), names, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    if key.partition(".")[0] in names and "." in key:
        hint = f"in a file, {key.rpartition('.')[2]} is a line of its own, indented under {key.partition('.')[0]}:. "
    return f"unknown key {full!r}; {hint}{where} takes: {', '.join(names)}"


def to_dict(config: Any) -> dict[str, Any]:
    """The resolved configuration as plain values, ready for YAML or JSON."""
    return dataclasses.asdict(config)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def settings_that_differ(before: Any, now: Any, path: str = "") -> list[str]:
    """A phrase for each setting that differs between two configurations of one schema and is not `free_on_resume`.

    What lies at a place is compared by its contents, elsewhere: on another machine it has another path.
    """
    phrases: list[str] = []
    for item in dataclasses.fields(now):
        old, new, key = getattr(before, item.name), getattr(now, item.name), f"{path}{item.name}"
        if dataclasses.is_dataclass(new):
            phrases += settings_that_differ(old, new, f"{key}.")
            continue
        free = item.metadata["free_on_resume"]
        if (old is None) != (new is None) if free == "place" else old != new and not free:
            phrases.append(f"{key} was {old!r}, now {new!r}")
    return phrases


def section_help(schema: Any, path: str) -> list[str]:
    hints = get_type_hints(schema, include_extras=True)
    lines: list[str] = []
    nested: list[str] = []
    for item in dataclasses.fields(schema):
        if dataclasses.is_dataclass(hints[item.name]):
            nested += ["", f"{item.name}:"] + section_help(hints[item.name], f"{path}{item.name}.")
            continue
        default = item.default_factory() if callable(item.default_factory) else item.default
        shown = "required" if default == "" else "null" if default is None else default
        lines.append(f"  {path}{item.name} = {shown}  ({type_name(hints[item.name])})")
        lines += textwrap.wrap(item.metadata["help"], 110, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return lines + nested
