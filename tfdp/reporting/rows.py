"""Rows of metrics.jsonl, one JSON object a line; and JSON that carries a checksum of itself."""

import contextlib
import json
import re
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tfdp.system.exits import TrainingError
from tfdp.system.files import write_whole

# The last key. A flipped bit either hits what it covers, and it does not match; or hits it, and what it covers is
# whole.
_CHECKSUM = re.compile(r',\s*"crc32": "([0-9a-f]{8})"(\s*)\}$')


class RowWriter:
    """Appends rows to a file. A row that cannot be written waits, and is tried again with the next one.

    Args:
      path: of the file, opened anew for each row: a run directory that was moved gets no more of them.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._waiting, self._failed = path, b"", False

    def write(self, row: Mapping[str, Any]) -> None:
        self._waiting += to_json(row).encode()
        try:
            self._append()
        except OSError as error:
            if not self._failed:
                why = error.strerror or error
                print(f"warning: {self._path} cannot be written ({why}): its rows wait", file=sys.stderr, flush=True)
            self._failed = True
        else:
            self._failed = False

    def close(self) -> None:
        if self._waiting:
            lost = self._waiting.count(b"\n")
            print(f"warning: {self._path} lacks the last {lost} rows", file=sys.stderr, flush=True)

    def _append(self) -> None:
        with self._path.open("ab", buffering=0) as file:
            end, rest = file.tell(), self._waiting
            try:
                while rest:
                    rest = rest[file.write(rest) :]
            except OSError:
                with contextlib.suppress(OSError):  # half a row, which no reader accepts
                    file.truncate(end)
                raise
        self._waiting = b""


def read_rows(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of a file, and a message for each that is damaged; a process that died may have torn its last one."""
    rows, damaged = [], []
    for number, line in enumerate(path.read_bytes().splitlines() if path.is_file() else [], 1):
        row = from_json(line)
        if row is None or type(row.get("step")) is not int:
            damaged.append(f"line {number} of {path} is not as it was written: it is skipped")
        else:
            rows.append(row)
    return rows, damaged


def drop_rows_after(path: Path, step: int) -> None:
    """Removes the rows of later steps, and with a warning those that are damaged."""
    rows, damaged = read_rows(path)
    for line in damaged:
        print(f"warning: {line}", file=sys.stderr, flush=True)
    kept = "".join(to_json(row) for row in rows if row["step"] <= step)
    try:
        if path.is_file() and kept.encode() != path.read_bytes():
            write_whole(path, kept)
    except OSError as error:
        raise TrainingError(f"{path} cannot be written: {error.strerror or error}") from None


def to_json(content: Mapping[str, Any], indent: int | None = None) -> str:
    """A JSON object with a checksum as its last key, and a line break."""
    text = json.dumps(dict(content), indent=indent)
    body, end = (text[:-1], "}") if indent is None else (text[:-2], "\n}")
    comma = ", " if indent is None else ",\n" + " " * indent
    return f'{body}{comma}"crc32": "{zlib.crc32(text.encode()):08x}"{end}\n'


def from_json(data: bytes) -> dict[str, Any] | None:
    """Reads such an object, without its checksum; None for what is not as it was written.

    What earlier versions wrote has no checksum: there, None means only that it is no JSON object.
    """
    try:
        text = data.decode().rstrip("\n")
        checksum = _CHECKSUM.search(text)
        if checksum is not None:
            text = text[: checksum.start()] + checksum.group(2) + "}"
            if zlib.crc32(text.encode()) != int(checksum.group(1), 16):
                return None
        content = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None
