"""Measures this trainer beside KerasNLP's `fit`, PyTorch and the matrix units: `python -m tfdp.benchmark`.

All systems train the same GPT-2 shapes on the same tokens, each in processes of its own that stay alive. They take
turns: in each round every system trains a few steps while the others rest, so what disturbs the machine disturbs all
alike. A figure is the median over the rounds. Precisions come one after the other, and a ratio compares equal precision
and layout; of each peer's variants (compiled or not) the fastest stays. Last, the best of each is set against the best.
"""

import importlib.util
import json
import math
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tfdp.benchmarking import PRECISIONS, SYSTEMS, contests
from tfdp.benchmarking.running import Running
from tfdp.benchmarking.shapes import SHAPES, Shape
from tfdp.config.options import whole_number
from tfdp.config.parsing import load
from tfdp.config.sections import A_DAY, MOST, MOST_DEVICES
from tfdp.system.exits import require, require_at_most, run_command
from tfdp.system.machine import available_cores, available_gpus

MATRIX_FLAGS = ("fma", "avx2", "avx512f", "avx512_bf16", "avx_vnni", "amx_tile", "amx_bf16")
ROUNDS_OF_SCREENING = 3
HOPELESS = 3.0  # times as slow as another variant or precision of the same system: not worth the rounds


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
    """What is measured: a variant of a system in a layout, on one shape."""

    shape: Shape
    system: str
    variant: str
    num_workers: int
    num_replicas: int  # of each worker

    def __str__(self) -> str:
        return f"{self.shape.name} {self.system} {self.variant} {self.num_workers}x{self.num_replicas}"

    def start(self) -> Running:
        """Its processes, after their first step."""
        arguments = [self.system, self.shape.name, self.variant, str(self.num_replicas)]
        return Running(str(self), ["tfdp.benchmarking", *arguments], self.num_workers)


@dataclass(frozen=True)
class Row:
    """A figure of the table."""

    shape: str
    system: str
    precision: str  # the variant: with what compiles the step, and what is sent in bfloat16
    num_workers: int
    num_replicas: int  # over all workers
    tokens_per_second: float
    step_seconds: float
    mfu: float | None  # of the matrix peak in the same precision and run; None where that was not measured
    peak_memory_bytes: int
    first_step_seconds: float

    @property
    def layout(self) -> str:
        return f"{self.num_workers}x{self.num_replicas // self.num_workers}"

    @property
    def conditions(self) -> tuple[str, str, bool]:
        """What two rows must have in common to be compared: layout, precision, and that of what is sent."""
        dtype, *options = self.precision.split("+")
        return self.layout, dtype, "wire" in options


# ---------------------------------------------------------------------------------------------------
# The contest
# ---------------------------------------------------------------------------------------------------


def measure(shape: Shape, precision: str, config: Config, slowest: dict[str, float]) -> list[Row]:
    """Starts all systems on one shape in one precision, keeps the best variant of each, and measures them in turns.

    Args:
      slowest: of each system the seconds of a step beyond which a variant is dropped at once.
    """
    running: list[tuple[Entry, Running]] = []
    try:
        for system in config.chosen_systems:
            for layout in config.layouts.split(","):
                num_workers, num_replicas = map(int, layout.split("x"))
                for names in contests(system, precision, num_workers, num_replicas):
                    entries = [Entry(shape, system, name, num_workers, num_replicas) for name in names]
                    running += _fastest(entries, config.round_seconds, slowest.get(system, math.inf))
        for _ in range(config.rounds):
            for _, each in running:
                each.round()
        return _rows(shape, running)
    except BaseException:
        for _, each in running:
            each.kill()
        raise


def _fastest(entries: Sequence[Entry], round_seconds: float, slowest: float) -> list[tuple[Entry, Running]]:
    """Starts entries and keeps the fastest of a few rounds in turns; none where all take longer than `slowest`."""
    kept: list[tuple[Entry, Running]] = []
    for entry in entries:
        new = entry.start()
        new.round(1)
        if new.step_seconds[-1] > slowest:
            new.round(1)  # to be sure
        seconds = min(new.step_seconds)
        if seconds > slowest:
            print(f"  {entry}: {seconds * 1e3:,.1f} ms for a step; dropped", flush=True)
            new.end()
            continue
        slowest = min(slowest, HOPELESS * seconds)
        new.settle(round_seconds)
        kept.append((entry, new))
        if len(kept) == 2:
            for _ in range(ROUNDS_OF_SCREENING):
                for _, each in kept:
                    each.round()
            kept.sort(key=lambda pair: pair[1].median_seconds)
            for name, each in kept:
                print(f"  {name}: {each.median_seconds * 1e3:,.1f} ms a step", flush=True)
            kept.pop()[1].end()
    for _, each in kept:
        each.step_seconds.clear()
    return kept


