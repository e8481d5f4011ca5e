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
                kinds = [_in_microseconds(each.type) for each in found]
                for row in range(len(batch)):
                    number += 1
                    place = f"{where}, row {number}, column"
                    if only is None or _compared(found[-1][row], kinds[-1], f"{place} {shown(only[0])}") == only[1]:
                        wanted = zip(fields, found, kinds, strict=False)  # without that of the condition
                        values = [_python(each[row], kind, place, field) for field, each, kind in wanted]
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


def _compared(value: Any, kind: Any, where: str) -> str:
    found = _python(value, kind, where)
    return "\udcff" if isinstance(found, UnicodeDecodeError) else records.compared(found, where)  # no text equals it


def _python(value: Any, kind: Any, place: str, field: str | None = None) -> Any:
    """The value as Python has it, the same with and without pandas; bytes that are no UTF-8 as the error that they are.

    pyarrow makes types of pandas of nanoseconds where it is installed, and cuts those of a time of day off.

    Args:
      value: in the types of pyarrow.
      kind: what `_in_microseconds` makes of its type.
      place, field: of it, for messages.

    Raises:
      ConfigError: Python has no such value.
    """
    try:
        return (value if kind is None else value.cast(kind)).as_py()
    except UnicodeDecodeError as error:
        return error
    except (ValueError, OverflowError, KeyError) as error:
        reason = one_line(" ".join(str(error).split()))[:200]
        where = place if field is None else f"{place} {shown(field)}"
        raise ConfigError(f"{where} must be a value that has a text, and is {value.type}: {reason}") from None


def _in_microseconds(kind: Any) -> Any:
    """A type with microseconds in place of nanoseconds, which Python does not have; None for one without these."""
    return _replaced(kind) if "[ns" in str(kind) else None


def _replaced(kind: Any) -> Any:
    import pyarrow
    from pyarrow import types

    if types.is_struct(kind):
        return pyarrow.struct([field.with_type(_replaced(field.type)) for field in kind])
    if types.is_map(kind):
        return pyarrow.map_(_replaced(kind.key_type), _replaced(kind.item_type))
    if types.is_list(kind):
        return pyarrow.list_(_replaced(kind.value_type))
    if types.is_large_list(kind):
        return pyarrow.large_list(_replaced(kind.value_type))
    if types.is_fixed_size_list(kind):
        return pyarrow.list_(_replaced(kind.value_type), kind.list_size)
    if types.is_dictionary(kind):
        return _replaced(kind.value_type)
    if getattr(kind, "unit", None) != "ns":
        return kind
    if types.is_timestamp(kind):
        return pyarrow.timestamp("us", kind.tz)
    return pyarrow.time64("us") if types.is_time64(kind) else pyarrow.duration("us")
