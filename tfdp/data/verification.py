"""Whether the files of a folder are what its manifest says: each is read whole once, and again only when it changed.

What was verified is remembered in `verified.json` beside the files, or in the cache where the folder cannot be written:
size, times and inode of each file, its sha256, and the largest token id in it. A file that differs in any of them is
read again. The file carries its own digest; a damaged one is ignored. It cannot notice a disk that changes
bits under a file that nobody has written to: remove it to have everything read again.
"""

import contextlib
import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tfdp.data.manifest import MANIFEST_FILE, ListedFile
from tfdp.system.sealed import read_sealed, write_sealed
from tfdp.tasks.flags import ID_MASK

VERIFIED_FILE = "verified.json"
CHUNK_BYTES = 4 << 20  # read at a time, by each thread
ANNOUNCED_BYTES = 256 << 20  # reading so much takes long enough to say so
_CLOCK_TICK_SECONDS = 0.02  # more than the steps in which file systems count the times of files


class Damaged(Exception):
    """A file is missing, or not what the manifest says; the message names it."""


@dataclass(frozen=True)
class Finding:
    """What was found in a file.

    Attributes:
      state: size, modification and change time in nanoseconds, inode; as they were before it was read.
      sha256: of its content.
      max_id: its largest token id; None where it holds none.
    """

    state: list[int]
    sha256: str
    max_id: int | None


def verify(
    folder: Path, files: Sequence[ListedFile], cache_dir: Path | None, say: Callable[[str], None]
) -> dict[str, Finding]:
    """Verifies files, and records what was found.

    Args:
      folder: that holds them.
      files: to verify; all of them have a digest, and are there (`check_lengths`).
      cache_dir: where to record it if the folder cannot be written.
      say: called before a long read.

    Returns:
      What was found in each, by its name.

    Raises:
      Damaged: a file is not what it should be.
      OSError: a file cannot be read.
    """
    if not (known := _Known.recall(folder, files, cache_dir)).missing:
        return known.findings
    with _one_at_a_time(folder / MANIFEST_FILE):  # a process that waited finds here what the first one has read
        known = _Known.recall(folder, files, cache_dir)
        if known.missing:
            known.findings.update(_read_all(folder, known.missing, say))
            _remember(folder, known.findings, cache_dir, say)
    return known.findings


def check_lengths(folder: Path, files: Sequence[ListedFile]) -> None:
    """Raises `Damaged` for a file that is missing or has another length."""
    for file in files:
        try:
            num_bytes = (folder / file.name).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            raise Damaged(f"{file.name} is missing") from None
        if num_bytes != file.num_bytes:
            raise Damaged(f"{file.name} has {num_bytes:,} bytes instead of {file.num_bytes:,}")


def examine(path: Path, file: ListedFile) -> Finding:
    """Reads a file, in chunks. Raises `Damaged` where it is not what the manifest says."""
    state, digest = state_of(path), hashlib.sha256()
    max_id = None if file.dtype is None else -1
    buffer = memoryview(bytearray(CHUNK_BYTES))
    with path.open("rb") as stream:
        while size := stream.readinto(buffer):  # a whole buffer, but for the last
            digest.update(buffer[:size])
            if max_id is not None:
                ids = np.frombuffer(buffer[:size], file.dtype)
                max_id = max(max_id, int((ids & ID_MASK if file.has_flags else ids).max()))
    if digest.hexdigest() != file.sha256:
        raise Damaged(f"{file.name} is not what was written (its sha256 is {digest.hexdigest()[:12]}...)")
    return Finding(state, digest.hexdigest(), max_id)


def state_of(path: Path) -> list[int]:
    """What changes when a file is written: `touch` can reset its modification time, but not its change time."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


@dataclass(frozen=True)
class _Known:
    """The findings that still hold, and the files without one."""

    findings: dict[str, Finding]
    missing: list[ListedFile]

    @classmethod
    def recall(cls, folder: Path, files: Sequence[ListedFile], cache_dir: Path | None) -> "_Known":
        findings: dict[str, Finding] = {}
        for memory in map(_load, _memories(folder, cache_dir)):
            for file in files:
                finding = memory.get(file.name)
                if finding and finding.sha256 == file.sha256 and finding.state == state_of(folder / file.name):
                    findings[file.name] = finding
        return cls(findings, [file for file in files if file.name not in findings])


def _memories(folder: Path, cache_dir: Path | None) -> list[Path]:
    """Where findings are recorded: the first that can be written is used."""
    paths = [folder / VERIFIED_FILE]
    if cache_dir is not None:
        place = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32]
        paths.append(cache_dir / "verified" / f"{place}.json")
    return paths


def _load(path: Path) -> dict[str, Finding]:
    try:
        return {name: Finding(**entry) for name, entry in read_sealed(path).items()}
    except (OSError, ValueError, TypeError):  # none, or damaged: the files are read again
        return {}


def _read_all(folder: Path, files: Sequence[ListedFile], say: Callable[[str], None]) -> dict[str, Finding]:
    num_bytes = sum(file.num_bytes for file in files)
    if num_bytes >= ANNOUNCED_BYTES:
        say(f"verifying {num_bytes / 1e9:,.1f} GB of token shards in {folder}, once")
    with ThreadPoolExecutor(min(len(files), os.cpu_count() or 1, 8)) as pool:  # hashing needs no lock of Python
        found = pool.map(lambda file: examine(folder / file.name, file), files)
        return {file.name: finding for file, finding in zip(files, found, strict=True)}


def _remember(folder: Path, findings: dict[str, Finding], cache_dir: Path | None, say: Callable[[str], None]) -> None:
    """Records what still holds; after the pause a change within the same tick of the file system's clock shows too."""
    time.sleep(_CLOCK_TICK_SECONDS)
    kept: dict[str, Any] = {
        name: vars(finding) for name, finding in findings.items() if finding.state == state_of(folder / name)
    }
    paths = _memories(folder, cache_dir)
    for path in paths:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_sealed(path, kept)
            return
    say(f"{folder} is verified again at every start: neither {' nor '.join(map(str, paths))} can be written")


@contextlib.contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """Lets one process after the other through, where the file system has locks; else all at once, which is slower."""
    with path.open("rb") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield  # the lock ends with the file
