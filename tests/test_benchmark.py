"""The benchmark: its keys, its rows, and that what it measures is what it says."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tfdp.benchmark import Config, Entry, Row, _fastest, best_against_best, table
from tfdp.benchmarking import PRECISIONS, SYSTEMS, contests, own
from tfdp.benchmarking.running import Running
from tfdp.benchmarking.shapes import SHAPES, shuffled_batches, token_ids
from tfdp.models.gpt import GPT
from tfdp.system.exits import ConfigError

KEYS = [
    "shape",
    "system",
    "precision",
    "num_workers",
    "num_replicas",
    "tokens_per_second",
    "step_seconds",
    "mfu",
    "peak_memory_bytes",
    "first_step_seconds",
]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shapes": "tiny,small"}, r"shapes \(tiny,small\) must name some of tiny,baby,gpt2,vocabulary, with commas"),
        ({"systems": "tfdp,jax"}, r"systems \(tfdp,jax\) must name some of keras_nlp,pytorch,pytorch_ddp,tfdp"),
        ({"layouts": "2"}, r"layouts \(2\) must list WORKERSxREPLICAS: try 1x1,2x1"),
        ({"layouts": "0x1"}, r"layouts \(0x1\) must list"),
        ({"rounds": 0}, r"rounds \(0\) must be at least 1"),
        ({"output": "/nowhere/at/all.json"}, r"output .* must lie in a folder that exists"),
    ],
)
def test_wrong_keys_are_refused_in_one_line(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Config(**changes)  # type: ignore[arg-type]


def test_a_shape_counts_the_operations_of_its_model() -> None:
    shape = SHAPES["tiny"]
    model = GPT(own.model_config(shape), shape.vocab_size)
    assert model.flops_per_token() == shape.flops_per_token


@pytest.mark.parametrize("name", SHAPES)
def test_all_systems_get_real_text_below_the_size_of_the_vocabulary(name: str) -> None:
    shape = SHAPES[name]
    ids = token_ids(shape)
    assert ids.min() == 0
    assert ids.max() == min(shape.vocab_size, len(np.unique(ids))) - 1
    batches = shuffled_batches(shape, shape.num_rows)
    first, second = next(batches), next(batches)
    assert first.shape == (shape.num_rows, shape.context_length + 1)
    start = np.flatnonzero(ids[:-1] == first[0, 0])
    assert any(np.array_equal(ids[each : each + shape.context_length + 1], first[0]) for each in start)
    assert not np.array_equal(first, second)


def row(system: str, precision: str, num_workers: int, speed: float) -> Row:
    return Row("tiny", system, precision, num_workers, num_workers, speed, 0.1, None, 10**9, 8.0)


def test_a_ratio_compares_equal_layout_and_precision() -> None:
    rows = [
        row("tfdp", "float32", 1, 300.0),
        row("tfdp", "bfloat16", 1, 600.0),
        row("tfdp", "float32", 2, 250.0),
        row("tfdp", "bfloat16+wire", 2, 700.0),
        row("keras_nlp", "float32+jit", 1, 200.0),
        row("pytorch_ddp", "float32+compile", 2, 100.0),
        row("pytorch_ddp", "bfloat16", 2, 350.0),
        row("pytorch_ddp", "bfloat16+compile+wire", 2, 350.0),
    ]
    head, *lines = table(rows).splitlines()
    assert head.split()[:4] == ["system", "precision", "layout", "tokens/s"]
    assert [line.split()[4] for line in lines] == ["1.00x"] * 4 + ["1.50x", "2.50x", "-", "2.00x"]
    assert sorted(best_against_best(rows)) == [
        "1x1: tfdp (bfloat16) is 3.00x keras_nlp (float32+jit)",
        "2x1: tfdp (bfloat16+wire) is 2.00x pytorch_ddp (bfloat16+compile+wire)",
    ]


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("layout", [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_every_variant_of_a_contest_has_the_precision_and_options_of_its_row(
    system: str, layout: tuple[int, int]
) -> None:
    found = [names for precision in PRECISIONS for names in contests(system, precision, *layout)]
    for names in found:
        assert len({("wire" in name, name.split("+")[0]) for name in names}) == 1
    runs = {"tfdp": True, "pytorch_ddp": layout == (2, 1)}.get(system, layout == (1, 1))
    assert bool(found) == runs


def test_a_variant_that_is_hopelessly_slow_is_dropped_after_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    class Still(Running):
        """Takes the seconds of its name, without a process."""

        def __init__(self, seconds: str) -> None:
            self.step_seconds, self._seconds, self.num_rounds = [], float(seconds), 0

        def round(self, num_steps: int | None = None) -> None:
            self.num_rounds += 1
            self.step_seconds.append(self._seconds)

        def end(self) -> int:
            ended.append(self)
            return 0

    ended: list[Still] = []
    monkeypatch.setattr(Entry, "start", lambda entry: Still(entry.variant))
    entries = [Entry(SHAPES["tiny"], "pytorch", name, 1, 1) for name in ("1.0", "9.0", "0.5")]
    ((kept, _),) = _fastest(entries, 1.0, slowest=math.inf)
    assert kept.variant == "0.5"
    assert sorted(each.num_rounds for each in ended) == [2, 6]  # 9.0 at once, 1.0 after the contest
    assert _fastest(entries, 1.0, slowest=0.4) == []


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_rows_of_a_short_run(tmp_path: Path) -> None:
    output = tmp_path / "rows.json"
    arguments = ["--shapes", "tiny", "--systems", "tfdp,matrix_peak", "--layouts", "1x1,2x1", "--rounds", "2"]
    command = [sys.executable, "-m", "tfdp.benchmark", *arguments, "--round_seconds", "0.3", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=380)
    assert done.returncode == 0, done.stderr
    rows = json.loads(output.read_text())
    assert all(list(each) == KEYS for each in rows)
    found = [(each["system"], each["num_workers"], each["num_replicas"]) for each in rows]
    assert sorted(found) == [
        *[("matrix_peak", 1, 1)] * 2,
        *[("tfdp", 1, 1)] * 2,
        *[("tfdp", 2, 2)] * 3,  # and bfloat16 on the wire
    ]
    for each in rows:
        assert each["tokens_per_second"] == pytest.approx(SHAPES["tiny"].num_tokens / each["step_seconds"])
        assert 0 < each["mfu"] <= 1
        assert each["peak_memory_bytes"] > 100e6
        assert each["first_step_seconds"] > 1
