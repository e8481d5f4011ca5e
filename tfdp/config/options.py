"""Flags and YAML files as values by dotted key, each of the type that its key has.

Every mistake is a `ConfigError` of one line. This module itself reads numbers, booleans, text, choices and lists of
them, so that flags and YAML agree; jsonargparse reads every other type, and prints `--help`.
"""

import itertools
import re
import sys
import types
import typing
from argparse import ArgumentError
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from tfdp.config import strict_yaml
from tfdp.system.exits import ConfigError
from tfdp.system.messages import nearest, nearest_key, shown

WITHOUT_VALUE = ("help", "print_config")
RENAMED = {"data.left_out": "data.excluded_positions"}  # keys of earlier versions, which keep working
_UNFIT = object()


def split(argv: Sequence[str], keys: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The flags of a command line as (name, value), in order: `--name VALUE` and `--name=VALUE`.

    Raises:
      ConfigError: an unknown name, a name without a value, something that is no flag, or a flag twice with two values.
    """
    found: list[tuple[str, str]] = []
    arguments = ["--help" if argument == "-h" else argument for argument in argv]
    while arguments:
        argument = arguments.pop(0)
        name, equals, value = argument[2:].partition("=")
        name = _current(name, keys)
        if not argument.startswith("--"):
            raise ConfigError(f"unrecognized arguments: {shown(argument)}")
        if name not in keys and name not in ("config", *WITHOUT_VALUE):
            raise ConfigError(f"unknown key {shown(name)} on the command line{suggestion(name, keys)}")
        if not equals and name not in WITHOUT_VALUE:
            if not arguments or arguments[0].startswith("--"):
                raise ConfigError(_without_value(name, keys))
            value = arguments.pop(0)
        found.append((name, value))
    _reject_repetitions(found)
    return found


def values_of(flag: str, argv: Sequence[str]) -> list[str]:
    """The value of each `--flag VALUE` and `--flag=VALUE`, in order, in a command line that need not be valid."""
    values = []
    for argument, following in itertools.zip_longest(argv, argv[1:]):
        if argument == flag and following is not None:
            values.append(following)
        elif argument.startswith(f"{flag}="):
            values.append(argument.partition("=")[2])
    return values


def without(flag: str, argv: Sequence[str]) -> list[str]:
    """A command line, which need not be valid, without each `--flag VALUE` and `--flag=VALUE`."""
    kept, arguments = [], list(argv)
    while arguments:
        argument = arguments.pop(0)
        if argument == flag and arguments:
            arguments.pop(0)
        elif argument != flag and not argument.startswith(f"{flag}="):
            kept.append(argument)
    return kept


def of_file(path: Path, keys: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a YAML file by dotted key. Raises `ConfigError` as `strict_yaml.read`, and for unknown keys."""
    values: dict[str, Any] = {}
    for key, value in _flat(strict_yaml.read(path), keys, path):
        if key in values:
            raise ConfigError(f"{key} ({shown(value)}) must be given once in {shown(path)}, under one of its names")
        values[key] = read(key, keys[key], value)
    return values


def of_flags(flags: Iterable[tuple[str, str]], keys: Mapping[str, Any]) -> dict[str, Any]:
    """The values of flags by dotted key."""
    return {name: read_text(name, keys[name], value) for name, value in flags if name in keys}


def read(key: str, kind: Any, value: Any) -> Any:
    """A YAML value as type `kind`. Text in place of a number or a boolean is read as on the command line."""
    found = _fit(kind, value, None)
    if found is not _UNFIT:
        return found
    return read_text(key, kind, value) if isinstance(value, str) else _read_other_type(key, kind, value)


def read_text(key: str, kind: Any, text: str) -> Any:
    """The text after a flag as a value of type `kind`."""
    word = text.strip()
    try:
        value = text if not word else strict_yaml.loads(word) if word[0] in "[{" else strict_yaml.scalar(word)
    except ValueError as error:
        if _fit(kind, None, text) is _UNFIT:
            raise ConfigError(f"{key} ({shown(text)}) must be {describe(kind)}: {error}") from None
        value = text
    found = _fit(kind, value, text)
    return found if found is not _UNFIT else _read_other_type(key, kind, value)


def whole_number(text: str) -> int | None:
    """The number that ASCII digits stand for; None for all other text, and for more than 18 digits."""
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else None


def describe(kind: Any) -> str:
    """A type in words, for messages."""
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    if kind in names:
        return names[kind]
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (tuple, list):
        choices = [str(choice) for choice in typing.get_args(parts[0])] if parts else []
        return f"a list of {', '.join(choices)}, such as [{choices[0]}]" if choices else "a list such as [1, 2]"
    if origin is Literal:
        return "one of " + ", ".join(str(choice) for choice in parts)
    if _is_union(kind):
        return " or ".join(describe(part) for part in parts)
    return f"of the type {getattr(kind, '__name__', kind)}"


def _current(name: str, keys: Mapping[str, Any]) -> str:
    """The current name of a key; prints a note on stderr if `name` is an earlier one."""
    new = RENAMED.get(name, name)
    if new == name or new not in keys:
        return name
    print(f"note: {name} is called {new} now", file=sys.stderr, flush=True)
    return new


def suggestion(name: str, keys: Iterable[str]) -> str:
    """The end of a message about an unknown key: the key that its user may have meant."""
    return did_you_mean(nearest_key(name, keys)) or ": --help lists the keys"


def did_you_mean(name: str | None) -> str:
    return f": did you mean {name}?" if name else ""


def _without_value(name: str, keys: Mapping[str, Any]) -> str:
    if name == "config":
        return "--config must be followed by a YAML file, as in --config FILE.yaml"
    return f"{name} must be followed by a value: {describe(keys[name])}"


def _reject_repetitions(flags: Sequence[tuple[str, str]]) -> None:
    first: dict[str, str] = {}
    for name, value in flags:
        if name != "config" and first.setdefault(name, value) != value:
            raise ConfigError(f"{name} ({shown(value)}) must be given once: it is {shown(first[name])} before")


def _flat(
    content: Mapping[str, Any], keys: Mapping[str, Any], path: Path, above: str = ""
) -> Iterator[tuple[str, Any]]:
    """Yields (dotted key, value) for each value in a YAML file."""
    for name, value in content.items():
        key = _current(f"{above}{name}", keys)
        if key in keys:
            yield key, value
        elif not any(known.startswith(f"{key}.") for known in keys):
            sections = dict.fromkeys(known.rpartition(".")[0] for known in keys if "." in known)
            candidates = sections if isinstance(value, dict) else keys
            raise ConfigError(f"unknown key {shown(key)} in {shown(path)}{suggestion(key, candidates)}")
        elif not isinstance(value, dict):
            raise ConfigError(f"{key} ({shown(value)}) in {shown(path)} must be a section with keys below it")
        else:
            yield from _flat(value, keys, path, f"{key}.")


# ---------------------------------------------------------------------------------------------------
# Types
# ---------------------------------------------------------------------------------------------------


def _fit(kind: Any, value: Any, text: str | None) -> Any:
    """The value as one of type `kind`, or `_UNFIT`.

    Args:
      value: as YAML has it.
      text: what the user wrote on the command line; None for a value of a file.
    """
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if _is_union(kind):
        ordered = sorted(parts, key=lambda part: part is str)  # `null` is text only if nothing else fits
        return next((found for part in ordered if (found := _fit(part, value, text)) is not _UNFIT), _UNFIT)
    if origin is Literal:
        fits = (choice for choice in parts if choice == text or (type(choice) is type(value) and choice == value))
        return next(fits, _UNFIT)
    if origin in (tuple, list) and isinstance(value, list):
        kinds = parts if origin is tuple and parts[1:] != (...,) else parts[:1] * len(value)
        items = [_fit(part, item, None) for part, item in zip(kinds, value, strict=False)]
        return _UNFIT if len(kinds) != len(value) or any(item is _UNFIT for item in items) else origin(items)
    if kind is str:
        return text if text is not None else value if isinstance(value, str) else _UNFIT
    if kind is float and type(value) in (int, float):
        return float(value) if abs(value) < 1e300 or type(value) is float else _UNFIT
    return value if kind in (int, bool, type(None)) and type(value) is kind else _UNFIT


def _read_other_type(key: str, kind: Any, value: Any) -> Any:
    """A value of a type unknown to `_fit`, as a user's recipe may have. Raises `ConfigError` if it does not fit."""
    if not _is_plain(kind):
        import jsonargparse

        parser = jsonargparse.ArgumentParser(exit_on_error=False)
        parser.add_argument("--value", type=kind)
        try:
            return parser.parse_object({"value": value}).value
        except ArgumentError:
            pass
    raise ConfigError(f"{key} ({shown(value)}) must be {describe(kind)}{_nearest_choice(kind, value)}")


def _is_plain(kind: Any) -> bool:
    """Whether `_fit` knows the type."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if _is_union(kind) or origin in (tuple, list):
        return all(part is ... or _is_plain(part) for part in parts)
    return origin is Literal or kind in (int, float, bool, str, type(None))


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (typing.Union, types.UnionType)


def _nearest_choice(kind: Any, value: Any) -> str:
    if typing.get_origin(kind) is not Literal or not isinstance(value, str):
        return ""
    return did_you_mean(nearest(value, [str(choice) for choice in typing.get_args(kind)]))
