"""Measures this trainer beside KerasNLP's `fit`, PyTorch and the matrix units: `python -m tfdp.benchmark`.

All systems train the same GPT-2 shapes on the same tokens, each in processes of its own that stay alive. They take
turns: in each round every system trains a few steps while the others rest, so what disturbs the machine disturbs all
alike. A figure is the median over the rounds. Of each peer's variants (precision, compiled or not) the fastest stays.
"""

import importlib.util
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tfdp.benchmarking import SYSTEMS, variants
from tfdp.benchmarking.running import Running
from tfdp.benchmarking.shapes import SHAPES, Shape
from tfdp.config.options import whole_number
from tfdp.config.parsing import load
from tfdp.config.sections import A_DAY, MOST, MOST_DEVICES
from tfdp.system.exits import require, require_at_most, run_command
from tfdp.system.machine import available_gpus

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
            right = len(numbers) == 2 and all(0 < (whole_number(number) or 0) <= MOST_DEVICES for number in numbers)
            require(right, "layouts", self.layouts, "must list WORKERSxREPLICAS: try 1x1,2x1")
        require_at_most(self, rounds=MOST, round_seconds=A_DAY)
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

    def start(self) -> Running:
        """Its processes, after their first step."""
        arguments = [self.system, self.shape.name, self.precision, str(self.num_replicas)]
        return Running(str(self), ["tfdp.benchmarking", *arguments], self.num_workers)


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
# The contest
# ---------------------------------------------------------------------------------------------------


def measure(shape: Shape, config: Config) -> list[Row]:
    """Starts all systems on one shape, keeps the best variant of each peer, and measures them in turns."""
    running: list[tuple[Entry, Running]] = []
    try:
        for system in config.chosen_systems:
            for layout in config.layouts.split(","):
                num_workers, num_replicas = map(int, layout.split("x"))
                names = variants(system, num_workers, num_replicas, gpu=bool(available_gpus()))
                entries = [Entry(shape, system, name, num_workers, num_replicas) for name in names]
                running += _started(entries, keep_all=system in ("tfdp", "matrix_peak"), config=config)
        for _ in range(config.rounds):
            for _, each in running:
                each.round()
        return _rows(shape, running)
    except BaseException:
        for _, each in running:
            each.kill()
        raise


def _started(entries: Sequence[Entry], keep_all: bool, config: Config) -> list[tuple[Entry, Running]]:
    """Starts entries; unless all are to stay, only the fastest of a few rounds in turns does."""
    kept: list[tuple[Entry, Running]] = []
    for entry in entries:
        new = entry.start()
        new.settle(config.round_seconds)
        kept.append((entry, new))
        if not keep_all and len(kept) == 2:
            for _ in range(ROUNDS_OF_SCREENING):
                for _, each in kept:
                    each.round()
            kept.sort(key=lambda pair: pair[1].median_seconds)
            for name, each in kept:
                print(f"  {name}: {each.median_seconds * 1e3:,.1f} ms a step", flush=True)
                each.step_seconds.clear()
            kept.pop()[1].end()
    return kept


def _rows(shape: Shape, running: Sequence[tuple[Entry, Running]]) -> list[Row]:
    flops = shape.flops_per_token * shape.num_tokens
    peaks = {entry.precision: each.flops_of_step / each.median_seconds for entry, each in running if each.flops_of_step}
    rows = []
    for entry, each in running:
        seconds = each.median_seconds
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
    sys.exit(run_command(main, output_is_result=True))
