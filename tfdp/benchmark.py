"""Measures this trainer beside KerasNLP's `fit`, PyTorch and the matrix units: `python -m tfdp.benchmark`.

All systems train the same GPT-2 shapes on the same tokens, each in processes of its own that stay alive. They take
turns: in each round every system trains a few steps while the others rest, so what disturbs the machine disturbs all
alike. A figure is the median over the rounds. Of each peer's variants (precision, compiled or not) the fastest stays.
"""

import importlib.util
import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from tfdp.config import load, require
from tfdp.exits import TrainingError, run_command
from tfdp.machine import available_gpus, free_ports, preparation, share_machine
from tfdp.systems import SYSTEMS, variants
from tfdp.systems.shapes import SHAPES, Shape

START_SECONDS = 900.0  # for a first step, compiling included; and for a round
ROUNDS_OF_SCREENING = 3


@dataclass(frozen=True)
class Config:
    """The benchmark."""

    shapes: str = "tiny,baby,gpt2"
    """Models to train, of tiny, baby, gpt2 and vocabulary (a small model whose logits would take 824 MB)."""
    systems: str | None = None
    """Of tfdp, keras_nlp, pytorch, pytorch_ddp and matrix_peak; null: all whose packages are installed."""
    layouts: str = "1x1"
    """Workers x replicas of each, as 1x1,1x2,2x1; keras_nlp and pytorch run as 1x1, pytorch_ddp as 2x1, 3x1, ..."""
    rounds: int = 7
    """Turns of each system."""
    round_seconds: float = 2.0
    """Length of a turn; one step at least."""
    output: str | None = None
    """A JSON file for the rows."""

    def __post_init__(self) -> None:
        _require_choices("shapes", self.shapes, SHAPES)
        if self.systems is not None:
            _require_choices("systems", self.systems, SYSTEMS)
            for system in self.systems.split(","):
                missing = [name for name in SYSTEMS[system] if importlib.util.find_spec(name) is None]
                require(not missing, "systems", system, f"needs {' and '.join(missing)}: pip install 'tfdp[peers]'")
        for layout in self.layouts.split(","):
            numbers = layout.split("x")
            right = len(numbers) == 2 and all(number.isdigit() and int(number) > 0 for number in numbers)
            require(right, "layouts", self.layouts, "must list WORKERSxREPLICAS: try 1x1,2x1")
        require(self.rounds >= 1, "rounds", self.rounds, "must be at least 1: try 7")
        require(self.round_seconds > 0, "round_seconds", self.round_seconds, "must be positive: try 2")
        folder = Path(self.output or ".").parent
        require(folder.is_dir(), "output", self.output, f"must lie in a folder that exists: make {folder}")

    @property
    def chosen_systems(self) -> list[str]:
        if self.systems is not None:
            return self.systems.split(",")
        return [name for name, packages in SYSTEMS.items() if all(map(importlib.util.find_spec, packages))]


def _require_choices(key: str, value: str, choices: Iterable[str]) -> None:
    wrong = [name for name in value.split(",") if name not in choices]
    require(not wrong, key, value, f"must name some of {','.join(choices)}, with commas between them")


@dataclass(frozen=True)
class Entry:
    """What is measured: a system in one precision and layout, on one shape."""

    shape: Shape
    system: str
    precision: str
    num_workers: int
    num_replicas: int  # of each worker

    def __str__(self) -> str:
        return f"{self.shape.name} {self.system} {self.precision} {self.num_workers}x{self.num_replicas}"


@dataclass(frozen=True)
class Row:
    """A figure of the table."""

    shape: str
    system: str
    precision: str
    num_workers: int
    num_replicas: int  # over all workers
    tokens_per_second: float
    step_seconds: float
    mfu: float | None  # of the matrix peak in the same precision and run; None where that was not measured
    peak_memory_bytes: int
    first_step_seconds: float


# ---------------------------------------------------------------------------------------------------
# One system, alive
# ---------------------------------------------------------------------------------------------------


class Running:
    """The processes of an entry, between their first step and their end.

    Raises:
      TrainingError: a process failed, or did not answer in time.
    """

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.round_steps = 1
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        started = time.monotonic()
        self._processes = self._start()
        self.flops_of_step = self._answers()[0]["flops_of_step"]
        self.first_step_seconds = time.monotonic() - started
        self.step_seconds: list[float] = []

    def settle(self, round_seconds: float) -> None:
        """Chooses the steps of a round; the first steps, which warm caches up, are counted nowhere."""
        self.round(1)
        self.round(2)
        self.round_steps = max(1, round(round_seconds / self.step_seconds[-1]))
        self.step_seconds.clear()

    def round(self, num_steps: int | None = None) -> None:
        """Trains the steps of one round, and notes the seconds of one."""
        count = num_steps or self.round_steps
        self._tell(str(count))
        self.step_seconds.append(max(answer["seconds"] for answer in self._answers()) / count)

    @property
    def median_seconds(self) -> float:
        return statistics.median(self.step_seconds)

    def end(self) -> int:
        """Ends the processes; returns the bytes of memory that they held at most, together."""
        self._tell("end")
        peak = sum(answer["peak_memory_bytes"] for answer in self._answers())
        for process in self._processes:
            process.wait()
        return peak

    def kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()

    def _start(self) -> list[subprocess.Popen[bytes]]:
        entry, several = self.entry, self.entry.num_workers > 1
        command = [sys.executable, "-m", "tfdp.systems", entry.system, entry.shape.name, entry.precision]
        command.append(str(entry.num_replicas))
        addresses = [f"127.0.0.1:{port}" for port in free_ports(entry.num_workers)]
        processes = []
        for index, share in enumerate(share_machine(entry.num_workers)):
            cluster = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
            own = {**share.environment, "TF_CONFIG": json.dumps(cluster)} if several else {}
            process = subprocess.Popen(
                command,
                env={**os.environ, **own},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                preexec_fn=preparation(share.cores if several else ()),
            )
            processes.append(process)
        return processes

    def _tell(self, line: str) -> None:
        for process in self._processes:
            assert process.stdin is not None
            try:
                process.stdin.write(line.encode() + b"\n")
                process.stdin.flush()
            except BrokenPipeError:
                raise self._failure() from None

    def _answers(self) -> list[dict[str, Any]]:
        answers = []
        for process in self._processes:
            assert process.stdout is not None
            ready, _, _ = select.select([process.stdout], [], [], START_SECONDS)
            line = process.stdout.readline() if ready else b""
            if not line:
                raise self._failure()
            answers.append(json.loads(line))
        return answers

    def _failure(self) -> TrainingError:
        self.kill()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return TrainingError(f"{self.entry} ended early: {lines[-1] if lines else 'it said nothing'}")


