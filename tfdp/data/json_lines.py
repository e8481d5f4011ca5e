"""Records in JSON lines: fields of the objects in a file, one object a line."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tfdp.data import compression, records, strict_json
from tfdp.system.exits import ConfigError
from tfdp.system.messages import shown

_MISSING = object()


def json_lines(path: Path, fields: Sequence[str], key: str, only: records.Condition = None) -> Iterator[records.Record]:
    """Yields the records of a file of JSON objects, one a line; empty lines are passed over.

    Args:
      path: plain, or compressed as its suffix says.
      fields: whose values are wanted; a.b is the field a.b, else the field b of the object a.
      key: the configuration key to blame.
      only: which records to take, by what `records.compared` makes of a value.

    Raises:
      ConfigError: what is wrong, with file and line.
    """
    number = 0
    file = f"{key}: {shown(path)}"
    try:
        for number, line in enumerate(compression.lines(path), 1):
            if line and not line.isspace():
                where = f"{file}, line {number},"
                record = _parse(line, where)
                if only is None or records.compared(_field_of(record, only[0], where), where) == only[1]:
                    values = [_field_of(record, field, where) for field in fields]
                    yield records.Record(number, values, f"{where} field")
    except OSError as error:
        raise ConfigError(f"{file} must be whole and readable, but after line {number}: {error.strerror}") from None


def num_json_lines(path: Path) -> int:
    """The lines with a record in a file that `json_lines` has read."""
    return sum(1 for line in compression.lines(path) if line and not line.isspace())


def _parse(line: bytes, where: str) -> object:
    try:
        return strict_json.parse(line)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where} must be UTF-8: {error.reason} at byte {error.start}") from None
    except ValueError as error:
        raise ConfigError(f"{where} must be one JSON object: {error}") from None


def _field_of(record: Any, field: str, where: str) -> Any:
    value = _find(record, field)
    return _refuse(record, field, where) if value is _MISSING else value


def _find(record: Any, field: str) -> Any:
    if not isinstance(record, dict):
        return _MISSING
    if field in record:
        return record[field]
    below = (_find(record[name], rest) for name, rest in records.splits(field) if name in record)
    return next((value for value in below if value is not _MISSING), _MISSING)


def _refuse(record: Any, field: str, where: str) -> None:
    """Raises `ConfigError`: what stands in the record in place of a field."""
    for name in field.split("."):
        if not isinstance(record, dict) or name not in record:
            break
        record = record[name]
    if not isinstance(record, dict):
        raise ConfigError(f"{where} must be a JSON object with the field {field}, and is {type(record).__name__}")
    listed = ", ".join(map(shown, list(record)[:8])) or "none"
    raise ConfigError(f"{where} must have the field {shown(field)}: it has {listed}; name one as jsonl:GLOB:FIELD")
