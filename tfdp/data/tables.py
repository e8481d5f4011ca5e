"""Records in tables of text: CSV, and TSV where a file's name says so; the first row names the columns.

A field in double quotes may hold separators, line breaks and doubled quotes (RFC 4180), in both.
"""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from tfdp.data import compression, records
from tfdp.system.exits import ConfigError
from tfdp.system.messages import shown

_LONGEST_FIELD = 1 << 30  # characters; the library's own limit is 128 KiB


def table_rows(path: Path, fields: Sequence[str], key: str, only: records.Condition = None) -> Iterator[records.Record]:
    """Yields the rows of a table, each with the number of the line that it ends on.

    Args:
      path: plain, or compressed as its suffix says.
      fields: the columns that are wanted.
      key: the configuration key to blame.
      only: which rows to take.

    Raises:
      ConfigError: what is wrong, with file and line.
    """
    csv.field_size_limit(_LONGEST_FIELD)
    file = f"{key}: {shown(path)}"
    rows = csv.reader(_lines(path, file), delimiter="\t" if _is_tabbed(path) else ",", strict=True)
    try:
        names = next(rows, [])
        wanted = [*fields, *([only[0]] if only else [])]
        places = [_place(names, field, file) for field in wanted]
        for row in rows:
            if not row:
                continue
            where = f"{file}, line {rows.line_num},"
            if len(row) != len(names):
                raise ConfigError(f"{where} must have {len(names)} columns, as the first row has, and has {len(row)}")
            values = [row[place] for place in places]
            if only is None or values[-1] == only[1]:
                yield records.Record(rows.line_num, values[: len(fields)], f"{where} column")
    except csv.Error as error:
        raise ConfigError(f"{file}, line {rows.line_num}, must be a row of a table: {error}") from None
    except OSError as error:
        line = rows.line_num
        raise ConfigError(f"{file} must be whole and readable, but after line {line}: {error.strerror}") from None


def num_table_rows(path: Path) -> int:
    """The rows below the names of a file that `table_rows` has read."""
    return sum(1 for _ in table_rows(path, [], ""))


def _lines(path: Path, file: str) -> Iterator[str]:
    for number, line in enumerate(compression.lines(path), 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            reason = f"{error.reason} at byte {error.start}"
            raise ConfigError(f"{file}, line {number}, must be UTF-8: {reason}") from None
        yield f"{text}\n"


def _is_tabbed(path: Path) -> bool:
    return ".tsv" in path.suffixes


def _place(names: Sequence[str], field: str, file: str) -> int:
    count = names.count(field)
    if count == 1:
        return names.index(field)
    listed = ", ".join(map(shown, names[:8])) or "none"
    what = f"it has {listed}" if count == 0 else f"it has it {count} times"
    raise ConfigError(f"{file} must have the column {shown(field)} once in its first row: {what}")
