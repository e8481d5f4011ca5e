"""Checkpoints: saved whole or not at all, verified when read, restored under any layout.

A checkpoint is a folder `step_00000250` with

    weights.safetensors     every trainable variable, by name
    optimizer.safetensors   the optimizer's state, by name
    state.json              step, position in the data, what the run is (its identity), sha256 of the two files

It is written under another name, file by file, each one synced, `state.json` last, then renamed and the
parent folder synced: a crash at any byte leaves the previous checkpoint as it was. All random numbers of a
run are functions of (seed, step, position), so no generator has a state to save.
"""

import hashlib
import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import safetensors
import safetensors.numpy

from tfdp.exits import ConfigError
from tfdp.files import sync_folder

Tensors = dict[str, np.ndarray]
Variables = Mapping[str, keras.Variable]

_NAME = re.compile(r"step_(\d{8,})")
_PIECE_BYTES = 1 << 20


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory: host copies of the tensors and the facts of its state.json."""

    weights: Tensors
    optimizer: Tensors
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.state["step"])


class CheckpointFolder:
    """The checkpoints of one run, oldest to newest.

    Args:
      folder: made when the first one is saved.
      keep: newest ones kept; the best one by validation loss is kept besides.
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
          checkpoint: whose tensors nobody changes any more.
          paced: whether to rest most of the time, because training steps want the processor.
        """
        final = self.path(checkpoint.step)
        scratch = self.folder / f".{final.name}.tmp"
        if scratch.exists():
            shutil.rmtree(scratch)
        scratch.mkdir(parents=True)
        digests = {
            f"{name}.safetensors": _write_synced(scratch / f"{name}.safetensors", _safetensors_parts(tensors), paced)
            for name, tensors in (("weights", checkpoint.weights), ("optimizer", checkpoint.optimizer))
        }
        state = {**checkpoint.state, "files": digests}
        _write_synced(scratch / "state.json", [json.dumps(state, indent=1).encode()])
        sync_folder(scratch)
        self._discard(final)
        os.rename(scratch, final)
        sync_folder(self.folder)
        self._prune()
        return final

    def load(self, step: int) -> Checkpoint:
        """Reads and verifies one checkpoint. Raises `ConfigError` naming the file that is missing or damaged."""
        folder = self.path(step)
        try:
            state = json.loads((folder / "state.json").read_text())
            tensors = {}
            for name, digest in state["files"].items():
                data = (folder / name).read_bytes()
                if hashlib.sha256(data).hexdigest() != digest:
                    raise ConfigError(
                        f"checkpoint {folder / name} is damaged: its sha256 is not the one it was saved with"
                    )
                tensors[name] = safetensors.numpy.load(data)
            return Checkpoint(tensors["weights.safetensors"], tensors["optimizer.safetensors"], state)
        except ConfigError:
            raise
        except (FileNotFoundError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
            raise ConfigError(f"checkpoint {folder} is incomplete: {error}") from None

    def load_newest(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest checkpoint that is whole, and a line for each newer one that is not.

        Once a whole one is found, the damaged ones are renamed to `NAME.damaged`: out of the way, and not lost.

        Raises:
          ConfigError: there are checkpoints and none of them is whole. Nothing is renamed then.
          OSError: a checkpoint cannot be read, which says nothing of whether it is whole.
        """
        damaged: dict[int, str] = {}
        for step in reversed(self.steps()):
            try:
                found = self.load(step)
            except ConfigError as error:
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
        """The step with the lowest validation loss among the checkpoints that carry one."""
        losses = {step: self._validation_loss(step) for step in self.steps()}
        known = {step: loss for step, loss in losses.items() if loss is not None}
        return min(known, key=lambda step: known[step]) if known else None

    def _validation_loss(self, step: int) -> float | None:
        try:
            loss = json.loads((self.path(step) / "state.json").read_text()).get("validation_loss")
        except (OSError, ValueError):
            return None
        return None if loss is None else float(loss)

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


