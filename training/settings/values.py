"""Typed reading of configuration values: text becomes what its field's type says, or is refused as it was written.

| type | what is read |
|---|---|
| path | the text itself, `~/` expanded; refused: addresses, `$VARIABLE`, and what may mean nothing (`None`, `~`) |
| text | the text itself |
| whole number | a decimal number: `010` is 10, `1_000` is 1000, `1e5` is 100000 |
| number | a finite decimal number |
| true or false | `true`, `yes`, `on`, `false`, `no`, `off` |
| one of some names | a name; `off` and `false` also mean `no` |
| list | YAML's `[a, b]` |

`null`, and in a file also an empty value, is nothing for a field that may be nothing. A text in quotes is a text.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import types
from collections.abc import Hashable
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml


class ConfigError(ValueError):
    """A key that does not exist, or a value that cannot be right."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


PATH = "path"
FolderPath = Annotated[str, PATH]  # the type of fields that hold a path, or a path or a name on the Hub

NULLS = ("", "null", "Null", "NULL", "~")  # what YAML reads as nothing
PERHAPS_NULLS = ("none", "nil")  # what other languages write for it
TRUE, FALSE = ("true", "yes", "on"), ("false", "no", "off")
DIGITS = r"(?:\d+|\d{1,3}(?:_\d{3})+)"
NUMBER = re.compile(rf"[+-]?(?:{DIGITS}(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d{{1,4}})?", re.ASCII)
LARGEST_EXPONENT = 30  # of whole numbers: 1e1000 is a slip, and would take its time


class Plain(str):
    """A text without quotes, of a YAML file or of the command line: the type of its field decides what it means."""


