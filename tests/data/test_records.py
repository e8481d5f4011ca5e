"""JSON lines and Parquet: what is text, and what is a mistake in one line."""

import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from tfdp.data.corpus import documents
from tfdp.system.exits import ConfigError

TEXTS = ["first", "", "é 👩‍👧 \r\n\t\0", "x" * 100_000]
LINES = "".join(json.dumps({"text": text, "meta": {"title": f"<{text[:1]}>"}}) + "\n" for text in TEXTS).encode()


def texts(source: str) -> list[str]:
    return [document.text for document in documents(source)]


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.xz", "jsonl.zst"])
def test_json_lines_of_every_compression(tmp_path: Path, suffix: str) -> None:
    compress = {"gz": gzip.compress, "xz": lzma.compress, "zst": zstandard.compress}.get(suffix[-3:].lstrip("."), bytes)
    (tmp_path / f"b.{suffix}").write_bytes(compress(LINES))
    (tmp_path / f"a.{suffix}").write_bytes(compress(LINES))
    assert texts(f"jsonl:{tmp_path}/*.{suffix}") == TEXTS * 2
    assert texts(f"jsonl:{tmp_path}/a.{suffix}:meta.title") == [f"<{text[:1]}>" for text in TEXTS]
    names = [document.name for document in documents(f"jsonl:{tmp_path}/*.{suffix}")]
    assert names == [f"{file}.{suffix}:{line}" for file in "ab" for line in (1, 2, 3, 4)]


