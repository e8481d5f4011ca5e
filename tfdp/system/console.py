"""Reliable stdout and stderr, whatever the caller has made of them.

A run must not end because nobody reads its lines, so output that cannot be written is discarded. A command whose output
is its result must end instead, with an exit code that says so.
"""

import contextlib
import io
import os
import select
import sys
from typing import Any, TextIO


class OutputLost(Exception):
    """The result of a command cannot be written; `is_closed` if its reader is gone, which is no error to report."""

    def __init__(self, error: OSError) -> None:
        super().__init__(f"output could not be written: {error.strerror}")
        self.is_closed = isinstance(error, BrokenPipeError)


def prepare(is_result: bool) -> None:
    """Makes stdout and stderr safe to write to, for Python and for native libraries. Call it before files are opened.

    Args:
      is_result: whether `print` raises `OutputLost` if stdout cannot be written; otherwise it discards its output,
        after a note on stderr.

    A closed descriptor becomes /dev/null: the next file to be opened would take its number, and receive what is
    printed. Characters outside the terminal's encoding become backslash escapes.
    """
    _open_closed_descriptors()
    sys.stdout = _safe(sys.stdout, 1, is_result)
    sys.stderr = _safe(sys.stderr, 2, False)


def flush() -> None:
    """Writes what is buffered. Raises `OutputLost` as `print` does."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(ValueError):  # closed by the command itself
            stream.flush()


def say(line: str) -> None:
    """Prints a line to the console at once."""
    print(line, flush=True)


class _Output(io.FileIO):
    """A descriptor whose first failed write turns it into /dev/null."""

    def __init__(self, descriptor: int, is_result: bool) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._is_result = is_result

    def write(self, data: Any) -> int:  # all of it, unlike FileIO
        rest = memoryview(data).cast("B")
        size = len(rest)
        try:
            while rest:
                written = super().write(rest)
                if written is None:  # a pipe that does not block, and is full
                    select.select([], [self.fileno()], [])
                rest = rest[written or 0 :]
        except OSError as error:
            self._discard_output()
            if self._is_result:
                raise OutputLost(error) from None
            if self.fileno() == 1:
                print(f"note: stdout cannot be written ({error.strerror}): continuing without it", file=sys.stderr)
        return size

    def _discard_output(self) -> None:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.fileno())
        os.close(null)


def _open_closed_descriptors() -> None:
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one


def _safe(stream: TextIO | None, descriptor: int, is_result: bool) -> TextIO:
    """The stream, writing through `_Output`; one that writes elsewhere, as in tests, is returned unchanged."""
    if stream is not None and not _writes_to(stream, descriptor):
        return stream
    output = _Output(descriptor, is_result)
    unbuffered = bool(getattr(stream, "write_through", False))  # python -u
    return io.TextIOWrapper(
        output if unbuffered else io.BufferedWriter(output),
        encoding="utf-8" if stream is None else stream.encoding,
        errors="backslashreplace",
        line_buffering=descriptor == 2 or os.isatty(descriptor),
        write_through=unbuffered,
    )


def _writes_to(stream: TextIO, descriptor: int) -> bool:
    try:
        return stream.fileno() == descriptor
    except (OSError, ValueError):
        return False
