"""Where text comes from: a source yields documents, always in the same order.

A source is named by a string: `python-stdlib`, or `KIND:ADDRESS`:

    text:GLOB               UTF-8 files, one document each
    jsonl:GLOB[:FIELD][:KEY=VALUE]      JSON objects, one a line, plain, .gz, .xz or .zst; FIELD is text by default
    parquet:GLOB[:COLUMN][:KEY=VALUE]   Parquet tables; COLUMN is text by default
    tfds:NAME[/CONFIG][:SPLIT][:FIELD]   a data set of TensorFlow Datasets, or the folder of a prepared one

KEY=VALUE takes the records with that value alone, such as one class: classes are weighed as sources of a mixture are.
Adding a kind means adding one function to `SOURCES`; nothing else in the library knows where text comes from.
"""

import glob
import os
import re
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tfdp.config import require
from tfdp.exits import ConfigError
from tfdp.messages import nearest, shown
from tfdp.records import DEFAULT_FIELD, json_lines, parquet_rows


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
    kind, _, address = source.partition(":")
    if kind not in SOURCES:
        near = nearest(kind, SOURCES)
        hint = f"did you mean {near}?" if near else "try text:PATH/*.txt"
        raise ConfigError(f"{key} ({shown(source)}) must begin with one of {', '.join(SOURCES)}: {hint}")
    return SOURCES[kind](address, key)


def licence_of(source: str) -> str | None:
    """The licence of a source's text as an SPDX identifier, where it is known."""
    return "PSF-2.0" if source == "python-stdlib" else None


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
    pattern, field, only = _pattern_and_field(address)
    for name, path in _files(pattern, key, f"jsonl:{address}"):
        for number, text in json_lines(path, field, key, only):
            yield Document(f"{name}:{number}", text)


def _parquet(address: str, key: str) -> Iterator[Document]:
    """One column of the Parquet files that match a glob pattern; a document is named FILE:ROW."""
    pattern, column, only = _pattern_and_field(address)
    for name, path in _files(pattern, key, f"parquet:{address}"):
        for number, text in parquet_rows(path, column, key, only):
            yield Document(f"{name}:{number}", text)


def _tfds(address: str, key: str) -> Iterator[Document]:
    """One feature of a data set of TensorFlow Datasets; a document is named by its place in the split."""
    from tfdp.datasets import examples

    for number, text in examples(address, key):
        yield Document(str(number), text)


def _pattern_and_field(address: str) -> tuple[str, str, tuple[str, str] | None]:
    """Splits GLOB[:FIELD][:KEY=VALUE]; what follows a colon is one of the two if it could not be part of a path."""
    only = None
    if condition := re.fullmatch(r"(.+):([\w.-]+)=([^:/]*)", address):
        address, only = condition[1], (condition[2], condition[3])
    pattern, _, field = address.rpartition(":")
    named = bool(pattern and re.fullmatch(r"[\w.-]+", field))
    return (pattern, field, only) if named else (address, DEFAULT_FIELD, only)


def _files(pattern: str, key: str, source: str) -> list[tuple[str, Path]]:
    """The files that match a glob pattern, sorted by path, with their names below the folder that all share."""
    paths = sorted(path for path in glob.glob(pattern, recursive=True) if not Path(path).is_dir())
    require(bool(paths), key, source, "must match at least one file: check the path, and quote the pattern")
    root = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    names = [os.path.relpath(os.path.abspath(path), root) for path in paths]
    shown = [os.fsencode(name).decode("utf-8", "backslashreplace") for name in names]
    return [(name, Path(path)) for name, path in zip(shown, paths, strict=True)]


def _read_utf8(path: Path, key: str) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{key}: {path} must be readable: {error.strerror}") from None
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{key}: {path} must be UTF-8: byte {error.start} is 0x{data[error.start]:02x} ({error.reason}); "
            f"convert the file with `iconv -t UTF-8`"
        ) from None


SOURCES: dict[str, Callable[[str, str], Iterator[Document]]] = {
    "python-stdlib": _python_stdlib,
    "text": _text_files,
    "jsonl": _json_lines,
    "parquet": _parquet,
    "tfds": _tfds,
}
