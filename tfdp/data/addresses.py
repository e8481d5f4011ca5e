"""The address of records: `PATTERN[:FIELD][:KEY=VALUE]`, what follows `jsonl:` and `parquet:`.

FIELD and KEY are names of letters, digits, `_`, `-` and `.`; VALUE has neither colon nor slash. What holds other
characters stands in double quotes, as JSON writes a text. An address is taken apart from its end, and what is left is
the pattern; what is left and is the path of a file is that file, whatever colons are in it.
"""

import json
import os
import re
from dataclasses import dataclass

from tfdp.system.exits import ConfigError
from tfdp.system.messages import shown

DEFAULT_FIELD = "text"

_QUOTED = r'"(?:[^"\\]|\\.)*"'
_NAME = rf"[\w.-]+|{_QUOTED}"
_CONDITIONS = [re.compile(rf"(.+):({_NAME})=({value})", re.DOTALL) for value in (_QUOTED, r"[^:/]*")]
_FIELD = re.compile(rf"(.+):({_NAME})", re.DOTALL)


@dataclass(frozen=True)
class Address:
    """The parts of an address."""

    pattern: str  # of file names, for `inputs.find`
    field: str | None  # None: the default one
    only: tuple[str, str] | None  # the field and the value of the records to take; None: all


def parse(address: str, key: str) -> Address:
    """Takes an address apart. Raises `ConfigError`, blaming `key`, for double quotes with no JSON text inside."""
    rest, field, only = address, None, None
    if condition := _match(_CONDITIONS, rest):
        rest, only = condition[1], (_unquoted(condition[2], key), _unquoted(condition[3], key))
    if named := _match([_FIELD], rest):
        rest, field = named[1], _unquoted(named[2], key)
    return Address(rest, field, only)


def _match(patterns: list[re.Pattern[str]], rest: str) -> re.Match[str] | None:
    if os.path.isfile(os.path.expanduser(rest)):
        return None
    return next(filter(None, (pattern.fullmatch(rest) for pattern in patterns)), None)


def _unquoted(text: str, key: str) -> str:
    if not re.fullmatch(_QUOTED, text, re.DOTALL):
        return text
    try:
        return str(json.loads(text))
    except ValueError as error:
        raise ConfigError(f"{key}: {shown(text)} must be a text as JSON writes it: {error}") from None
