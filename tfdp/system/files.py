"""Files that appear complete or not at all, and locks that end with their process, even if it or the machine dies."""

import contextlib
import errno
import fcntl
import os
import socket
import sys
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}  # of file systems without them
_MOST_LINKS = 40  # as in Linux


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields the path of a scratch file to write, which takes the place of `path` once it is on the disk.

    The scratch file lies beside `path`, under a name of this process: two processes never write the same one. It is
    removed where the block raises.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield scratch
        with scratch.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def write_whole(path: Path, text: str) -> None:
    """Writes a text file in UTF-8 whole or not at all."""
    with replacing(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def sync_folder(folder: Path) -> None:
    """Waits until the names in a folder are on the disk: a file that was renamed keeps its new name."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def follow_links(path: Path) -> Path:
    """The target of a path that is a symbolic link; relative if it was. Raises OSError for a loop of links."""
    for _ in range(_MOST_LINKS):
        if not path.is_symlink():
            return path
        path = path.parent / path.readlink()
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))


@contextlib.contextmanager
def locking(path: Path, when_held: Callable[[str], None]) -> Iterator[Callable[[], bool]]:
    """Holds a lock on a file, which it creates, while the block runs; the lock ends with this process at the latest.

    It is a `flock`, which on Linux works over NFS too. If the file system has no locks, a line on stderr says so, and
    the block runs without one.

    Args:
      path: of the file; its text names the process that holds it.
      when_held: called with that text if another process holds the lock; if it returns, the lock is waited for.

    Yields a function that says whether the locked file is still at `path`, and was not removed with its folder.
    """
    with _locked(path, when_held) as file:
        yield lambda: _lies_at(file, path)


def _locked(path: Path, when_held: Callable[[str], None]) -> FileIO:
    while True:
        file = FileIO(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+")
        os.register_at_fork(after_in_child=file.close)  # a child that outlives this process must not keep the lock
        try:
            _flock(file, path, when_held)
            if _lies_at(file, path):
                with contextlib.suppress(OSError):  # on a full disk the lock holds without a name
                    file.seek(0)
                    file.truncate()
                    file.write(f"pid {os.getpid()} on {socket.gethostname()}\n".encode())
                return file
        except BaseException:
            file.close()
            raise
        file.close()  # its holder removed it meanwhile: the next one is another file


def _flock(file: FileIO, path: Path, when_held: Callable[[str], None]) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        when_held(file.read(200).decode(errors="replace").strip() or "another process")
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        print(
            f"warning: {path} cannot be locked ({error.strerror}): make sure that only one process works in its folder",
            file=sys.stderr,
            flush=True,
        )


def _lies_at(file: FileIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False
