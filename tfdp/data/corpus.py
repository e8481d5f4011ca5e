"""Where text comes from: a source yields documents, always in the same order.

A source is named by a string: `python-stdlib`, or `KIND:ADDRESS`:

    text:GLOB               UTF-8 files, one document each
    jsonl:GLOB[:FIELD][:KEY=VALUE]      JSON objects, one a line; FIELD is text by default
    parquet:GLOB[:COLUMN][:KEY=VALUE]   Parquet tables; COLUMN is text by default
    csv:GLOB[:COLUMN][:KEY=VALUE]       tables of text with a first row of names: commas, or tabs in files .tsv
    tfds:NAME[/CONFIG][:SPLIT][:FIELD]   a data set of TensorFlow Datasets, or the folder of a prepared one

KEY=VALUE takes the records with that value alone, such as one class: classes are weighted as the sources of a mixture
are, and need no field of their own in the shards. Where several fields of a record become one document
(`examples.py`), FIELD is left out.
`addresses.py` has the grammar, `inputs.py` says which files a GLOB means, and `compression.py` which compressed ones
are read.
Adding a kind means adding one function to `SOURCES`, or to `_RECORDS` where it has records; nothing else in the library
knows where text comes from.
"""

import os
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tfdp.data import addresses, compression, datasets, inputs, records
from tfdp.data.examples import Form, OneField
from tfdp.data.json_lines import json_lines, num_json_lines
from tfdp.data.parquet import num_parquet_rows, parquet_rows
from tfdp.data.tables import num_table_rows, table_rows
from tfdp.system.exits import ConfigError, require
from tfdp.system.messages import nearest, shown


@dataclass(frozen=True)
class Document:
    """One text and the name it is known by, which decides its place in the order and its split."""

    name: str
    text: str


def documents(source: str, key: str = "data.source", form: Form | None = None) -> Iterator[Document]:
    """Yields the documents of a source in its fixed order.

    Args:
      source: as `data.source` has it.
      key: the configuration key to blame in an error.
      form: that makes documents of records; None: one field is the text.

    Raises:
      ConfigError: an unknown kind, a missing file, or a file that is not UTF-8 (naming file and byte).
    """
    require(
        "\0" not in source and _is_unicode(source), key, source, "must be UTF-8 without NUL: match such names by * or ?"
    )
    kind, _, address = source.partition(":")
    if kind not in SOURCES:
        near = nearest(kind, SOURCES)
        hint = f"did you mean {near}?" if near else "try text:PATH/*.txt"
        raise ConfigError(f"{key} ({shown(source)}) must begin with one of {', '.join(SOURCES)}: {hint}")
    if form is None:
        return SOURCES[kind](address, key)
    kinds = [*_RECORDS, "tfds"]
    rule = f"must have records with fields, one of {', '.join(kinds)}, where it is to give examples"
    require(kind in kinds, key, source, rule)
    parse = datasets.parse if kind == "tfds" else addresses.parse
    is_bare = parse(address, key).field is None
    require(is_bare, key, source, "must name no field: data.input_field and its like do")
    return _tfds(address, key, form) if kind == "tfds" else _records(kind, address, key, form)


def records_of(kind: str, path: Path, fields: Sequence[str], key: str) -> Iterator[records.Record]:
    """The records of one file of a kind of source. Raises `ConfigError` for what cannot be read."""
    require(path.is_file(), key, str(path), "must be a file")
    return _RECORDS[kind].read(path, fields, key, None)


def licence_of(source: str) -> str | None:
    """The licence of a source's text as an SPDX identifier, where it is known."""
    return "PSF-2.0" if source == "python-stdlib" else None


def files_pattern(source: str, key: str) -> str | None:
    """The glob pattern of the files that a source reads; None where it names none."""
    kind, _, address = source.partition(":")
    if kind == "text":
        return address
    return addresses.parse(address, key).pattern if kind in _RECORDS else None


def condition_of(source: str, key: str) -> tuple[str, str] | None:
    """The KEY and the VALUE of the records that a source takes; None where it takes all."""
    kind, _, address = source.partition(":")
    return addresses.parse(address, key).only if kind in _RECORDS else None