# ---------------------------------------------------------------------------------------------------
# The contest
# ---------------------------------------------------------------------------------------------------


def measure(shape: Shape, config: Config) -> list[Row]:
    """Starts all systems on one shape, keeps the best variant of each peer, and measures them in turns."""
    running: list[Running] = []
    try:
        for system in config.chosen_systems:
            for layout in config.layouts.split(","):
                num_workers, num_replicas = map(int, layout.split("x"))
                names = variants(system, num_workers, num_replicas, gpu=bool(available_gpus()))
                entries = [Entry(shape, system, name, num_workers, num_replicas) for name in names]
                running += _started(entries, keep_all=system in ("tfdp", "matrix_peak"), config=config)
        for _ in range(config.rounds):
            for each in running:
                each.round()
        return _rows(running)
    except BaseException:
        for each in running:
            each.kill()
        raise


def _started(entries: Sequence[Entry], keep_all: bool, config: Config) -> list[Running]:
    """Starts entries; unless all are to stay, only the fastest of a few rounds in turns does."""
    kept: list[Running] = []
    for entry in entries:
        new = Running(entry)
        new.settle(config.round_seconds)
        kept.append(new)
        if not keep_all and len(kept) == 2:
            for _ in range(ROUNDS_OF_SCREENING):
                for each in kept:
                    each.round()
            kept.sort(key=lambda each: each.median_seconds)
            for each in kept:
                print(f"  {each.entry}: {each.median_seconds * 1e3:,.1f} ms a step", flush=True)
                each.step_seconds.clear()
            kept.pop().end()
    return kept


def _rows(running: Sequence[Running]) -> list[Row]:
    shape = running[0].entry.shape
    flops = shape.flops_per_token * shape.num_tokens
    peaks = {each.entry.precision: each.flops_of_step / each.median_seconds for each in running if each.flops_of_step}
    rows = []
    for each in running:
        entry, seconds = each.entry, each.median_seconds
        if each.flops_of_step:
            seconds *= flops / each.flops_of_step
        peak = peaks.get(entry.precision.partition("+")[0])
        rows.append(
            Row(
                shape=shape.name,
                system=entry.system,
                precision=entry.precision,
                num_workers=entry.num_workers,
                num_replicas=entry.num_workers * entry.num_replicas,
                tokens_per_second=shape.num_tokens / seconds,
                step_seconds=seconds,
                mfu=flops / seconds / peak if peak else None,
                peak_memory_bytes=each.end(),
                first_step_seconds=each.first_step_seconds,
            )
        )
    return rows


def table(rows: Sequence[Row]) -> str:
    """The rows for people; the ratio is that of the fastest tfdp row to each, on one worker with one replica."""
    own = [row.tokens_per_second for row in rows if row.system == "tfdp" and row.num_replicas == 1]
    head = ("system", "precision", "layout", "tokens/s", "tfdp is", "ms/step", "MFU", "memory", "first step")
    lines = ["{:<12} {:<17} {:<6} {:>10} {:>8} {:>9} {:>6} {:>9} {:>10}".format(*head)]
    for row in rows:
        ratio = f"{max(own) / row.tokens_per_second:.2f}x" if own else "-"
        mfu = "-" if row.mfu is None else f"{row.mfu:.0%}"
        layout = f"{row.num_workers}x{row.num_replicas // row.num_workers}"
        lines.append(
            f"{row.system:<12} {row.precision:<17} {layout:<6} {row.tokens_per_second:>10,.0f} {ratio:>8} "
            f"{row.step_seconds * 1e3:>9.1f} {mfu:>6} {row.peak_memory_bytes / 1e6:>6,.0f} MB "
            f"{row.first_step_seconds:>8.1f} s"
        )
    return "\n".join(lines)


def main() -> None:
    description = (
        "Measure tokens per second, MFU, memory and start-up of this trainer, KerasNLP's fit and PyTorch on the same "
        "GPT-2 shapes, in turns; about ten minutes for all on two CPU cores."
    )
    config = load(Config, sys.argv[1:], "python -m tfdp.benchmark", description)
    left_out = [name for name in SYSTEMS if config.systems is None and name not in config.chosen_systems]
    if left_out:
        print(f"left out, not installed: {', '.join(left_out)}; pip install 'tfdp[peers]'")
    rows: list[Row] = []
    for name in config.shapes.split(","):
        print(f"{name}: {SHAPES[name]}", flush=True)
        found = measure(SHAPES[name], config)
        print(table(found) + "\n", flush=True)
        rows += found
        if config.output is not None:
            Path(config.output).write_text(json.dumps([asdict(row) for row in rows], indent=1), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(run_command(main))