class TextLoader(yaml.SafeLoader):
    """YAML whose unquoted values stay `Plain` text, and whose mappings must not have a key twice."""

    # of all the guesses from a text to a type only that of `<<`, which merges mappings
    yaml_implicit_resolvers = {
        "<": [rule for rule in yaml.SafeLoader.yaml_implicit_resolvers["<"] if rule[0].endswith("merge")]
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and not key.tag.endswith("merge"):
                if key.value in lines:
                    raise yaml.YAMLError(f"key {key.value!r} stands twice, in lines {lines[key.value]} and {line}")
                lines[key.value] = line
        return super().construct_mapping(node, deep)

    def construct_text(self, node: yaml.ScalarNode) -> str:
        text = str(self.construct_scalar(node))
        return Plain(text) if node.style is None else text


TextLoader.add_constructor("tag:yaml.org,2002:str", TextLoader.construct_text)


def is_null(value: Any) -> bool:
    """Whether a value is nothing: None, or written so."""
    return value is None or isinstance(value, Plain) and value in NULLS


def read_value(key: str, text: str) -> str:
    """The value of a `--key=value` override: `Plain`, or in quotes, as YAML has them, a text for certain.

    Raises:
        ConfigError: if it is empty, or begins with a quote and does not end with it.
    """
    require(bool(text.strip()), f"{key} is {text!r}, which is empty: write --{key}=null for nothing, or leave it out")
    return read_yaml_text(key, text) if text[0] in "'\"" and text[-1] == text[0] else Plain(text)


def read_yaml_text(key: str, text: str) -> Any:
    try:
        return yaml.load(text, TextLoader)
    except yaml.YAMLError:
        raise ConfigError(f"{key}: {text!r} is not valid YAML; put text with special characters in quotes") from None


def convert(value: Any, hint: Any, path: str) -> Any:
    """Read `value` as a type hint wants it: text is read by its type, values of other types must have the right one.

    Args:
        value: of a YAML file, an override, or Python.
        hint: str, int, float, bool, a Literal, a list of one of these, a `FolderPath`, or one of them or None.
        path: the key with its sections, for messages.

    Raises:
        ConfigError: with the value as it was written.
    """
    expected = f"{path} is {'null' if value is None else repr(value)}; expected {type_name(hint)}"
    origin, choices = get_origin(hint), get_args(hint)
    optional = origin in (Union, types.UnionType)
    inner = next(choice for choice in choices if choice is not type(None)) if optional else hint
    if isinstance(value, Plain):
        refuse_perhaps_null(value, inner, optional, path)
    if optional:
        empty_path = value == "" and get_origin(inner) is Annotated  # in quotes, so not by accident
        return None if is_null(value) or empty_path else convert(value, inner, path)
    require(not is_null(value), expected)
    if origin is Annotated:
        return read_path(value, path)
    if origin is Literal:
        return read_choice(value, choices, path)
    if origin is list:
        return read_list(value, choices[0], path)
    if isinstance(value, str):
        return {str: read_text, bool: read_bool, int: read_int, float: read_float}[hint](value, expected)
    good = isinstance(value, (int, float) if hint is float else hint) and isinstance(value, bool) == (hint is bool)
    require(good and (hint is not float or math.isfinite(value)), expected)
    return hint(value)


def refuse_perhaps_null(value: Plain, hint: Any, optional: bool, path: str) -> None:
    """Refuse texts that may mean nothing, or something: `None`, and `~`, which YAML and shells read differently."""
    is_path = get_origin(hint) is Annotated
    if value == "~" and is_path:
        other = [f"{os.path.expanduser('~')!r} for the home folder"]
    elif value.lower() in PERHAPS_NULLS and (optional or is_path):
        other = ["'./" + value + "' for a folder of that name"] if is_path else [f"{f'{value!r}'!r} for the text"]
    else:
        return
    remedies = ["null for nothing"] * optional + other
    raise ConfigError(f"{path} is {str(value)!r}, which can mean two things: write {', or '.join(remedies)}")


def read_path(value: Any, path: str) -> str:
    """A path, `~` expanded; what a shell would have made something else of is refused."""
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    require(isinstance(text, str) and bool(text), f"{path} is {value!r}; expected {type_name(FolderPath)}")
    variable = re.search(r"\$(\w+|\{\w+\})", text)
    variable = None if variable is None or Path(text).exists() else variable
    wrong = {
        "expected one path, and no list; begin it with ./ if it is called so": text[0] + text[-1] in ("[]", "{}"),
        "a path does not begin or end with a blank here": text != text.strip(),
        "a path consists of printable characters in UTF-8 here": not is_printable(text),
        "expected a path, or the name of a repository without an address": "://" in text,
        f"{variable and variable[0]} is not replaced here: write what it stands for": variable is not None,
    }
    for reason in (reason for reason, holds in wrong.items() if holds):
        raise ConfigError(f"{path} is {value!r}; {reason}")
    expanded = os.path.expanduser(text)
    unknown = f"{path} is {value!r}; there is no user of that name. Begin it with ./ if a folder is called so"
    require(not expanded.startswith("~"), unknown)
    return str(expanded)


def is_printable(text: str) -> bool:
    """Whether a text has neither control characters nor bytes that are not UTF-8 (Python keeps them as surrogates)."""
    return not any(ord(character) < 32 or 0xD800 <= ord(character) < 0xE000 for character in text)


def read_text(text: str, expected: str) -> str:
    require(bool(text.strip()) and is_printable(text), expected)
    return str(text)


def read_bool(text: str, expected: str) -> bool:
    require(text.lower() in TRUE + FALSE, expected)
    return text.lower() in TRUE


def read_int(text: str, expected: str) -> int:
    require(NUMBER.fullmatch(text) is not None, expected)
    number = Decimal(text.replace("_", ""))
    require(number.adjusted() <= LARGEST_EXPONENT and number == number.to_integral_value(), expected)
    return int(number)


def read_float(text: str, expected: str) -> float:
    require(NUMBER.fullmatch(text) is not None, expected)
    number = float(text.replace("_", ""))
    require(math.isfinite(number), expected)
    return number


def read_choice(value: Any, choices: tuple[Any, ...], path: str) -> Any:
    """One of the names of a Literal; what YAML reads as false is its `no`."""
    if "no" in choices and (value is False or isinstance(value, str) and value.lower() in FALSE):
        value = "no"
    close = difflib.get_close_matches(str(value).lower(), choices, n=1)
    hint = f"did you mean {close[0]!r}? " if close and close[0] != value else ""
    require(value in choices, f"{path} is {value!r}; {hint}valid values: {', '.join(map(str, choices))}")
    return str(value)


def read_list(value: Any, item: Any, path: str) -> list[Any]:
    if isinstance(value, Plain):
        value = read_yaml_text(path, value)
    require(isinstance(value, list), f"{path} is {value!r}; a list such as [a, b] is expected")
    return [convert(element, item, f"{path}[{index}]") for index, element in enumerate(value)]


def type_name(hint: Any) -> str:
    origin, choices = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join("null" if choice is type(None) else type_name(choice) for choice in choices)
    if origin is Annotated:
        return "a path"
    if origin is Literal:
        return " | ".join(map(str, choices))
    if origin is list:
        return f"list of {type_name(choices[0])}"
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false"}[hint]
