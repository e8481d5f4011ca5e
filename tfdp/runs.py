"""A run directory: its files, its name, and the files that are written once.

config.yaml      the resolved configuration        checkpoints/   see checkpoint.py
metrics.jsonl    one object per logged step        tensorboard/   train/ and validation/
summary.json     what the run came to
"""

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from tfdp.checkpoint import CheckpointFolder
from tfdp.exits import ConfigError
from tfdp.files import write_whole

RUNS = Path("runs")


@dataclass(frozen=True)
class RunDirectory:
    """The folder of one run."""

    path: Path

    @classmethod
    def named(cls, name: str | None) -> "RunDirectory":
        """The directory of that name, or for None a new one, `runs/DATE-TIME`; nothing is made yet."""
        if name is None:
            return cls(RUNS / datetime.now().strftime("%Y%m%d-%H%M%S"))
        path = Path(name)
        return cls(path.parent / path.readlink() if path.is_symlink() else path)  # runs/latest is no run itself

    @classmethod
    def open(cls, name: str) -> "RunDirectory":
        """An existing run. Raises `ConfigError` where there is no config.yaml."""
        run = cls(Path(name))
        if not run.config_path.is_file():
            raise ConfigError(f"run_dir ({name}) must be the directory of a run: there is no {run.config_path}")
        return run

    def begin(self, config_yaml: str) -> None:
        """Makes the directory, writes config.yaml, removes an old summary and points the link `latest` beside it here.

        Raises:
          ConfigError: the directory cannot be made or written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_whole(self.config_path, config_yaml)
            self.summary_path.unlink(missing_ok=True)
            if self.path.parent == RUNS:
                _point(RUNS / "latest", self.path.name)
        except OSError as error:
            raise ConfigError(f"run_dir ({self.path}) must be a folder that can be written: {error.strerror}") from None

    @property
    def config_path(self) -> Path:
        return self.path / "config.yaml"

    def checkpoints(self, keep: int = 1_000_000) -> CheckpointFolder:
        return CheckpointFolder(self.path / "checkpoints", keep)

    @property
    def tokenizer_path(self) -> Path:
        return self.path / "tokenizer"

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def summary_path(self) -> Path:
        return self.path / "summary.json"

    def next_steps(self) -> str:
        """Where to look after a run, as commands for the Python that runs now."""
        python = sys.executable
        if Path(python).is_relative_to(Path.cwd()):
            python = str(Path(python).relative_to(Path.cwd()))
        return (
            f"summary      {self.summary_path}\n"
            f"curves       {python} -m tensorboard.main --logdir {self.path / 'tensorboard'}\n"
            f'more text    {python} -m tfdp.generate --run_dir {self.path} --prompt "def "\n'
            f"evaluation   {python} -m tfdp.evaluate --run_dir {self.path}"
        )

    def write_summary(self, summary: Mapping[str, object]) -> None:
        """Writes summary.json whole or not at all."""
        write_whole(self.summary_path, json.dumps(dict(summary), indent=1) + "\n")


def _point(link: Path, target: str) -> None:
    """Points a symbolic link to a folder beside it, replacing the link that was there."""
    scratch = link.with_name(f".{link.name}.{os.getpid()}")
    scratch.symlink_to(target)
    if link.is_symlink() or not link.exists():
        os.replace(scratch, link)
    else:
        scratch.unlink()
