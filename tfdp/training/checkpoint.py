"""Checkpoints: saved whole or not at all, verified when read, restored under any layout.

A checkpoint is a folder `step_00000250` with

    weights.safetensors     the trainable weights, by name
    optimizer.safetensors   the optimizer's state, by name
    average.safetensors     the average of the weights, by name, where training.ema_decay asks for one
    state.json              step, position in the data, what the run is (its identity), its keys and their history
    SHA256SUMS              of these, as `sha256sum --check SHA256SUMS` reads it

Frozen weights never change: they are saved once, beside these folders, in a file that is named after its sha256.

It is written under another name, file by file, each one synced, then renamed and the parent folder synced: a crash
at any byte leaves the previous checkpoint as it was. All random numbers of a run are functions of (seed, step,
position), so no generator has a state to save.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from tfdp.system.exits import CommandError, ConfigError
from tfdp.system.files import sync_folder
from tfdp.training.verified import (
    AVERAGE_FILE,
    STATE_FILE,
    SUMS_FILE,
    TENSOR_FILES,
    DamagedCheckpoint,
    read_state,
    read_sums,
    read_verified,
    sums_text,
)
from tfdp.training.weights import Tensors, bytes_of

FORMAT = 2  # in state.json; earlier checkpoints lack it, and SHA256SUMS too

FROZEN = "frozen_sha256"  # key of state.json, where a run has frozen weights

_NAME = re.compile(r"step_(\d{8,})")
_BEST_BY = ("validation_loss", 1)  # of checkpoints that do not say: the metric, and 1 where lower is better, else -1
_PIECE_BYTES = 1 << 20


class SaveFailed(CommandError):
    """A checkpoint could not be written; those before it are as they were."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory: host copies of the tensors and the facts of its state.json."""

    weights: Tensors  # the trainable ones
    optimizer: Tensors
    state: dict[str, Any]
    frozen: Tensors = field(default_factory=dict)  # as it was read; a save writes none
    average: Tensors = field(default_factory=dict)  # of the weights, by the same names, where the run has one

    @property
    def evaluated(self) -> Tensors:
        """The weights of the model that was evaluated, which is the one to use: the average, if there is one."""
        return self.average or self.weights

    @property
    def step(self) -> int:
        return int(self.state["step"])


