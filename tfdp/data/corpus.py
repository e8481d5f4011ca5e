"""Where text comes from: a source yields documents, always in the same order.

A source is named by a string: `python-stdlib`, or `KIND:ADDRESS`:

    text:GLOB               UTF-8 files, one document each
    jsonl:GLOB[:FIELD][:KEY=VALUE]      JSON objects, one a line; FIELD is text by default
    parquet:GLOB[:COLUMN][:KEY=VALUE]   Parquet tables; COLUMN is text by default
    tfds:NAME[/CONFIG][:SPLIT][:FIELD]   a data set of TensorFlow Datasets, or the folder of a prepared one

KEY=VALUE takes the records with that value alone, such as one class: classes are weighted as the sources of a mixture
are, and need no field of their own in the shards.
`addresses.py` has the grammar, `inputs.py` says which files a GLOB means, and `compression.py` which compressed ones
are read.
Adding a kind means adding one function to `SOURCES`; nothing else in the library knows where text comes from.
"""

import os
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tfdp.data import addresses, compression, inputs
from tfdp.data.json_lines import json_lines, num_json_lines
from tfdp.data.parquet import num_parquet_rows, parquet_rows
from tfdp.system.exits import ConfigError, require
from tfdp.system.messages import nearest, shown


@dataclass(frozen=True)
class Document:
    """One text and the name it is known by, which decides its place in the order and its split."""

    name: str
    text: str


def documents(source: str, key: str = "data.source") -> Iterator[Document]:
    """Yields the documents of a source in its fixed order.

    Args:
      source: as `data.source` has it.
      key: the configuration key to blame in an error.

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
    return SOURCES[kind](address, key)


def licence_of(source: str) -> str | None:
    """The licence of a source's text as an SPDX identifier, where it is known."""
    return "PSF-2.0" if source == "python-stdlib" else None


def files_pattern(source: str, key: str) -> str | None:
    """The glob pattern of the files that a source reads; None where it names none."""
    kind, _, address = source.partition(":")
    if kind == "text":
        return address
    return addresses.parse(address, key).pattern if kind in ("jsonl", "parquet") else None


def condition_of(source: str, key: str) -> tuple[str, str] | None:
    """The KEY and the VALUE of the records that a source takes; None where it takes all."""
    kind, _, address = source.partition(":")
    return addresses.parse(address, key).only if kind in ("jsonl", "parquet") else None


def num_records(source: str, key: str) -> int:
    """The records in the files of a jsonl or parquet source, whatever its condition."""
    kind, _, address = source.partition(":")
    count = num_json_lines if kind == "jsonl" else num_parquet_rows
    return sum(count(path) for _, path in _files(addresses.parse(address, key).pattern, key, source))


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


def _json_lines(address: str, key: str) -> Iterator[Document]:
    """One field of the JSON objects in the files that match a glob pattern; a document is named FILE:LINE."""
    parts = addresses.parse(address, key)
    for name, path in _files(parts.pattern, key, f"jsonl:{address}"):
        for number, text in json_lines(path, parts.field, key, parts.only):
            yield Document(f"{name}:{number}", text)


def _parquet(address: str, key: str) -> Iterator[Document]:
    """One column of the Parquet files that match a glob pattern; a document is named FILE:ROW."""
    parts = addresses.parse(address, key)
    for name, path in _files(parts.pattern, key, f"parquet:{address}"):
        for number, text in parquet_rows(path, parts.field, key, parts.only):
            yield Document(f"{name}:{number}", text)


def _tfds(address: str, key: str) -> Iterator[Document]:
    """One feature of a data set of TensorFlow Datasets; a document is named by its place in the split."""
    from tfdp.data.datasets import examples

    for number, text in examples(address, key):
        yield Document(str(number), text)


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


SOURCES: dict[str, Callable[[str, str], Iterator[Document]]] = {
    "python-stdlib": _python_stdlib,
    "text": _text_files,
    "jsonl": _json_lines,
    "parquet": _parquet,
    "tfds": _tfds,
}
