"""The benchmark: its keys, its rows, and that what it measures is what it says."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tfdp.benchmark import Config, Row, table
from tfdp.benchmarking import own
from tfdp.benchmarking.shapes import SHAPES, shuffled_windows, token_ids
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
    windows = shuffled_windows(shape)
    first, second = next(windows), next(windows)
    assert first.shape == (shape.context_length + 1,)
    assert not np.array_equal(first, second)


def test_the_table_says_how_many_times_faster_tfdp_is() -> None:
    fast = Row("tiny", "tfdp", "float32", 1, 1, 300.0, 0.1, 0.5, 10**9, 8.0)
    slow = Row("tiny", "keras_nlp", "float32+jit", 1, 1, 200.0, 0.15, None, 2 * 10**9, 12.5)
    head, *lines = table([fast, slow]).splitlines()
    assert head.split()[:4] == ["system", "precision", "layout", "tokens/s"]
    assert "1.00x" in lines[0]
    assert "1.50x" in lines[1]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_rows_of_a_short_run(tmp_path: Path) -> None:
    output = tmp_path / "rows.json"
    arguments = ["--shapes", "tiny", "--systems", "tfdp,matrix_peak", "--layouts", "1x1,2x1", "--rounds", "2"]
    command = [sys.executable, "-m", "tfdp.benchmark", *arguments, "--round_seconds", "0.3", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=380)
    assert done.returncode == 0, done.stderr
    rows = json.loads(output.read_text())
    assert all(list(row) == KEYS for row in rows)
    found = [(row["system"], row["num_workers"], row["num_replicas"]) for row in rows]
    assert sorted(found) == [
        *[("matrix_peak", 1, 1)] * 2,
        *[("tfdp", 1, 1)] * 2,
        *[("tfdp", 2, 2)] * 3,  # and bfloat16 on the wire
    ]
    for row in rows:
        assert row["tokens_per_second"] == pytest.approx(SHAPES["tiny"].num_tokens / row["step_seconds"])
        assert 0 < row["mfu"] <= 1.05
        assert row["peak_memory_bytes"] > 100e6
        assert row["first_step_seconds"] > 1
