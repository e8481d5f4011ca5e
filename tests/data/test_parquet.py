"""Parquet: columns of every type in a condition, fields of structs, and tables that are wrong."""

import datetime
import decimal
import random
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from tfdp.data.corpus import documents
from tfdp.system.exits import ConfigError

# What Python does not have. With pandas installed, pyarrow would make a type of pandas of it, or cut it off.
_NS = pyarrow.timestamp("ns")
NANOSECONDS = [
    (_NS, 1, "timestamp[ns]"),
    (pyarrow.timestamp("ns", "UTC"), 1, "timestamp[ns, tz=UTC]"),
    (pyarrow.time64("ns"), 1, "time64[ns]"),
    (pyarrow.duration("ns"), 1, "duration[ns]"),
    (pyarrow.list_(_NS), [1], "list<element: timestamp[ns]>"),
    (pyarrow.struct([("x", _NS)]), {"x": 1}, "struct<x: timestamp[ns]>"),
    (pyarrow.map_(pyarrow.string(), _NS), [("x", 1)], "map<string, timestamp[ns]"),
]
NOON = datetime.datetime(2026, 1, 31, 12, 0, 0)


def write(path: Path, **columns: Any) -> str:
    """A table in a file, as a source."""
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return f"parquet:{path}"


def texts(source: str) -> list[str]:
    return [document.text for document in documents(source)]


def refusal(source: str) -> str:
    with pytest.raises(ConfigError) as caught:
        texts(source)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500
    return str(caught.value)


@pytest.mark.parametrize(
    ("kind", "value", "text"),
    [
        (pyarrow.timestamp("us"), NOON, "2026-01-31T12:00:00"),
        (pyarrow.timestamp("s"), NOON, "2026-01-31T12:00:00"),
        (pyarrow.timestamp("ns"), NOON, "2026-01-31T12:00:00"),
        (pyarrow.timestamp("ms", "UTC"), NOON.replace(tzinfo=datetime.UTC), "2026-01-31T12:00:00+00:00"),
        (pyarrow.timestamp("us"), NOON.replace(microsecond=1), "2026-01-31T12:00:00.000001"),
        (pyarrow.date32(), NOON.date(), "2026-01-31"),
        (pyarrow.time64("us"), NOON.time(), "12:00:00"),
        (pyarrow.time64("ns"), NOON.time(), "12:00:00"),
        (pyarrow.decimal128(9, 2), decimal.Decimal("1.5"), "1.50"),
        (pyarrow.decimal128(20, 10), decimal.Decimal("1E-10"), "0.0000000001"),
        (pyarrow.binary(), b"caf\xc3\xa9", "café"),
        (pyarrow.binary(2), b"ab", "ab"),
        (pyarrow.bool_(), True, "true"),
        (pyarrow.int8(), -3, "-3"),
        (pyarrow.uint64(), 2**64 - 1, "18446744073709551615"),
        (pyarrow.float64(), 0.5, "0.5"),
        (pyarrow.float32(), 2.0, "2.0"),
        (pyarrow.null(), None, "null"),
        (pyarrow.list_(pyarrow.int64()), [1, 2], "[1, 2]"),
        (pyarrow.list_(_NS), [NOON], '["2026-01-31T12:00:00"]'),
        (pyarrow.list_(pyarrow.date32()), [NOON.date()], '["2026-01-31"]'),
        (pyarrow.struct([("x", pyarrow.decimal128(3, 1))]), {"x": decimal.Decimal("2.0")}, '{"x": "2.0"}'),
        (pyarrow.dictionary(pyarrow.int8(), pyarrow.string()), "é", "é"),
        (pyarrow.large_string(), "é", "é"),
    ],
)
def test_a_condition_on_a_column_of_any_type(tmp_path: Path, kind: Any, value: Any, text: str) -> None:
    source = write(tmp_path / "a", text=["first", "second"], key=pyarrow.array([value, None], kind))
    quoted = '"' + text.replace('"', '\\"') + '"'
    assert texts(f"{source}:key={quoted}") == (["first"] if value is not None else ["first", "second"])
    assert texts(f"{source}:key=null") == (["second"] if value is not None else ["first", "second"])
    assert texts(f"{source}:key=something else") == []