def num_records(source: str, key: str) -> int:
    """The records in the files of a source that has any, whatever its condition."""
    kind, _, address = source.partition(":")
    return sum(_RECORDS[kind].count(path) for _, path in _files(addresses.parse(address, key).pattern, key, source))


def _python_stdlib(address: str, key: str) -> Iterator[Document]:
    """The standard library of the running Python, by module name, its tests left out."""
    require(not address, key, f"python-stdlib:{address}", "must have nothing after python-stdlib")
    root = Path(sysconfig.get_paths()["stdlib"])
    excluded = {"test", "tests", "idle_test", "__pycache__"}
    for module in sorted(sys.stdlib_module_names):
        paths = [root / f"{module}.py", *sorted((root / module).rglob("*.py"))]
        for path in paths:
            relative = path.relative_to(root)
            if path.is_file() and not excluded.intersection(relative.parts):
                yield Document(relative.as_posix(), _read_utf8(path, key))


def _text_files(pattern: str, key: str) -> Iterator[Document]:
    """UTF-8 files that match a glob pattern (`**` crosses folders), one document each, sorted by path.

    A document's name is its path below the folder that all of them share, so it survives a move of that folder.
    """
    for name, path in _files(pattern, key, f"text:{pattern}"):
        yield Document(name, _read_utf8(path, key))


def _records(kind: str, address: str, key: str, form: Form | None = None) -> Iterator[Document]:
    """Documents of the records in the files that match a glob pattern: one field of each, or what a form makes.

    A document is named FILE:NUMBER, by its line or its row.
    """
    parts = addresses.parse(address, key)
    form = form or OneField(parts.field or addresses.DEFAULT_FIELD)
    for name, path in _files(parts.pattern, key, f"{kind}:{address}"):
        for number, values, where in _RECORDS[kind].read(path, form.fields, key, parts.only):
            yield Document(f"{name}:{number}", form.text(values, where))


def _tfds(address: str, key: str, form: Form | None = None) -> Iterator[Document]:
    """Documents of a data set of TensorFlow Datasets: one feature of each record, or what a form makes.

    A document is named by its place in the split.
    """
    if form is None:
        for number, text in datasets.examples(address, key):
            yield Document(str(number), text)
        return
    for number, values, where in datasets.dataset_records(address, form.fields, key):
        yield Document(str(number), form.text(values, where))


def _files(pattern: str, key: str, source: str) -> list[tuple[str, Path]]:
    """The files that a pattern matches, sorted by path, with their names below the folder that all share."""
    paths = inputs.find(pattern, key, source)
    root = inputs.common_folder(paths)
    names = [os.path.relpath(os.path.abspath(path), root) for path in paths]
    visible = [os.fsencode(name).decode("utf-8", "backslashreplace") for name in names]
    return [(name, Path(path)) for name, path in zip(visible, paths, strict=True)]


def _read_utf8(path: Path, key: str) -> str:
    try:
        data = b"".join(compression.chunks(path))
    except OSError as error:
        raise ConfigError(f"{key}: {shown(path)} must be readable: {error.strerror}") from None
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{key}: {shown(path)} must be UTF-8: byte {error.start} is 0x{data[error.start]:02x} ({error.reason}); "
            f"convert the file with `iconv -t UTF-8`"
        ) from None


def _is_unicode(text: str) -> bool:
    return not any(0xD800 <= ord(char) < 0xE000 for char in text)


class _Kind(NamedTuple):
    """How the records of a kind of file are read, and counted."""

    read: Callable[[Path, Sequence[str], str, records.Condition], Iterator[records.Record]]
    count: Callable[[Path], int]


_RECORDS = {
    "jsonl": _Kind(json_lines, num_json_lines),
    "parquet": _Kind(parquet_rows, num_parquet_rows),
    "csv": _Kind(table_rows, num_table_rows),
}
SOURCES: dict[str, Callable[[str, str], Iterator[Document]]] = {
    "python-stdlib": _python_stdlib,
    "text": _text_files,
    **{kind: partial(_records, kind) for kind in _RECORDS},
    "tfds": _tfds,
}
