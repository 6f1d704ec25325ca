"""A configuration is a dataclass whose fields are options: its flags, the keys of its YAML file, help, defaults and checks come from there.

`chosen(option)` makes such a field. Flags override the file, the file overrides defaults.
"""

import argparse
import dataclasses
import difflib
import importlib
import re
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from chunkft_compile.cli.options import Option

_KINDS: dict[type, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "true or false"),
    int: ((int,), "an integer"),
    float: ((int, float), "a number"),
    str: ((str,), "a text"),
    Path: ((str, Path), "a path"),
}
"""What a file may hold where a field has this type, and what to call it."""

_FLOAT = re.compile(r"[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+$")  # 1e-4 is a number for everybody but YAML 1.1


def chosen(option: Option) -> Any:
    """A field for `option`, of the same default."""
    default = dataclasses.MISSING if option.required else option.default
    return dataclasses.field(default=default, metadata={"option": option})


def options(config: type) -> dict[str, Option]:
    """The options of a configuration by the names of its fields."""
    return {field.name: field.metadata["option"] for field in dataclasses.fields(config)}


def add_flags(parser: argparse.ArgumentParser, config: type) -> None:
    """Register every field, under the titles of their options. What is not given is not in the namespace."""
    groups: dict[str, argparse._ActionsContainer] = {}
    for name, option in options(config).items():
        if option.title and option.title not in groups:
            groups[option.title] = parser.add_argument_group(option.title)
        option.add(groups.get(option.title, parser), name, unset=argparse.SUPPRESS)


def check_fields(config: Any) -> None:
    """Raise `ValueError` for a field with a value that its option does not take."""
    for name in options(type(config)):
        if (wrong := _wrong(type(config), name, getattr(config, name))) is not None:
            raise ValueError(wrong)


def read_file(path: Path, config: type) -> dict[str, Any]:
    """Fields of `config` from a YAML file. Raises `ValueError` with file, line, key, value and what is allowed there."""
    yaml = _yaml(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ValueError(f"--config {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    try:
        return _fields(yaml, _loader(yaml)(text), path, config)
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        line = f" line {mark.line + 1}" if mark is not None else ""
        raise ValueError(f"--config {path}{line}: not YAML ({problem or ' '.join(str(error).split())})") from error


def merge(config: type, kept: Mapping[str, Any], given: Mapping[str, Any], *, instead: Iterable[tuple[str, str]] = ()) -> dict[str, Any]:
    """Fields of a file overridden by those of flags. Of a pair in `instead`, a flag for one also takes away the other of the file."""
    fields = dict(kept)
    for one, other in instead:
        for name, rival in ((one, other), (other, one)):
            if name in given and rival not in given:
                fields.pop(rival, None)
    return {**fields, **{name: value for name, value in given.items() if name in options(config) and value is not None}}


def to_plain(config: Any) -> dict[str, Any]:
    """All fields as plain values, as a file holds them."""
    found = {name: getattr(config, name) for name in options(type(config))}
    return {name: str(value) if isinstance(value, Path) else value for name, value in found.items()}


def to_yaml(config: Any) -> str:
    """The text of a file with all fields. It needs PyYAML."""
    text: str = _yaml(None).safe_dump(to_plain(config), sort_keys=False, allow_unicode=True)
    return text


def nearest(name: str, names: Iterable[str]) -> str:
    """A hint at the name that was probably meant, or nothing."""
    found = difflib.get_close_matches(name.replace("-", "_"), list(names), n=1)
    return f"; did you mean {found[0]}?" if found else ""


def _fields(yaml: Any, loader: Any, path: Path, config: type) -> dict[str, Any]:
    root = loader.get_single_node()
    if root is None:
        raise ValueError(f"--config {path} is empty: it needs lines of KEY: VALUE")
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"--config {path} line {root.start_mark.line + 1}: not KEY: VALUE")
    found: dict[str, Any] = {}
    lines: dict[str, int] = {}
    for key_node, value_node in root.value:
        line = key_node.start_mark.line + 1
        key, value = (loader.construct_object(node, deep=True) for node in (key_node, value_node))
        where = f"--config {path} line {line}"
        if key not in options(config):
            hint = nearest(str(key), options(config)) or f"; there are {', '.join(options(config))}"
            raise ValueError(f"{where}: there is no key {key!r} (here {value!r}){hint}")
        if key in found:
            raise ValueError(f"{where}: {key} is given twice, first in line {lines[key]}")
        if (wrong := _wrong(config, key, value)) is not None:
            raise ValueError(f"{where}: {wrong}")
        found[key], lines[key] = _cast(config, key, value), line
    return found


def _wrong(config: type, name: str, value: Any) -> str | None:
    """Why `value` is nothing for a field, or None."""
    option, (kind, optional) = options(config)[name], _kind(config, name)
    if value is None:
        return None if optional else f"{name} has no value: {_allowed(option, kind)}"
    accepted, _ = _KINDS[kind]
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        return f"{name} is {value!r}, not {_allowed(option, kind)}"
    if option.choices and value not in option.choices:
        return f"{name} is {value!r}, not {_allowed(option, kind)}{nearest(str(value), option.choices)}"
    try:
        option.parse(str(value))
    except (argparse.ArgumentTypeError, ValueError) as error:
        return f"{name}: {error}"
    return None


def _allowed(option: Option, kind: type) -> str:
    return f"one of {', '.join(option.choices)}" if option.choices else f"{_KINDS[kind][1]} ({option.help})"


def _cast(config: type, name: str, value: Any) -> Any:
    kind, _ = _kind(config, name)
    return None if value is None else kind(value)


def _kind(config: type, name: str) -> tuple[type, bool]:
    """The type of a field, and whether it may be None."""
    hint = typing.get_type_hints(config)[name]
    if isinstance(hint, types.UnionType):
        (kind,) = [part for part in typing.get_args(hint) if part is not types.NoneType]
        return kind, True
    return hint, False


def _loader(yaml: Any) -> Any:
    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        """With numbers such as 1e-4."""

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))
    return Loader


def _yaml(path: Path | None) -> Any:
    try:
        return importlib.import_module("yaml")
    except ModuleNotFoundError as error:
        what = "printing a configuration" if path is None else f"reading {path}"
        raise ValueError(f"{what} needs the package PyYAML: pip install 'chunkft_compile[hf]'") from error
