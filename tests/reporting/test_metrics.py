"""What a run tells: the console line, metrics.jsonl after a resume, TensorBoard's scalars, the matrix peak."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tensorflow as tf

from tfdp.reporting.hardware import matrix_peak
from tfdp.reporting.timing import Attribution, Throughput
from tfdp.reporting.writer import MetricsWriter, step_line
from tfdp.system.messages import duration
from tfdp.tasks.causal_lm import perplexity
from tfdp.training.clock import PHASES
from trainers import causal_lm
from trainers.causal_lm import Config

VALUES = {
    "step": 100,
    "loss": 2.1453,
    "learning_rate": 6e-4,
    "grad_norm": 0.911,
    "step_seconds": 0.0204,
    "tokens_per_second": 37_600.0,
    "mfu": 0.414,
}


def test_the_console_line_is_for_people() -> None:
    assert step_line(VALUES, 2000, 38.2) == (
        "step   100/2000 | loss 2.1453 | lr 6.0e-04 | grad norm 0.91 | 20.4 ms | 37,600 tok/s | mfu 41% | eta 38s"
    )
    few = step_line({**VALUES, "sequences_per_second": 784.31}, 2000, 38.2, few_targets=True)
    assert "| 20.4 ms | 784.3 sequences/s | mfu 41% |" in few


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0s"), (59.4, "59s"), (245, "4m05s"), (7800, "2h10m")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_perplexity_of_a_diverged_loss_is_infinite_and_no_error() -> None:
    assert perplexity(math.log(50.0)) == pytest.approx(50.0)
    assert perplexity(1e4) == math.inf


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    for path in sorted(folder.glob("events*")):
        for record in tf.data.TFRecordDataset(str(path)):
            event = tf.compat.v1.Event.FromString(record.numpy())
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name == "scalars":
                    found.setdefault(value.tag, {})[event.step] = float(tf.make_ndarray(value.tensor))
    return found


def test_rows_and_scalars_are_written_and_a_resume_tells_each_step_once(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, resumed_step=0)
    for step in (10, 20, 30):
        writer.train({**VALUES, "step": step}, 2000, 1.0, {"perplexity": 8.5})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "lo')  # the process was killed here
    writer = MetricsWriter(tmp_path, resumed_step=20)
    writer.train({**VALUES, "step": 30, "loss": 1.5}, 2000, 1.0)
    writer.validation(
        {"step": 30, "validation_loss": 1.0, "validation_bits_per_byte": 1.25, "evaluation_seconds": 0.5},
        2000,
        {"loss": 1.0, "perplexity": math.e, "bits_per_byte": 1.25},
        ["loss 1.0000", "perplexity 2.72", "1.2500 bits per byte"],
    )
    writer.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row.get("loss")) for row in rows] == [(10, 2.1453), (20, 2.1453), (30, 1.5), (30, None)]
    train = scalars(tmp_path / "tensorboard" / "train")
    expected = {"loss", "perplexity", "learning_rate", "grad_norm", "tokens_per_second", "step_seconds", "mfu"}
    assert expected <= train.keys()
    assert train["loss"][10] == pytest.approx(2.1453)
    validation = scalars(tmp_path / "tensorboard" / "validation")
    assert validation["bits_per_byte"] == {30: 1.25}
    assert validation["perplexity"][30] == pytest.approx(math.e)


def test_a_worker_that_is_not_the_chief_writes_nothing(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, resumed_step=0, is_chief=False)
    writer.train(VALUES, 2000, 1.0)
    writer.text("sample", "text", 1)
    writer.close()
    assert list(tmp_path.iterdir()) == []


def test_throughput_is_tokens_by_seconds() -> None:
    speed = Throughput()
    assert speed.tokens_per_second == 0.0
    speed.add(2.0, 1000, 4)
    speed.add(2.0, 3000, 4)
    assert (speed.tokens_per_second, speed.step_seconds) == (1000.0, 0.5)
    speed = Throughput()
    speed.add(2.0, 3, 4, 64)
    assert (speed.sequences_per_second, speed.computed_tokens_per_second(100)) == (32.0, 3200.0)


def test_the_peak_of_known_gpus_is_the_data_sheets_times_their_number() -> None:
    assert matrix_peak("bfloat16", ["NVIDIA H200"] * 4) == 4 * 989e12
    assert 1e9 < matrix_peak("float32", []) < 1e14


# --- Where the time goes ---------------------------------------------------------------------------


def test_every_second_of_a_run_belongs_to_a_part(tiny_config: Callable[..., Config]) -> None:
    config = tiny_config(training={"evaluate_every": 10}, checkpoint={"every_steps": 10})
    started = time.monotonic()
    summary = causal_lm.train(config)
    elapsed = time.monotonic() - started
    parts = {key.removeprefix("seconds/"): value for key, value in summary.items() if key.startswith("seconds/")}
    assert set(parts) == {*PHASES, "compile", "host", "saving", "evaluation"}
    assert all(seconds >= 0 for seconds in parts.values())
    assert sum(parts.values()) < elapsed  # which holds what comes before the loop, too
    rows = [json.loads(line) for line in (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()]  # type: ignore[arg-type]
    steps = [row for row in rows if "loss" in row]
    width, num_rows = config.model.context_length, config.training.global_batch_size
    full = [row for row in steps if row["num_tokens"] == width * num_rows]  # but for the last row of the corpus
    assert len(full) >= len(steps) - 2
    for row in full:
        assert row["sequences_per_second"] * width == pytest.approx(row["tokens_per_second"], rel=1e-12)
        assert row["mfu"] / row["tokens_per_second"] == pytest.approx(full[0]["mfu"] / full[0]["tokens_per_second"])
    assert summary["sequences_per_second"] * width == pytest.approx(summary["tokens_per_second"], rel=0.01)
    for part in (*PHASES, "host"):
        assert sum(row[f"seconds/{part}"] for row in steps) == pytest.approx(parts[part], rel=0.2, abs=0.05), part
    assert {(row["reduction_bytes"], row["num_reductions"]) for row in steps} == {(0, 0)}


def test_laps_add_up_to_the_wall_time() -> None:
    attribution, started = Attribution(), time.monotonic()
    time.sleep(0.03)
    attribution.lap("host")
    time.sleep(0.05)
    assert attribution.lap("host", within={"input": 0.01, "optimizer": 0.02}) >= 0.05
    attribution.restart()
    time.sleep(0.02)
    attribution.lap("saving")
    elapsed = time.monotonic() - started
    assert sum(attribution.total.values()) == pytest.approx(elapsed, rel=0.05)
    assert (attribution.total["input"], attribution.total["optimizer"]) == (0.01, 0.02)
    assert attribution.seconds == {"saving": attribution.total["saving"]}


def test_a_profile_of_chosen_steps_is_written(tiny_config: Callable[..., Config]) -> None:
    config = tiny_config(training={"steps": 6, "profile_steps": "2:4"})
    causal_lm.train(config)
    traces = list(Path(config.run_dir).glob("tensorboard/plugins/profile/*/*.xplane.pb"))  # type: ignore[arg-type]
    assert len(traces) == 1
    assert traces[0].stat().st_size > 1000
