"""A record and its fields: how one is named, what makes it a text, and what a condition compares it with."""

import datetime
import decimal
import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from tfdp.system.exits import ConfigError

Condition = tuple[str, str] | None  # the field and the value of the records to take; None: all


class Record(NamedTuple):
    """The fields of a record that were asked for."""

    number: int  # in its file, from 1
    values: Sequence[Any]
    where: str  # it lies, for messages: the name of a field follows


def splits(field: str) -> Iterator[tuple[str, str]]:
    """The ways to read a name with dots as (name, the rest below it), the longest name first: a.b.c is c of a.b."""
    end = field.rfind(".")
    while end >= 0:
        yield field[:end], field[end + 1 :]
        end = field.rfind(".", 0, end)


def text_of(value: object, where: str) -> str:
    """The text that a field is. Raises `ConfigError` "`where` must be ..." for another value."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{where} must be UTF-8: {error.reason} at byte {error.start}") from None
    if not isinstance(value, str):
        kind = "null" if value is None else "not UTF-8" if isinstance(value, Exception) else type(value).__name__
        raise ConfigError(f"{where} must be text, and is {kind}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(f"{where} must be Unicode: half of a surrogate pair at character {error.start}") from None
    return value


def compared(value: object, where: str) -> str:
    """The text of a value, for a condition: text and bytes of UTF-8 as they are, dates and times as ISO 8601 has them
    (2026-01-31T12:00:00), decimals in digits (1.50), and all else as JSON writes it (1, 0.5, true, null, ["a", 1]).

    Bytes that are not UTF-8 equal no text. Raises `ConfigError` "`where` must be ..." for a value without such a text.
    """
    if isinstance(value, str):
        return value
    try:
        return _plain(value) or json.dumps(value, default=_plain_or_refuse)
    except (TypeError, ValueError, RecursionError) as error:
        kind = type(value).__name__
        raise ConfigError(f"{where} must be a value that has a text to compare, and is {kind}: {error}") from None


def _plain(value: object) -> str | None:
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return format(value, "f") if isinstance(value, decimal.Decimal) else None


def _plain_or_refuse(value: object) -> str:
    text = _plain(value)
    if text is None:
        raise TypeError(f"it holds {type(value).__name__}")
    return text
