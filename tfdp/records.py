"""Documents in files of records: one field of JSON lines, one column of Parquet tables.

A document's name is its file's path below the folder that all files share, and the number of its line or row in it.
"""

import contextlib
import gzip
import json
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tfdp.exits import ConfigError

DEFAULT_FIELD = "text"


Condition = tuple[str, str] | None  # the field and the value of the records to take; None: all


def json_lines(path: Path, field: str, key: str, only: Condition = None) -> Iterator[tuple[int, str]]:
    """Yields (line number from 1, text of `field`) of a file of JSON objects, one a line; empty lines are passed over.

    Args:
      path: plain, or compressed as its suffix says: .gz, .xz, .zst.
      field: whose value is the text; a.b is the field b of the object a.
      key: the configuration key to blame.
      only: which records to take; a value that is no text is compared as JSON writes it.

    Raises:
      ConfigError: what is wrong, with file and line.
    """
    number = 0
    try:
        for line in _lines(path):
            number += 1
            if line.strip():
                where = f"{key}: {path}, line {number},"
                record = _parse(line, where)
                if only is None or _shown(_field_of(record, only[0], where)) == only[1]:
                    yield number, _require_text(_field_of(record, field, where), f"{where} field {field}")
    except (EOFError, OSError, lzma.LZMAError, zlib.error, _zstd_error()) as error:
        message = getattr(error, "strerror", None) or error
        raise ConfigError(f"{key}: {path} must be whole and readable, but after line {number}: {message}") from None


def num_json_lines(path: Path) -> int:
    """The lines with a record in a file that `json_lines` has read."""
    return sum(1 for line in _lines(path) if line.strip())


def _parse(line: bytes, where: str) -> object:
    try:
        return json.loads(line)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where} must be UTF-8: {error.reason} at byte {error.start}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} must be one JSON object: {error}") from None


def _field_of(value: Any, field: str, where: str) -> Any:
    for part in field.split("."):
        if not isinstance(value, dict):
            raise ConfigError(f"{where} must be a JSON object with the field {field}, and is {type(value).__name__}")
        if part not in value:
            listed = ", ".join(list(value)[:8]) or "none"
            raise ConfigError(f"{where} must have the field {field}: it has {listed}; name one as jsonl:GLOB:FIELD")
        value = value[part]
    return value


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _lines(path: Path) -> Iterator[bytes]:
    if path.suffix == ".zst":
        yield from _zstd_lines(path)
        return
    with (
        gzip.open(path)
        if path.suffix == ".gz"
        else lzma.open(path)
        if path.suffix == ".xz"
        else path.open("rb") as file
    ):
        yield from file


def _zstd_lines(path: Path) -> Iterator[bytes]:
    """Lines of a Zstandard file. The library's own reader takes a file that was cut off for its end."""
    import zstandard

    decoder = None
    pending: list[bytes] = []
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            while chunk:
                if decoder is None or decoder.eof:  # a file may hold several frames
                    decoder = zstandard.ZstdDecompressor().decompressobj()
                first, *rest = decoder.decompress(chunk).split(b"\n")
                chunk = decoder.unused_data if decoder.eof else b""
                pending.append(first)
                for line in rest:
                    yield b"".join(pending)
                    pending = [line]
    if decoder is not None and not decoder.eof:
        raise EOFError("it ends inside a frame")
    if last := b"".join(pending):
        yield last


def _zstd_error() -> type[Exception]:
    import zstandard

    return zstandard.ZstdError


def parquet_rows(path: Path, column: str, key: str, only: Condition = None) -> Iterator[tuple[int, str]]:
    """Yields (row number from 1, text of `column`) of a Parquet file; memory holds one batch of rows.

    Raises:
      ConfigError: what is wrong, with file and row.
    """
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with contextlib.closing(pyarrow.parquet.ParquetFile(path)) as file:
            names = [name for name in file.schema_arrow.names if isinstance(name, str)]
            columns = [column, *([only[0]] if only else [])]
            for wanted in columns:
                if wanted not in names:
                    listed = ", ".join(names[:8]) or "none"
                    raise ConfigError(
                        f"{key}: {path} must have the column {wanted}: it has {listed}; name one as parquet:GLOB:COLUMN"
                    )
            for batch in file.iter_batches(batch_size=1024, columns=columns):
                for row in range(len(batch)):
                    number += 1
                    if only is None or _shown(batch.column(only[0])[row].as_py()) == only[1]:
                        value = _from_arrow(batch.column(column)[row])
                        yield number, _require_text(value, f"{key}: {path}, row {number}, column {column}")
    except (pyarrow.ArrowException, OSError) as error:
        message = " ".join(str(error).split())
        raise ConfigError(f"{key}: {path} must be a whole Parquet file, but after row {number}: {message}") from None


def num_parquet_rows(path: Path) -> int:
    """The rows of a file that `parquet_rows` has read."""
    import pyarrow.parquet

    return int(pyarrow.parquet.read_metadata(path).num_rows)


def _from_arrow(value: Any) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        return error


def _require_text(value: object, where: str) -> str:
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
