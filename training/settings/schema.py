"""Dataclasses as typed configurations: from YAML and `--key=value` overrides, checked, and explained by `--help`.

A configuration is a tree of dataclasses whose fields are made by `option`. Nothing here knows what is configured.
"""

from __future__ import annotations

import dataclasses
import difflib
import textwrap
import types
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml


class ConfigError(ValueError):
    """A key that does not exist, or a value that cannot be right."""


def option(default: Any, help: str, free_on_resume: bool = False) -> Any:
    """A dataclass field with a one-line explanation; lists get a fresh copy per instance.

    `free_on_resume` marks a setting that may change when what was configured goes on (see `settings_that_differ`).
    """
    metadata = {"help": help, "free_on_resume": free_on_resume}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """`["--config", "f", "--a.b=1", "--c", "2"]` -> `(["f"], [("a.b", "1"), ("c", "2")])`."""
    files: list[str] = []
    overrides: list[tuple[str, str]] = []
    remaining = list(arguments)
    while remaining:
        argument = remaining.pop(0)
        require(argument.startswith("--"), f"cannot read {argument!r}: write --config FILE or --key=value")
        key, equals, value = argument[2:].partition("=")
        if not equals:
            require(bool(remaining), f"--{key} has no value: write --{key}=VALUE")
            value = remaining.pop(0)
        if key == "config":
            files.append(value)
        else:
            overrides.append((key, value))
    return files, overrides


def read_yaml(path: Path) -> dict[str, Any]:
    require(path.is_file(), f"no config file {path}; ready-made ones are in training/configs")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    require(tree is None or isinstance(tree, dict), f"{path} must hold keys and values")
    return tree or {}


def read_value(key: str, text: str) -> Any:
    """The value of a `--key=value` override."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"{key}: {text!r} is not valid YAML; put text with special characters in quotes") from None


def set_key(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set the dotted `key` in a tree of dictionaries; the check of names follows in `build`."""
    *sections, last = key.split(".")
    for section in sections:
        if tree.get(section) is None:
            tree[section] = {}
        tree = tree[section]
        require(isinstance(tree, dict), f"{key!r}: {section!r} is a value, not a section")
    tree[last] = value


def build(schema: Any, tree: Any, path: str = "") -> Any:
    """Make `schema` from nested dictionaries, checking every name and type."""
    where = f"section {path!r}" if path else "a config"
    require(isinstance(tree, dict), f"{where} must hold keys and values, not {tree!r}")
    hints = get_type_hints(schema)
    names = [item.name for item in dataclasses.fields(schema)]
    values = {}
    for key, value in tree.items():
        full = f"{path}.{key}" if path else str(key)
        if key not in names:
            raise ConfigError(unknown_key(full, str(key), where, names))
        hint = hints[key]
        values[key] = build(hint, value or {}, full) if dataclasses.is_dataclass(hint) else convert(value, hint, full)
    for name in names:  # sections left out are built too, so that their own checks run
        if name not in values and dataclasses.is_dataclass(hints[name]):
            values[name] = build(hints[name], {}, f"{path}.{name}" if path else name)
    return schema(**values)


def unknown_key(full: str, key: str, where: str, names: list[str]) -> str:
    close = difflib.get_close_matches(key, names, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"unknown key {full!r}; {hint}{where} takes: {', '.join(names)}"


def convert(value: Any, hint: Any, path: str) -> Any:
    """Check `value` against a type hint; whole numbers and texts such as `1e-4` are accepted as floats."""
    origin, choices = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in choices:
            return None
        return convert(value, next(choice for choice in choices if choice is not type(None)), path)
    if origin is Literal:
        if value is False and "no" in choices:  # YAML reads a bare `no` as false
            value = "no"
        require(value in choices, f"{path} is {value!r}; valid values: {', '.join(map(str, choices))}")
        return value
    if origin is list:
        require(isinstance(value, list), f"{path} is {value!r}; a list such as [a, b] is expected")
        return [convert(item, choices[0], f"{path}[{index}]") for index, item in enumerate(value)]
    if hint is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML 1.1 reads 1e-4 as text
        except ValueError:
            pass
    good = isinstance(value, hint) and not (hint is not bool and isinstance(value, bool))
    require(good, f"{path} is {value!r}; expected {type_name(hint)}")
    return value


def type_name(hint: Any) -> str:
    origin, choices = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join("null" if choice is type(None) else type_name(choice) for choice in choices)
    if origin is Literal:
        return " | ".join(map(str, choices))
    if origin is list:
        return f"list of {type_name(choices[0])}"
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false"}[hint]


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
    """A phrase for each setting that differs between two configurations of one schema and is not `free_on_resume`."""
    phrases: list[str] = []
    for item in dataclasses.fields(now):
        old, new, key = getattr(before, item.name), getattr(now, item.name), f"{path}{item.name}"
        if dataclasses.is_dataclass(new):
            phrases += settings_that_differ(old, new, f"{key}.")
        elif old != new and not item.metadata["free_on_resume"]:
            phrases.append(f"{key} was {old!r}, now {new!r}")
    return phrases


def section_help(schema: Any, path: str) -> list[str]:
    hints = get_type_hints(schema)
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