def test_empty_lines_and_a_last_line_without_its_end(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "1"}\n\n  \n{"text": "2"}')
    assert [(document.name, document.text) for document in documents(f"jsonl:{tmp_path}/a.jsonl")] == [
        ("a.jsonl:1", "1"),
        ("a.jsonl:4", "2"),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": "b"', r"a\.jsonl, line 2, must be one JSON object: "),
        (b'{"text": "a"}\n{"body": "b", "id": 1}\n', r"line 2, must have the field text: it has body, id; name one as"),
        (b'{"text": 3}\n', r"line 1, field text must be text, and is int"),
        (b'{"text": null}\n', r"line 1, field text must be text, and is null"),
        (b"[1]\n", r"line 1, must be a JSON object with the field text, and is list"),
        (b'{"text": "\xff"}\n', r"line 1, must be UTF-8"),
        (b'{"text": "\\ud800"}\n', r"line 1, field text must be Unicode: half of a surrogate pair at character 0"),
        (b"[" * 100_000 + b"\n", r"line 1, must be one JSON object"),
        (b"\0\0\0\n", r"line 1, must be one JSON object"),
        (
            b'{"text": "a"}\n{"text": "b", "id": 1, "text": "c"}\n',
            r"line 2, must be one JSON object: the key text stands",
        ),
        (b'{"text": "a", "m": [{"x": 1, "x": 2}]}\n', r"line 1, must be one JSON object: the key x stands there twice"),
        (
            b'{"text": ' + b"[" * 2000 + b"]" * 2000 + b"}\n",
            r"line 1, must be one JSON object: its brackets are nested",
        ),
        (b'{"text": ' + b"9" * 400 + b"}\n", r"line 1, field text must be text, and is int"),
        (b'{"text": ' + b"9" * 5000 + b"}\n", r"line 1, must be one JSON object: Exceeds the limit"),
        (b'{"a\\nb": "a"}\n', r"line 1, must have the field text: it has a\\nb; name one as"),
        (b'{"' + b"k" * 5000 + b'": "a"}\n', r"line 1, must have the field text: it has k+\.\.\.k+; name one as"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        texts(f"jsonl:{tmp_path}/a.jsonl")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("suffix", "compress"), [("gz", gzip.compress), ("xz", lzma.compress), ("zst", zstandard.compress)]
)
@pytest.mark.parametrize("damage", ["cut", "flip", "none at all"])
def test_damaged_compression_is_an_error_and_no_end(tmp_path: Path, suffix: str, compress: object, damage: str) -> None:
    random_lines = b"".join(json.dumps({"text": str(number**7)}).encode() + b"\n" for number in range(20_000))
    data = bytearray(compress(random_lines))  # type: ignore[operator]
    if damage == "cut":
        data = data[: len(data) // 2]
    elif damage == "flip":
        data[len(data) // 2 :] = bytes(value ^ 0x55 for value in data[len(data) // 2 :])
    else:
        data = bytearray(random_lines)
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=rf"{path}(, line \d+, must| must be whole and readable, but after line \d+)"):
        texts(f"jsonl:{path}")


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    for name, part in (("a", TEXTS[:2]), ("b", TEXTS[2:])):
        columns = {"text": part, "id": list(range(len(part))), "body": [text.encode() for text in part]}
        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / f"{name}.parquet", row_group_size=1)
    return tmp_path


def test_parquet_tables(tables: Path) -> None:
    assert texts(f"parquet:{tables}/*.parquet") == TEXTS
    assert texts(f"parquet:{tables}/*.parquet:body") == TEXTS
    names = [document.name for document in documents(f"parquet:{tables}/*.parquet")]
    assert names == ["a.parquet:1", "a.parquet:2", "b.parquet:1", "b.parquet:2"]


def test_parquet_mistakes_are_one_line(tables: Path) -> None:
    def message(source: str) -> str:
        with pytest.raises(ConfigError) as caught:
            texts(source)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "a.parquet must have the column nope: it has text, id, body" in message(f"parquet:{tables}/*.parquet:nope")
    assert "a.parquet, row 1, column id must be text, and is int" in message(f"parquet:{tables}/*.parquet:id")
    data = (tables / "b.parquet").read_bytes()
    (tables / "b.parquet").write_bytes(data[: len(data) // 2])
    assert "b.parquet must be a whole Parquet file" in message(f"parquet:{tables}/*.parquet")
    (tables / "b.parquet").write_bytes(b"")
    assert "b.parquet must be a whole Parquet file" in message(f"parquet:{tables}/*.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None]}), tables / "b.parquet")
    assert "b.parquet, row 2, column text must be text, and is null" in message(f"parquet:{tables}/b.parquet")
    assert "must match at least one file" in message(f"parquet:{tables}/*.jsonl")


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_records_of_one_value_alone(tmp_path: Path, kind: str) -> None:
    rows = [{"text": str(index), "label": index % 3, "word": "ab"[index % 2]} for index in range(7)]
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert texts(f"{kind}:{path}:text:label=1") == ["1", "4"]
    assert texts(f"{kind}:{path}:word=b") == ["1", "3", "5"]
    assert texts(f"{kind}:{path}:word:label=0") == ["a", "b", "a"]
    assert [document.name for document in documents(f"{kind}:{path}:label=2")] == [f"a.{kind}:3", f"a.{kind}:6"]
    assert texts(f"{kind}:{path}:label=7") == []
    with pytest.raises(ConfigError, match=r"must have the (field|column) none"):
        texts(f"{kind}:{path}:none=1")


def test_a_byte_order_mark_before_json_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n{"text": "\xef\xbb\xbfb"}\r\n')
    assert texts(f"jsonl:{tmp_path}/a.jsonl") == ["a", "\ufeffb"]


def nested_rows(kind: str, path: Path, rows: list[dict[str, Any]]) -> str:
    """A file of records of a kind, as a source."""
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return f"{kind}:{path}"


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_dot_is_part_of_a_name_or_leads_to_a_field_of_a_field(tmp_path: Path, kind: str) -> None:
    row = {"a.b": "literal", "a": {"b": "nested", "c.d": {"e": "below"}, "f": {"g": "deep"}}, "x.y": {"z": "mixed"}}
    source = nested_rows(kind, tmp_path / "a", [row, row])
    assert texts(f"{source}:a.b") == ["literal"] * 2
    assert texts(f"{source}:a.c.d.e") == ["below"] * 2
    assert texts(f"{source}:a.f.g") == ["deep"] * 2
    assert texts(f"{source}:x.y.z:a.c.d.e=below") == ["mixed"] * 2
    assert texts(f"{source}:a.b:x.y.z=none") == []
    for missing in ("a.x", "a.b.c", "x", "x.y.z.z", "a.c", "a..b", "."):
        with pytest.raises(
            ConfigError, match=r"(line 1,|a) must (have the (field|column)|be a JSON object with the field)"
        ):
            texts(f"{source}:{missing}")


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_names_with_blanks_and_values_with_colons_stand_in_quotes(tmp_path: Path, kind: str) -> None:
    rows = [{"Review Text": f"text {index}", "at": f"1{index}:00", "a/b": "https://x"} for index in range(3)]
    source = nested_rows(kind, tmp_path / "a", rows)
    assert texts(f'{source}:"Review Text"') == ["text 0", "text 1", "text 2"]
    assert texts(f'{source}:"Review Text":at="11:00"') == ["text 1"]
    assert texts(f'{source}:"Review Text":"a/b"="https://x"') == ["text 0", "text 1", "text 2"]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_condition_compares_any_value_as_json_writes_it(tmp_path: Path, kind: str) -> None:
    values = {
        "b": True,
        "n": None,
        "i": -3,
        "f": 0.5,
        "l": ["a", 1] if kind == "jsonl" else ["a", "b"],
        "d": {"x": 1.0},
    }
    rows = [{"text": "yes", **values}, {"text": "no", **dict.fromkeys(values), "n": None}]
    source = nested_rows(kind, tmp_path / "a", rows)
    for name, value in values.items():
        expected = ["yes", "no"] if name == "n" else ["yes"]
        assert texts(f"{source}:{name}={json.dumps(json.dumps(value))}") == expected  # in quotes: it may have a colon
    assert texts(f"{source}:b=null") == ["no"]
