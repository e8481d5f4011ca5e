"""Where text comes from: a source yields documents, always in the same order.

A source is named by a string: `python-stdlib`, or `KIND:ADDRESS` such as `text:GLOB`. Adding a kind means
adding one function to `SOURCES`; nothing else in the library knows where text comes from.
"""

import difflib
import glob
import os
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tfdp.config import require
from tfdp.exits import ConfigError


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
        near = difflib.get_close_matches(kind, SOURCES, n=1)
        hint = f"did you mean {near[0]}?" if near else "try text:PATH/*.txt"
        raise ConfigError(f"{key} ({source}) must be python-stdlib or text:GLOB: {hint}")
    return SOURCES[kind](address, key)


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
    paths = sorted(path for path in glob.glob(pattern, recursive=True) if not Path(path).is_dir())
    require(bool(paths), key, f"text:{pattern}", "must match at least one file: check the path, and quote the pattern")
    root = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    for path in paths:
        name = os.path.relpath(os.path.abspath(path), root)
        yield Document(os.fsencode(name).decode("utf-8", "backslashreplace"), _read_utf8(Path(path), key))


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
}
