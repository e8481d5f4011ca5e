"""Files that a user names: those that a pattern matches, and their content.

Only regular files are read: text is read more than once, and a pipe gives what it holds only once.
"""

import errno
import glob
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from tfdp.system.exits import ConfigError
from tfdp.system.messages import shown

_STARS = re.compile(r"(?:^|(?<=/))\*\*(?=/|$)")
_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


class NotRegularError(OSError):
    """What is named is a pipe, a socket, a device or a folder."""


def path_of(name: str) -> Path:
    """The path that a user wrote, a leading `~` replaced by the home folder."""
    return Path(os.path.expanduser(name))


def read(path: Path) -> bytes:
    """The content of a regular file. Raises `OSError`, at once where opening a pipe would wait for a writer."""
    require_regular(path)
    return path.read_bytes()


def require_regular(path: str | Path) -> os.stat_result:
    """The status of a regular file. Raises `OSError` for anything else, and where there is nothing."""
    try:
        status = os.stat(path)
    except ValueError as error:  # a NUL in the path
        raise OSError(errno.EINVAL, str(error)) from None
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "no file")
        fix = "name a file in it" if stat.S_ISDIR(status.st_mode) else "write what it gives to a file, and name that"
        raise NotRegularError(errno.EINVAL, f"it is {kind}, not a regular file: {fix}")
    return status


def find(pattern: str, key: str, source: str) -> list[str]:
    """The paths of the files that a pattern matches, sorted, each file once.

    The pattern is that of `glob`, with these differences. Leading parts of the path that exist are taken as they are:
    brackets in their names are no character classes. `~` is the home folder. `**` enters a folder once, however many
    links lead there, and a folder that it cannot read is an error. A file with several names counts under the first
    one that no link leads to, else under the first: the same text twice could be trained on and held out.

    Args:
      pattern: `**` crosses folders; folders that match are passed over.
      key: the configuration key to blame.
      source: as the key has it.

    Raises:
      ConfigError: there is no such file, or one is not a regular file.
    """
    pattern = pattern if os.path.lexists(pattern) else os.path.expanduser(pattern)
    paths = sorted(path for path in set(_expand(literal_start(pattern), key)) if not os.path.isdir(path))
    if not paths:
        found = "" if source.endswith(pattern) else f", and {shown(Path(pattern))} matches none"
        fix = "check the path, and quote the pattern"
        if os.path.isdir(pattern):
            found, fix = ", and is a folder", f"name those in it, such as {shown(Path(pattern) / '**' / '*')}"
        raise ConfigError(f"{key} ({shown(source)}) must match at least one file{found}: {fix}")
    names: dict[object, list[str]] = {}
    for path in paths:
        try:
            status = require_regular(path)
        except OSError as error:
            raise ConfigError(f"{key}: {shown(Path(path))} must be readable: {error.strerror}") from None
        # Size and time besides, because some network file systems make up the numbers of files.
        file = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        names.setdefault(file, []).append(path)
    root = common_folder(paths)
    return sorted(_own_name(same, root) if len(same) > 1 else same[0] for same in names.values())


def common_folder(paths: list[str]) -> str:
    """The absolute path of the folder that all paths share."""
    return os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])


def _own_name(paths: list[str], root: str) -> str:
    """Of several names of a file, the first below `root` on whose way there is no link."""
    real_root = os.path.realpath(root)
    for path in paths:
        if os.path.realpath(path) == os.path.join(real_root, os.path.relpath(os.path.abspath(path), root)):
            return path
    return paths[0]


def literal_start(pattern: str) -> str:
    """The pattern with brackets escaped in the leading parts that exist as they are written."""
    start = 0
    for slash in re.finditer(r"(?<=[^/])(?=/|$)", pattern):
        part = pattern[start : slash.start()]
        if "*" in part or "?" in part or not os.path.lexists(pattern[: slash.start()]):
            break
        start = slash.start()
    return glob.escape(pattern[:start]) + pattern[start:]


def _expand(pattern: str, key: str) -> Iterator[str]:
    """The paths that a pattern matches, as `glob.glob(pattern, recursive=True)` writes them."""
    stars = _STARS.search(pattern)
    if stars is None:
        yield from glob.iglob(pattern)
        return
    start, rest = re.sub("(?<=[^/])/+", "/", pattern[: stars.start()]), pattern[stars.end() :].lstrip("/")
    if pattern.endswith("/"):
        return  # only folders match
    for top in glob.glob(start) if start else [""]:
        for folder in _folders(top, key):
            yield from _expand(glob.escape(folder) + (rest or "*"), key)


def _folders(top: str, key: str) -> Iterator[str]:
    """The folder and all below it but hidden ones, with a slash at the end, each once: links come after all others."""
    seen = set()
    waiting, links = [top], list[str]()
    while waiting or links:
        folder = waiting.pop() if waiting else links.pop(links.index(min(links)))
        try:
            status = os.stat(folder or ".")
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            yield folder
            with os.scandir(folder or ".") as entries:
                for entry in entries:
                    path = f"{folder}{entry.name}/"
                    if not entry.name.startswith(".") and os.path.isdir(path):
                        (links if entry.is_symlink() else waiting).append(path)
        except OSError as error:
            raise ConfigError(
                f"{key}: {shown(Path(folder))} must be a folder that can be read: {error.strerror}"
            ) from None
