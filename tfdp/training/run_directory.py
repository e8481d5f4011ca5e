"""A run directory: its files, its name, who works in it, and the files that are written once.

config.yaml      the resolved configuration        checkpoints/   see checkpoint.py
metrics.jsonl    one object per logged step        tensorboard/   train/ and validation/
summary.json     what the run came to              tokenizer/     as it was in training
examples.json    how the records behind its shards became examples, where it was trained on such
resolved.yaml    the resolved configuration where config.yaml is the user's own, which stays as it is
.lock            while a training works there
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from tfdp.config.run_config import CONFIG_FILE, RESOLVED_FILE, config_records, file_sha256, is_begun
from tfdp.reporting.rows import from_json, to_json
from tfdp.system.exits import ConfigError, TrainingError
from tfdp.system.files import follow_links, locking, write_whole
from tfdp.training.checkpoint import CheckpointFolder

RUNS = Path("runs")
LOCK_FILE = ".lock"


@dataclass(frozen=True)
class RunDirectory:
    """The folder of one run."""

    path: Path
    is_held: Callable[[], bool] = field(default=lambda: True, compare=False, repr=False)  # see `holding`

    @classmethod
    def named(cls, name: str) -> "RunDirectory":
        """The directory of that name; nothing is made yet. A link, such as runs/latest, is no run itself."""
        try:
            return cls(follow_links(Path(name)))
        except OSError as error:
            raise ConfigError(f"run_dir ({name}) must be a folder: {error.strerror}") from None

    @classmethod
    @contextlib.contextmanager
    def holding(cls, name: str | None, is_chief: bool = True) -> Iterator["RunDirectory"]:
        """The directory of that name, or for None a new one, runs/DATE-TIME, with no other training in it meanwhile.

        A directory that was made for this and got no files is removed again.

        Args:
          is_chief: whether this process writes into it, for all workers: nobody else makes or holds it.

        Raises:
          ConfigError: another training works there, or it cannot be made or written.
        """
        if not is_chief and name is not None:
            yield cls.named(name)
            return
        with contextlib.ExitStack() as stack:
            try:
                made, path = _make_new() if name is None else _make(follow_links(Path(name)))
                stack.callback(_remove_empty, made)
                is_held = stack.enter_context(locking(path / LOCK_FILE, lambda holder: _refuse(path, holder)))
            except OSError as error:
                raise _not_writable(Path(name or RUNS), error) from None
            stack.callback(_remove_lock, path / LOCK_FILE, is_held)
            yield cls(path, is_held)

    @classmethod
    def open(cls, name: str) -> "RunDirectory":
        """An existing run. Raises `ConfigError` where there is no config.yaml."""
        run = cls.named(name)
        if not config_records(run.path):
            raise ConfigError(f"run_dir ({name}) must be the directory of a run: there is no {run.path / CONFIG_FILE}")
        return run

    def begin(self, config_yaml: str, add_files: Callable[[], None] = lambda: None) -> None:
        """Writes the configuration, removes an old summary and points the link `latest` beside the directory here.

        A config.yaml that no run has written is the user's own: it stays, and the configuration goes to resolved.yaml.

        Raises:
          ConfigError: the directory cannot be made or written.
        """
        own, resolved = self.path / CONFIG_FILE, self.path / RESOLVED_FILE
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if resolved.is_file() or (own.is_file() and not is_begun(self.path)):
                digest = file_sha256(own) if own.is_file() else "of no file"
                write_whole(
                    resolved, f"# What {CONFIG_FILE} (sha256 {digest}), flags and defaults came to.\n{config_yaml}"
                )
            elif not own.is_file() or own.read_bytes() != config_yaml.encode():
                self.metrics_path.touch()  # before config.yaml, to tell that it is the run's
                write_whole(own, config_yaml)
            add_files()
            self.summary_path.unlink(missing_ok=True)
            if self.path.parent == RUNS:
                _point(RUNS / "latest", self.path.name)
        except OSError as error:
            raise _not_writable(self.path, error) from None

    def require_held(self) -> None:
        """Raises `TrainingError` where the directory was removed, or another took its place, under this training."""
        if not self.is_held():
            raise TrainingError(
                f"run_dir ({self.path}) was removed or replaced while this run worked in it: nothing more is written"
            )

    @property
    def config_path(self) -> Path:
        """The resolved configuration."""
        return (config_records(self.path) or [self.path / CONFIG_FILE])[0]

    def checkpoints(self, keep: int = 1_000_000) -> CheckpointFolder:
        return CheckpointFolder(self.path / "checkpoints", keep)

    @property
    def tokenizer_path(self) -> Path:
        return self.path / "tokenizer"

    @property
    def examples_path(self) -> Path:
        return self.path / "examples.json"

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def summary_path(self) -> Path:
        return self.path / "summary.json"

    def next_steps(self, use: tuple[str, str] = ("more text", 'tfdp.generate --run_dir {} --prompt "def "')) -> str:
        """Where to look after a run, as commands for the Python that runs now.

        Args:
          use: what the model is for, in a word or two, and the command for it; {} is the run directory.
        """
        python = sys.executable
        if Path(python).is_relative_to(Path.cwd()):
            python = str(Path(python).relative_to(Path.cwd()))
        return (
            f"summary      {self.summary_path}\n"
            f"curves       {python} -m tensorboard.main --logdir {self.path / 'tensorboard'}\n"
            f"{use[0]:<12} {python} -m {use[1].format(self.path)}\n"
            f"evaluation   {python} -m tfdp.evaluate --run_dir {self.path}"
        )

    def read_summary(self) -> dict[str, Any]:
        """What summary.json holds; {} where there is none, or one that is not as it was written."""
        return (self.summary_path.is_file() and from_json(self.summary_path.read_bytes())) or {}

    def write_summary(self, summary: Mapping[str, object]) -> None:
        """Writes summary.json whole or not at all. Raises `TrainingError` where the disk is full, say."""
        try:
            write_whole(self.summary_path, to_json(summary, indent=1))
        except OSError as error:
            raise TrainingError(
                f"{self.summary_path} cannot be written: {error.strerror or error}; all steps are done and their "
                f"checkpoint is saved: --run_dir {self.path} writes it once that is mended"
            ) from None


def _refuse(path: Path, holder: str) -> None:
    raise ConfigError(
        f"run_dir ({path}) must not be in use: {holder} trains there; wait for its end, or name another run_dir"
    )


def _not_writable(path: Path, error: OSError) -> ConfigError:
    return ConfigError(f"run_dir ({path}) must be a folder that can be written: {error.strerror or error}")


def _make(path: Path) -> tuple[list[Path], Path]:
    """Makes a folder; returns also what had to be made for it, the innermost first."""
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    return made, path


def _make_new() -> tuple[list[Path], Path]:
    """Makes runs/DATE-TIME, which no other process has."""
    made, _ = _make(RUNS)
    name, number = datetime.now().strftime("%Y%m%d-%H%M%S"), 1
    while True:
        path = RUNS / (name if number == 1 else f"{name}-{number}")
        with contextlib.suppress(FileExistsError):
            path.mkdir()
            return [path, *made], path
        number += 1


def _remove_lock(lock: Path, is_held: Callable[[], bool]) -> None:
    """Whoever waits for this file looks whether it still lies there, and makes it anew."""
    if is_held():
        with contextlib.suppress(OSError):  # a read-only folder: the lock ends all the same
            lock.unlink()


def _remove_empty(folders: list[Path]) -> None:
    with contextlib.suppress(OSError):  # the first one with files, and all above it, stay
        for folder in folders:
            folder.rmdir()


def _point(link: Path, target: str) -> None:
    """Points a symbolic link to a folder beside it, replacing the link that was there."""
    scratch = link.with_name(f".{link.name}.{os.getpid()}")
    scratch.symlink_to(target)
    if link.is_symlink() or not link.exists():
        os.replace(scratch, link)
    else:
        scratch.unlink()
