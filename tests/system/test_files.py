"""Locks: who holds one, when it ends, and that nothing keeps it beyond its process."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tfdp.system.files import follow_links, locking

TIMEOUT = 60

HOLD = """
import os, sys, time
from pathlib import Path
from tfdp.system.files import locking
def refuse(holder):
    sys.exit(f"held by {holder}")
with locking(Path(sys.argv[1]), refuse):
    child = os.fork() if sys.argv[2:] else None
    if not child:  # a child that outlives its parent speaks once it has let go
        print("holding" if child is None else os.getpid(), flush=True)
    time.sleep(60)
"""


class Held(Exception):
    pass


def refuse(holder: str) -> None:
    raise Held(holder)


def hold(path: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path), *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def lines(process: subprocess.Popen[str], count: int) -> list[str]:
    assert process.stdout is not None
    return [process.stdout.readline().strip() for _ in range(count)]


def test_a_lock_names_its_holder_and_ends_with_it_however_that_ends(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    process = hold(path)
    try:
        assert lines(process, 1) == ["holding"]
        with pytest.raises(Held, match=rf"^pid {process.pid} on {os.uname().nodename}$"), locking(path, refuse):
            pass
        other = hold(path)
        assert f"held by pid {process.pid} on" in other.communicate(timeout=TIMEOUT)[1]
    finally:
        process.kill()
        process.wait(TIMEOUT)
    with locking(path, refuse) as is_held:
        assert is_held()
        with pytest.raises(Held, match=f"pid {os.getpid()} "), locking(path, refuse):  # in one process too
            pass
    with locking(path, refuse):
        pass


def test_a_child_that_outlives_its_parent_keeps_no_lock(tmp_path: Path) -> None:
    process = hold(tmp_path / "lock", "fork")
    child = int(*lines(process, 1))
    process.kill()
    process.wait(TIMEOUT)
    try:
        os.kill(child, 0)
        with locking(tmp_path / "lock", refuse):
            pass
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_lock_that_was_removed_with_its_folder_is_lost_and_another_is_made(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with locking(path, refuse) as is_held:
        path.unlink()
        assert not is_held()
        with locking(path, refuse) as is_held_by_other:
            assert is_held_by_other() and not is_held()


def test_who_waits_for_a_lock_that_its_holder_removes_takes_the_file_that_lies_there(tmp_path: Path) -> None:
    path, holder, waited = tmp_path / "lock", locking(tmp_path / "lock", refuse), []
    holder.__enter__()

    def end_holder(name: str) -> None:
        waited.append(name)
        path.unlink()
        holder.__exit__(None, None, None)

    with locking(path, end_holder) as is_held:
        assert is_held() and path.exists()
    assert waited == [f"pid {os.getpid()} on {os.uname().nodename}"]


def test_a_file_system_without_locks_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)  # no file system of a test machine is so
    with locking(tmp_path / "lock", refuse) as is_held:
        assert is_held()
    error = capsys.readouterr().err
    assert error.startswith(f"warning: {tmp_path / 'lock'} cannot be locked (No locks available)")
    assert error.count("\n") == 1


def test_links_are_followed_to_what_they_name_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    Path("runs/latest").symlink_to("a")
    Path("elsewhere").symlink_to("runs/latest")
    Path("loop").symlink_to("loop")
    assert [str(follow_links(Path(name))) for name in ("elsewhere", "runs/latest", "runs/b")] == [
        "runs/a",
        "runs/a",
        "runs/b",
    ]
    with pytest.raises(OSError, match="symbolic links"):
        follow_links(Path("loop"))