@pytest.mark.parametrize(
    ("kind", "value", "reason"),
    [
        (pyarrow.duration("s"), datetime.timedelta(1), "a value that has a text to compare, and is timedelta"),
        (pyarrow.duration("ns"), 1000, "a value that has a text to compare, and is timedelta"),
        (pyarrow.timestamp("s"), 10**15, "a value that has a text, and is timestamp"),
        *((kind, value, f"a value that has a text, and is {told}") for kind, value, told in NANOSECONDS),
    ],
)
def test_a_value_without_a_text_is_one_line(tmp_path: Path, kind: Any, value: Any, reason: str) -> None:
    source = write(tmp_path / "a", text=["a"], key=pyarrow.array([value], kind))
    assert f"{tmp_path}/a, row 1, column key must be {reason}" in refusal(f"{source}:key=1")


@pytest.mark.parametrize(
    ("kind", "value", "reason"),
    [
        (pyarrow.timestamp("ns"), 1000, "text, and is datetime"),
        (pyarrow.duration("ns"), 1000, "text, and is timedelta"),
        (pyarrow.timestamp("s"), 10**15, "a value that has a text, and is timestamp"),
        *((kind, value, f"a value that has a text, and is {told}") for kind, value, told in NANOSECONDS),
    ],
)
def test_a_column_that_is_no_text_is_one_line(tmp_path: Path, kind: Any, value: Any, reason: str) -> None:
    source = write(tmp_path / "a", key=pyarrow.array([value], kind))
    assert f"{tmp_path}/a, row 1, column key must be {reason}" in refusal(f"{source}:key")


def test_bytes_that_are_no_utf8_equal_no_text(tmp_path: Path) -> None:
    source = write(tmp_path / "a", text=["a", "b"], key=[b"\xff", b"b"])
    assert texts(f"{source}:key=b") == ["b"]
    assert texts(f"{source}:key=\\xff") == []


def test_a_column_that_is_there_twice(tmp_path: Path) -> None:
    table = pyarrow.table([["a"], ["b"], ["c"]], names=["text", "text", "other"])
    pyarrow.parquet.write_table(table, tmp_path / "a")
    assert texts(f"parquet:{tmp_path}/a:other") == ["c"]
    told = f"{tmp_path}/a must have the column text once, and has it 2 times: rename one"
    assert told in refusal(f"parquet:{tmp_path}/a")
    assert told in refusal(f"parquet:{tmp_path}/a:other:text=a")


def test_a_field_of_a_struct_that_is_null_is_null(tmp_path: Path) -> None:
    kind = pyarrow.struct([("text", pyarrow.string()), ("n", pyarrow.int64())])
    source = write(tmp_path / "a", a=pyarrow.array([{"text": "one", "n": 1}, None, {"text": "three"}], kind))
    assert texts(f"{source}:a.text:a.n=1") == ["one"]
    assert "row 2, column a.text must be text, and is null" in refusal(f"{source}:a.text:a.n=null")
    assert "row 1, column a must be text, and is dict" in refusal(f"{source}:a")


def test_a_damaged_table_raises_no_more_than_one_line(tmp_path: Path) -> None:
    """Pages have no checksum unless the writer is told so: a flip inside of a text may go unnoticed."""
    source = write(tmp_path / "a", text=[f"text {number}" for number in range(200)], key=list(range(200)))
    whole = (tmp_path / "a").read_bytes()
    rng = random.Random(0)
    num_refused = 0
    for _ in range(200):
        data = bytearray(whole)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        (tmp_path / "a").write_bytes(data if rng.random() < 0.7 else data[: rng.randrange(len(data))])
        try:
            texts(f"{source}:text:key=7")
        except ConfigError as error:
            assert str(error).isprintable()
            num_refused += 1
    assert num_refused > 60