def _rows(shape: Shape, running: Sequence[tuple[Entry, Running]]) -> list[Row]:
    flops = shape.flops_per_token * shape.num_tokens
    peak = max(each.flops_per_second for _, each in running) if running else 0.0
    rows = []
    for entry, each in running:
        seconds = flops / each.flops_per_second if each.flops_per_second else each.median_seconds
        rows.append(
            Row(
                shape=shape.name,
                system=entry.system,
                precision=entry.variant,
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
    """The rows for people; a ratio is that of the tfdp row of equal layout and precision, what is sent included."""
    own = {row.conditions: row.tokens_per_second for row in rows if row.system == "tfdp"}
    head = ("system", "precision", "layout", "tokens/s", "tfdp is", "ms/step", "MFU", "memory", "first step")
    lines = ["{:<12} {:<21} {:<6} {:>10} {:>8} {:>9} {:>6} {:>9} {:>10}".format(*head)]
    for row in rows:
        own_speed = own.get(row.conditions)
        ratio = f"{own_speed / row.tokens_per_second:.2f}x" if own_speed and row.system != "matrix_peak" else "-"
        mfu = "-" if row.mfu is None else f"{row.mfu:.0%}"
        lines.append(
            f"{row.system:<12} {row.precision:<21} {row.layout:<6} {row.tokens_per_second:>10,.0f} {ratio:>8} "
            f"{row.step_seconds * 1e3:>9.1f} {mfu:>6} {row.peak_memory_bytes / 1e6:>6,.0f} MB "
            f"{row.first_step_seconds:>8.1f} s"
        )
    return "\n".join(lines)


def best_against_best(rows: Sequence[Row]) -> list[str]:
    """A line for each peer and layout: tfdp's fastest row against the peer's, whatever their precisions."""
    best: dict[tuple[str, str], Row] = {}
    for row in sorted(rows, key=lambda row: row.tokens_per_second):
        best[row.layout, row.system] = row
    lines = []
    for (layout, system), row in best.items():
        own = best.get((layout, "tfdp"))
        if own is not None and system not in ("tfdp", "matrix_peak"):
            ratio = own.tokens_per_second / row.tokens_per_second
            lines.append(f"{layout}: tfdp ({own.precision}) is {ratio:.2f}x {system} ({row.precision})")
    return lines


def describe_devices() -> str:
    """The number of GPUs, or the processor with those of its instructions that set the speed of matrix products."""
    num_gpus = len(available_gpus())
    if num_gpus:
        return f"{num_gpus} GPU{'s' * (num_gpus > 1)}"
    path = Path("/proc/cpuinfo")
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    fields = dict(re.findall(r"^(model name|flags)\s*: (.*)$", text, re.MULTILINE))
    found = [name for name in fields.get("flags", "").split() if name in MATRIX_FLAGS]
    return f"{len(available_cores())} cores of {fields.get('model name', 'an unknown processor')}: {' '.join(found)}"


def main() -> None:
    description = (
        "Measure tokens per second, MFU, memory and start-up of this trainer, KerasNLP's fit and PyTorch on the same "
        "GPT-2 shapes, in turns; about half an hour for all on two CPU cores."
    )
    config = load(Config, sys.argv[1:], "python -m tfdp.benchmark", description)
    left_out = [name for name in SYSTEMS if config.systems is None and name not in config.chosen_systems]
    if left_out:
        print(f"left out, not installed: {', '.join(left_out)}; pip install 'tfdp[peers]'")
    print(f"on {describe_devices()}", flush=True)
    rows: list[Row] = []
    for name in config.shapes.split(","):
        print(f"\n{name}: {SHAPES[name]}", flush=True)
        found: list[Row] = []
        for precision in PRECISIONS:
            slowest = {row.system: HOPELESS * row.step_seconds for row in found if row.system != "matrix_peak"}
            measured = measure(SHAPES[name], precision, config, slowest)
            print(f"\n{name} in {precision}\n{table(measured)}", flush=True)
            found += measured
        lines = best_against_best(found)
        if lines:
            print(f"\n{name}, best against best, one precision measured after the other", *lines, sep="\n", flush=True)
        rows += found
        if config.output is not None:
            Path(config.output).write_text(json.dumps([asdict(row) for row in rows], indent=1), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(run_command(main, output_is_result=True))