class AsyncSaver:
    """Writes checkpoints in a thread, one at a time; a second save waits for the first.

    As a context manager it waits at the end of its block. An error of the thread is raised by the next call.
    """

    def __init__(self, folder: CheckpointFolder) -> None:
        self._folder = folder
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> "AsyncSaver":
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread is not None:
            self._thread.join()

    def save(self, checkpoint: Checkpoint, background: bool = True) -> None:
        """Writes a checkpoint beside the steps that follow, or, where none does, at once and at full speed."""
        self.wait()
        if not background:
            self._folder.save(checkpoint)
            return
        self._thread = threading.Thread(target=self._write, args=(checkpoint,), name="save-checkpoint")
        self._thread.start()

    def is_saving(self) -> bool:
        """Whether a save is under way."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Waits for the save under way, if there is one."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write(self, checkpoint: Checkpoint) -> None:
        try:
            if sys.platform == "linux":
                # Runs where a core is idle, so that no step waits for it; nice 19 was not enough on two cores.
                os.sched_setscheduler(threading.get_native_id(), os.SCHED_IDLE, os.sched_param(0))
            self._folder.save(checkpoint, paced=True)
        except BaseException as error:
            self._error = error


def snapshot(variables: Variables) -> Tensors:
    """Copies variables to the host, under the names given (`numpy` of an eager tensor is a copy already)."""
    return {name: np.asarray(variable.numpy()) for name, variable in variables.items()}


def restore(variables: Variables, tensors: Tensors) -> None:
    """Assigns tensors to variables of the same names and shapes, on every replica of this worker.

    Raises:
      ConfigError: names or shapes differ, listing every difference.
    """
    shapes = {name: tuple(variable.shape) for name, variable in variables.items()}
    saved = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    refuse_differences({name: list(shape) for name, shape in saved.items()}, {n: list(s) for n, s in shapes.items()})
    for name, variable in variables.items():
        variable.assign(tensors[name])


def refuse_differences(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises `ConfigError` that lists where a checkpoint and this run differ."""
    differing = [key for key in {**saved, **wanted} if saved.get(key) != wanted.get(key)]
    if differing:
        listed = "; ".join(f"{key} is {saved.get(key)} there and {wanted.get(key)} here" for key in differing)
        raise ConfigError(f"run_dir holds the checkpoints of another run: {listed}; name another run_dir")


def digests_of(weights: Tensors, optimizer: Tensors) -> dict[str, str]:
    """sha256 over the float32 bytes of every tensor by name: of the weights, and of those and the optimizer's."""
    total = hashlib.sha256()
    found = {}
    for key, tensors in (("weights_sha256", weights), ("state_sha256", optimizer)):
        for name in sorted(tensors):
            total.update(_bytes_of(np.asarray(tensors[name], dtype="<f4")))
        found[key] = total.hexdigest()
    return found


def _bytes_of(tensor: np.ndarray) -> memoryview:
    """The memory of a tensor, without a copy where it lies in C order."""
    return np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data


def _safetensors_parts(tensors: Tensors) -> Iterator[bytes | memoryview]:
    """The parts of a safetensors file: length of the header, header (JSON), and the tensors as they lie in memory.

    Writing the format here, not by its library, needs no second copy of the state in memory, and neither hashing
    nor writing holds the interpreter up while the training steps run.
    """
    kinds = {"float32": "F32", "float64": "F64", "float16": "F16", "int32": "I32", "int64": "I64", "bool": "BOOL"}
    header, offset = {}, 0
    for name, tensor in tensors.items():
        end = offset + tensor.nbytes
        header[name] = {"dtype": kinds[tensor.dtype.name], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    yield len(encoded).to_bytes(8, "little")
    yield encoded
    for tensor in tensors.values():
        yield _bytes_of(tensor)


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