class CheckpointFolder:
    """The checkpoints of one run, oldest to newest.

    Args:
      folder: made when the first one is saved.
      keep: newest ones kept; the best one, by the metric of its task, is kept besides.
    """

    def __init__(self, folder: Path, keep: int = 1_000_000) -> None:
        self.folder, self._keep = folder, keep

    def steps(self) -> list[int]:
        """Steps with a checkpoint, ascending; not verified."""
        if not self.folder.is_dir():
            return []
        matches = (_NAME.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(match.group(1)) for match in matches if match)

    def path(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}"

    def save(self, checkpoint: Checkpoint, paced: bool = False) -> Path:
        """Writes a checkpoint atomically, then drops those that are neither among the newest nor the best.

        Args:
          checkpoint: its tensors must not change any more.
          paced: whether to rest most of the time, because training steps need the processor.

        Raises:
          SaveFailed: the disk is full, say; nothing of this checkpoint is left.
        """
        try:
            final = self._write(checkpoint, paced)
        except OSError as error:
            shutil.rmtree(self._scratch(checkpoint.step), ignore_errors=True)  # it may be what fills the disk
            tensors = [each for of_file in _sets_of(checkpoint).values() for each in of_file.values()]
            what = f"the checkpoint of step {checkpoint.step}"
            raise SaveFailed(self._why_not_saved(what, tensors, error)) from error
        try:
            self._prune()
        except OSError as error:
            raise SaveFailed(f"old checkpoints in {self.folder} cannot be removed: {error}") from error
        return final

    def save_frozen(self, tensors: Tensors) -> str:
        """Writes the weights that no step changes, once; returns their sha256, for the state of each checkpoint.

        Raises:
          SaveFailed: as `save` does.
        """
        scratch = self.folder / ".frozen.tmp"
        try:
            self.folder.mkdir(exist_ok=True)
            digest = _write_synced(scratch, _safetensors_parts(tensors))
            os.rename(scratch, self._frozen_path(digest))
            sync_folder(self.folder)
        except OSError as error:
            with contextlib.suppress(OSError):
                scratch.unlink(missing_ok=True)
            raise SaveFailed(self._why_not_saved("the frozen weights", tensors.values(), error)) from error
        return digest

    def _frozen_path(self, digest: str) -> Path:
        return self.folder / f"frozen_{digest[:16]}.safetensors"

    def _read_frozen(self, digest: Any) -> Tensors:
        if not isinstance(digest, str):
            raise DamagedCheckpoint(f"checkpoints in {self.folder} are damaged: {FROZEN} is no sha256")
        return _read_tensors(self._frozen_path(digest), digest)

    def _scratch(self, step: int) -> Path:
        return self.folder / f".{self.path(step).name}.tmp"

    def _write(self, checkpoint: Checkpoint, paced: bool) -> Path:
        final, scratch = self.path(checkpoint.step), self._scratch(checkpoint.step)
        if scratch.exists():
            shutil.rmtree(scratch)
        self.folder.mkdir(exist_ok=True)  # but not the run directory: where that is gone, somebody removed it
        scratch.mkdir()
        digests = {
            name: _write_synced(scratch / name, _safetensors_parts(tensors), paced)
            for name, tensors in _sets_of(checkpoint).items()
        }
        state = json.dumps({"format": FORMAT, **checkpoint.state, "files": digests}, indent=1).encode()
        digests[STATE_FILE] = _write_synced(scratch / STATE_FILE, [state])
        _write_synced(scratch / SUMS_FILE, [sums_text(digests)])
        sync_folder(scratch)
        self._discard(final)
        os.rename(scratch, final)
        sync_folder(self.folder)
        return final

    def _why_not_saved(self, what: str, tensors: Iterable[np.ndarray], error: OSError) -> str:
        steps = self.steps()
        last = f"the newest checkpoint is that of step {steps[-1]}" if steps else "there is no checkpoint yet"
        return (
            f"{what} cannot be saved in {self.folder}: {error.strerror or error}; it needs "
            f"{sum(tensor.nbytes for tensor in tensors):,} bytes, {_free_bytes(self.folder)} are free; {last}"
        )

    def state(self, step: int) -> dict[str, Any]:
        """The facts of one checkpoint, verified; its tensors are not read. Raises as `load` does."""
        return self._verified_state(step)[0]

    def states(self) -> tuple[dict[int, dict[str, Any]], list[str]]:
        """The facts of all checkpoints by step, ascending, and a line for each that is damaged."""
        found, damaged = {}, []
        for step in self.steps():
            try:
                found[step] = self.state(step)
            except DamagedCheckpoint as error:
                damaged.append(str(error))
        return found, damaged

    def load(self, step: int) -> Checkpoint:
        """Reads and verifies one checkpoint.

        Raises:
          DamagedCheckpoint: naming what is missing or not as it was saved.
          CommandError: a file cannot be read, which says nothing of whether it is whole.
        """
        folder = self.path(step)
        state, sums = self._verified_state(step)
        digests = sums or state.get("files")  # in state.json alone, before there were others
        if "step" not in state or not isinstance(digests, dict) or not set(TENSOR_FILES) <= digests.keys():
            raise DamagedCheckpoint(f"checkpoint {folder} is damaged: {STATE_FILE} lacks its step or its files")
        weights, optimizer = (_read_tensors(folder / name, digests[name]) for name in TENSOR_FILES)
        average = _read_tensors(folder / AVERAGE_FILE, digests[AVERAGE_FILE]) if AVERAGE_FILE in digests else {}
        frozen = state.get(FROZEN)
        return Checkpoint(weights, optimizer, state, {} if frozen is None else self._read_frozen(frozen), average)

    def _verified_state(self, step: int) -> tuple[dict[str, Any], dict[str, str]]:
        """What state.json says, and the sha256 of each file; {} for a checkpoint of before there were such."""
        folder = self.path(step)
        sums = read_sums(folder / SUMS_FILE)
        state = read_state(folder / STATE_FILE, sums.get(STATE_FILE))
        if not sums and "format" in state:
            raise DamagedCheckpoint(f"checkpoint {folder} is incomplete: there is no {SUMS_FILE}")
        if state.get("step", step) != step:
            raise DamagedCheckpoint(f"checkpoint {folder} is damaged: it says that it is of step {state['step']}")
        return state, sums

    def load_newest(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest checkpoint that is whole, and a line for each newer one that is not.

        Once a whole one is found, the damaged ones are renamed to `NAME.damaged`: out of the way, and not lost.

        Raises:
          ConfigError: there are checkpoints and none of them is whole. Nothing is renamed then.
          CommandError: a checkpoint cannot be read, which says nothing of whether it is whole.
        """
        damaged: dict[int, str] = {}
        for step in reversed(self.steps()):
            try:
                found = self.load(step)
            except DamagedCheckpoint as error:
                damaged[step] = str(error)
                continue
            return found, [self._set_aside(step, message) for step, message in damaged.items()]
        if damaged:
            raise ConfigError(
                f"run_dir: no checkpoint in {self.folder} is whole: {next(iter(damaged.values()))}; "
                f"name another run_dir to begin anew"
            )
        return None, []

    def _set_aside(self, step: int, message: str) -> str:
        aside = self.path(step).with_suffix(".damaged")
        number = 1
        while aside.exists():
            aside, number = aside.with_suffix(f".damaged{number}"), number + 1
        os.rename(self.path(step), aside)
        return f"{message}; moved to {aside.name}, falling back to the checkpoint before it"

    def best_step(self) -> int | None:
        """The step of the whole checkpoint that was evaluated best, by the metric that the newest one names."""
        states = self.states()[0]
        metric, sign = states[max(states)].get("best_by", _BEST_BY) if states else _BEST_BY
        values = {step: state.get(metric) for step, state in states.items()}
        known = {step: sign * value for step, value in values.items() if isinstance(value, float)}
        return min(known, key=lambda step: known[step]) if known else None

    def best_or_newest_step(self) -> int | None:
        """`best_step`, or the newest where none was evaluated; None where there is no checkpoint."""
        return self.best_step() or max(self.steps(), default=None)

    def _prune(self) -> None:
        kept = {*self.steps()[-self._keep :], self.best_step()}
        for step in self.steps():
            if step not in kept:
                self._discard(self.path(step))
        for leftover in self.folder.glob(".step_*"):  # of a process that died while it saved or removed one
            shutil.rmtree(leftover)

    def _discard(self, folder: Path) -> None:
        """Removes a checkpoint so that no half of it ever carries its name."""
        if folder.exists():
            doomed = folder.with_name(f".{folder.name}.old")
            if doomed.exists():
                shutil.rmtree(doomed)
            os.rename(folder, doomed)
            shutil.rmtree(doomed)


def _sets_of(checkpoint: Checkpoint) -> dict[str, Tensors]:
    """The tensors of each file that a save writes."""
    sets = dict(zip(TENSOR_FILES, (checkpoint.weights, checkpoint.optimizer), strict=True))
    return sets | ({AVERAGE_FILE: checkpoint.average} if checkpoint.average else {})


def evaluated_file(folder: Path) -> Path:
    """The file of a checkpoint's folder that holds the weights to use: see `Checkpoint.evaluated`."""
    average = folder / AVERAGE_FILE
    return average if average.is_file() else folder / TENSOR_FILES[0]


def _read_tensors(path: Path, digest: str) -> Tensors:
    try:
        tensors: Tensors = safetensors.numpy.load(read_verified(path, digest))
        return tensors
    except safetensors.SafetensorError as error:
        raise DamagedCheckpoint(f"checkpoint {path} is damaged: {error}") from None


def _free_bytes(folder: Path) -> str:
    return f"{shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.exists())).free:,}"


def _safetensors_parts(tensors: Tensors) -> Iterator[bytes | memoryview]:
    """The parts of a safetensors file: length of the header, header (JSON), and the tensors as they lie in memory.

    Writing the format here, not by its library, needs no second copy of the state in memory, and neither hashing
    nor writing holds the interpreter up while the training steps run.
    """
    header, offset = {}, 0
    for name, tensor in tensors.items():
        end = offset + tensor.nbytes
        header[name] = {"dtype": _kind_of(name, tensor), "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    yield len(encoded).to_bytes(8, "little")
    yield encoded
    for tensor in tensors.values():
        yield bytes_of(tensor)


def _kind_of(name: str, tensor: np.ndarray) -> str:
    """What safetensors calls the type of a tensor. Raises `SaveFailed` for one that it cannot give back."""
    if tensor.dtype.name == "bool":
        return "BOOL"
    if tensor.dtype.kind not in "fiu":
        raise SaveFailed(f"{name} cannot be saved: its type is {tensor.dtype.name}, not one of numbers or truth values")
    return f"{tensor.dtype.kind.upper()}{8 * tensor.dtype.itemsize}"


def _write_synced(path: Path, parts: Iterable[bytes | memoryview], paced: bool = False) -> str:
    """Writes a file and waits until it is on the disk; returns its sha256.

    Where it is paced it rests after each piece for as long as the piece took: the kernel does not
    interrupt a write for a thread that wants the core, and memory is shared too.
    """
    total = hashlib.sha256()
    with open(path, "wb") as file:
        for part in parts:
            for start in range(0, len(part), _PIECE_BYTES):
                started = time.perf_counter()
                piece = part[start : start + _PIECE_BYTES]
                total.update(piece)
                file.write(piece)
                if paced:
                    time.sleep(time.perf_counter() - started)
        file.flush()
        os.fsync(file.fileno())
    return total.hexdigest()
