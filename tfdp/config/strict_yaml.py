"""Strict YAML: no repeated key, and no text that unexpectedly becomes a number or a boolean.

PyYAML follows YAML 1.1, where 1:2 is 62, 012 is 10, `on` is true and the last of two equal keys wins. Here a whole
number is decimal digits (1_000 is one), a boolean is true or false, and everything else is text. The rest of YAML
(anchors, aliases, merge keys, quotes, blocks) works as usual, except tags.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tfdp.system.exits import ConfigError
from tfdp.system.messages import one_line, shown

if TYPE_CHECKING:
    import yaml


_MOST_VALUES = 100_000  # in one file; an alias counts each time it is used
_DEEPEST = 20
_MOST_DIGITS = 400  # more than any real number needs; Python refuses to read 4,300
_NAMES = (
    "null",
    "bool",
    "int",
    "float",
    "timestamp",
    "value",
    "str",
    "seq",
    "map",
)  # tags that PyYAML assigns by itself
_TAGS = {f"tag:yaml.org,2002:{name}" for name in _NAMES}
_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?(?:0|[1-9][0-9]*(?:_[0-9]+)*)")
_FLOAT = re.compile(r"[-+]?(?:(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|\.inf|\.Inf|\.INF)|\.nan|\.NaN|\.NAN")
_DIGITS = re.compile(r"[-+]?[0-9]+")  # digits that are no whole number, such as 012, are no float either


def read(path: Path) -> dict[str, Any]:
    """The keys and values of a configuration file; {} where it has none.

    Raises:
      ConfigError: no file, no YAML, no mapping, or a key twice, also once dotted and once below its
        section; the message names both lines.
    """
    try:
        is_file = path.is_file()
        content = loads(path.read_text(encoding="utf-8")) if is_file else None
    except OSError as error:
        raise ConfigError(f"--config ({shown(path)}) must be readable: {error.strerror}") from None
    except ValueError as error:  # no UTF-8, or no YAML
        raise ConfigError(f"--config ({shown(path)}) must be valid YAML: {error}") from None
    if not is_file:
        raise ConfigError(f"--config ({shown(path)}) must be an existing YAML file")
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"--config ({shown(path)}) must hold keys and values, such as `seed: 1`")
    return content


def loads(text: str) -> Any:
    """The value of a text in YAML: None, bool, int, float, str, list or dict with keys of text.

    Raises:
      ValueError: says in one line why there is none.
    """
    import yaml

    try:
        _check_depth(yaml.parse(text, Loader=yaml.SafeLoader))  # PyYAML composes nested values by recursion
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ValueError(one_line(" ".join(str(error).split()))[:300]) from None
    return _Reader().value(node, "", 0) if node is not None else None


def scalar(text: str) -> bool | int | float | str | None:
    """The value of an unquoted word."""
    if _NULL.fullmatch(text):
        return None
    if _BOOL.fullmatch(text):
        return text.lower() == "true"
    if len(text) > _MOST_DIGITS:
        return text
    if _INT.fullmatch(text):
        return int(text.replace("_", ""))
    if _FLOAT.fullmatch(text) and not _DIGITS.fullmatch(text):
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text


def _check_depth(events: "Iterable[yaml.Event]") -> None:
    depth = 0
    for event in events:
        name = type(event).__name__
        depth += name in ("MappingStartEvent", "SequenceStartEvent")
        depth -= name in ("MappingEndEvent", "SequenceEndEvent")
        if depth > _DEEPEST:
            raise ValueError(f"nested deeper than {_DEEPEST} levels")


class _Reader:
    """Turns the nodes of one document into values."""

    def __init__(self) -> None:
        self._lines: dict[str, int] = {}  # of each dotted key
        self._num_values = 0

    def value(self, node: "yaml.Node", key: str, depth: int) -> Any:
        import yaml

        self._num_values += 1
        if depth > _DEEPEST:  # an alias inside of itself
            raise ValueError(f"line {node.start_mark.line + 1}: nested deeper than {_DEEPEST} levels")
        if self._num_values > _MOST_VALUES:
            raise ValueError(f"line {node.start_mark.line + 1}: more than {_MOST_VALUES:,} values")
        if node.tag not in _TAGS:
            raise ValueError(f"line {node.start_mark.line + 1}: the tag {shown(node.tag)} has no meaning here")
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, key, depth)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, f"{key}[{index}]", depth + 1) for index, item in enumerate(node.value)]
        is_quoted = getattr(node, "style", None) is not None
        return node.value if is_quoted else scalar(node.value)

    def _mapping(self, node: "yaml.MappingNode", key: str, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for name, value in node.value:
            line = name.start_mark.line + 1
            if not isinstance(name.value, str):
                raise ValueError(f"line {line}: a key must be text")
            if name.tag == "tag:yaml.org,2002:merge":
                merged = {**self._to_merge(value, key, depth), **merged}
                continue
            path = f"{key}.{name.value}" if key else name.value
            if path in self._lines:
                raise ValueError(f"{shown(path)} stands in line {self._lines[path]} and in line {line}: leave one out")
            self._lines[path] = line
            found[name.value] = self.value(value, path, depth + 1)
        return {**merged, **found}

    def _to_merge(self, node: "yaml.Node", key: str, depth: int) -> dict[str, Any]:
        """The mapping that `<<` merges in. Its keys are no repetitions, though they are defined elsewhere too."""
        lines, self._lines = self._lines, {}
        value = self.value(node, key, depth + 1)
        self._lines = lines
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(each, dict) for each in values):
            raise ValueError(f"line {node.start_mark.line + 1}: << must name a mapping, or a list of them")
        return {name: each[name] for each in reversed(values) for name in each}
