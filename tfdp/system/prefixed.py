"""The output of several processes on one console: whole lines, each with the name of its process in front."""

import contextlib
import os
import subprocess
import sys
import threading
from typing import IO


class Console:
    """The output of all workers: whole lines, at once, each with its worker's name in front."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._errors: set[bytes] = set()

    def say(self, message: str) -> None:
        """One line of the launcher itself, on stderr."""
        self._write(sys.stderr.fileno(), f"launch: {message}\n".encode())

    def forget_errors(self) -> None:
        """From now on an error that was seen before is shown again."""
        self._errors.clear()

    def follow(self, name: str, process: subprocess.Popen[bytes]) -> list[threading.Thread]:
        """Starts to pass a worker's output on, stdout to stdout and stderr to stderr."""
        prefix = f"[{name}] ".encode()
        pairs = ((process.stdout, sys.stdout.fileno()), (process.stderr, sys.stderr.fileno()))
        readers = [threading.Thread(target=self._pass_on, args=(prefix, *pair), daemon=True) for pair in pairs]
        for reader in readers:
            reader.start()
        return readers

    def _pass_on(self, prefix: bytes, source: IO[bytes], target: int) -> None:
        with source:
            for line in iter(source.readline, b""):
                self._write(target, line if line.endswith(b"\n") else line + b"\n", prefix)

    def _write(self, target: int, line: bytes, prefix: bytes = b"") -> None:
        with self._lock:
            if prefix and line.startswith(b"error: "):
                if line in self._errors:  # every worker finds the same mistake of the user: once is enough
                    return
                self._errors.add(line)
            rest = memoryview(prefix + line)
            with contextlib.suppress(OSError):  # nobody reads any more: the workers continue
                while rest:
                    rest = rest[os.write(target, rest) :]
