"""Records in Parquet tables: columns, or fields of columns of structs."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tfdp.data import records
from tfdp.system.exits import ConfigError
from tfdp.system.messages import one_line, shown


def parquet_rows(
    path: Path, fields: Sequence[str], key: str, only: records.Condition = None
) -> Iterator[records.Record]:
    """Yields the records of a Parquet file; memory holds one batch of rows.

    Args:
      path: of the file.
      fields: whose values are wanted; a.b is the column a.b, else the field b of the column of structs a.
      key: the configuration key to blame.
      only: which rows to take, by what `records.compared` makes of a value.

    Raises:
      ConfigError: what is wrong, with file and row.
    """
    import pyarrow
    import pyarrow.parquet

    number = 0
    where = f"{key}: {shown(path)}"
    try:
        with contextlib.closing(pyarrow.parquet.ParquetFile(path)) as file:
            names = [*fields, *([only[0]] if only else [])]
            places = [_place(list(file.schema_arrow), name, where) for name in names]
            columns = [place[0] for place in places]
            for batch in file.iter_batches(batch_size=1024, columns=columns):
                found = [_values(batch, place) for place in places]
                for row in range(len(batch)):
                    number += 1
                    place = f"{where}, row {number}, column"
                    if only is None or _compared(found[-1][row], f"{place} {shown(only[0])}") == only[1]:
                        values = [_from_arrow(each[row]) for each in found[: len(fields)]]
                        yield records.Record(number, values, place)
    except (pyarrow.ArrowException, OSError) as error:
        message = one_line(" ".join(str(error).split()))
        raise ConfigError(f"{where} must be a whole Parquet file, but after row {number}: {message}") from None


def num_parquet_rows(path: Path) -> int:
    """The rows of a file that `parquet_rows` has read."""
    import pyarrow.parquet

    return int(pyarrow.parquet.read_metadata(path).num_rows)


def _place(fields: Sequence[Any], name: str, where: str) -> list[str]:
    """The names that lead to a column, or to a field of it. Raises `ConfigError` for one that is not there or twice."""
    place = _find(fields, name)
    if place is None:
        listed = ", ".join(shown(field.name) for field in fields[:8]) or "none"
        raise ConfigError(
            f"{where} must have the column {shown(name)}: it has {listed}; name one as parquet:GLOB:COLUMN"
        )
    for part in place:
        same = [field for field in fields if field.name == part]
        if len(same) > 1:
            raise ConfigError(
                f"{where} must have the column {shown(name)} once, and has it {len(same)} times: rename one"
            )
        fields = _fields_of(same[0].type)
    return place


def _find(fields: Sequence[Any], name: str) -> list[str] | None:
    names = [field.name for field in fields]
    if name in names:
        return [name]
    for first, rest in records.splits(name):
        for field in fields:
            if field.name == first and (found := _find(_fields_of(field.type), rest)):
                return [first, *found]
    return None


def _fields_of(kind: Any) -> list[Any]:
    import pyarrow

    return list(kind) if pyarrow.types.is_struct(kind) else []


def _values(batch: Any, place: list[str]) -> Any:
    """The array of values at a place; a field of a struct that is null is null."""
    import pyarrow.compute

    first, *rest = place
    array = batch.column(first)
    for name in rest:
        array = pyarrow.compute.struct_field(array, [array.type.get_field_index(name)])
    return array


def _from_arrow(value: Any) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        return error


def _compared(value: Any, where: str) -> str:
    try:
        return records.compared(value.as_py(), where)
    except UnicodeDecodeError:
        return "\udcff"  # no text equals it
    except (ValueError, OverflowError, KeyError) as error:
        if isinstance(error, ConfigError):
            raise
        reason = one_line(" ".join(str(error).split()))[:200]
        raise ConfigError(
            f"{where} must be a value that has a text to compare, and is {value.type}: {reason}"
        ) from None
