"""Spikes: which step is one, which rows caused it, and a run that goes around them."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from workers import start, tiny_arguments

from tfdp.config.sections import DataConfig
from tfdp.data.pipeline import shuffled_index
from tfdp.system.exits import TrainingError
from tfdp.tasks import task
from tfdp.tasks.task import LossFunction, Sums
from tfdp.training.ledger import Ledger, Spike
from tfdp.training.spikes import ENOUGH, WINDOW, loss_limit, offending_rows, recent_from_state, recent_to_state
from trainers import causal_lm
from trainers.causal_lm import Config

BATCH, CONTEXT, STEP, ROW = 12, 16, 37, 5  # the poisoned window stands at row 5 of the step that metrics call 38
POSITION = STEP * BATCH + ROW


@pytest.mark.parametrize("count", [ENOUGH, ENOUGH + 1, WINDOW - 1, WINDOW, WINDOW + 20])
def test_the_limit_is_the_level_plus_noise(count: int) -> None:
    losses_seen = np.random.default_rng(0).normal(2.0, 0.1, count).astype(np.float32)[-WINDOW:]

    def median(values: np.ndarray) -> np.float32:
        return np.sort(values)[len(values) // 2]

    bends = np.diff(losses_seen, 2)
    noise = 1.4826 * median(np.abs(bends - median(bends))) / np.sqrt(6)
    assert 0.05 < noise < 0.2
    expected = median(losses_seen[-5:]) + 10 * noise
    window = tf.constant(recent_from_state(losses_seen.tolist()))
    for function in (loss_limit, tf.function(loss_limit), tf.function(loss_limit, jit_compile=True)):
        assert float(function(window, 10.0)) == pytest.approx(expected, rel=1e-6)


def test_ordinary_losses_are_no_spikes() -> None:
    generator = np.random.default_rng(0)
    worst = 0.0
    for _ in range(2000):
        losses_seen = generator.normal(2.0, 0.1, WINDOW + 1).astype(np.float32)
        level = np.median(losses_seen[-6:-1])
        margin = float(loss_limit(tf.constant(losses_seen[:-1]), 10.0)) - level
        worst = max(worst, (losses_seen[-1] - level) / margin)
    assert worst < 0.7


def test_neither_an_outlier_nor_a_falling_loss_raises_the_limit_far() -> None:
    falling = np.linspace(5.0, 0.1, WINDOW).astype(np.float32) + 3
    assert float(loss_limit(tf.constant(falling), 10.0)) == pytest.approx(3.3 + 0.33, rel=1e-3)
    falling[4] = 1e6
    assert float(loss_limit(tf.constant(falling), 10.0)) == pytest.approx(3.3 + 0.33, rel=1e-3)


@pytest.mark.parametrize("count", [0, 1, ENOUGH - 1])
def test_there_is_no_verdict_before_there_are_enough(count: int) -> None:
    assert float(loss_limit(tf.constant(recent_from_state([1.0] * count)), 10.0)) == math.inf


def test_no_threshold_is_no_limit() -> None:
    assert float(loss_limit(tf.fill([WINDOW], 1.0), None)) == math.inf


def test_the_window_survives_a_checkpoint() -> None:
    losses_seen = [3.5, 2.25, 1.125]
    window = recent_from_state(losses_seen)
    assert window[-3:].tolist() == losses_seen
    assert recent_to_state(window) == losses_seen


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([1.0, 1.1, 0.9, 1.0, 8.0, 1.2], [4]),
        ([1.0, math.nan, 0.9, 1.0, 1.1], [1]),
        ([math.inf, 1.0, 0.9, 1.0, 7.0], [0, 4]),
        ([1.0, 1.1, 0.9, 1.0, 1.2], []),
        ([5.0, 1.0], []),  # too few to say
    ],
)
def test_rows_that_stand_out_are_found(rows: list[float], expected: list[int]) -> None:
    assert offending_rows(np.array(rows), 10.0) == expected


def test_the_ledger_survives_a_checkpoint() -> None:
    ledger = Ledger()
    ledger.record(Spike(38, math.nan, math.inf, 2.5, "loss"), "rollback", [449, 447])
    ledger.record(Spike(50, 9.0, 1.0, 2.5, None), "skip")
    read = Ledger.from_state(json.loads(json.dumps(ledger.to_state())))
    assert read == ledger
    assert read.excluded_positions == {447, 449}
    assert read.spikes[0]["spike_loss"] is None
    assert read.spikes[1]["spike_action"] == "skip"


# ---------------------------------------------------------------------------------------------------
# A poisoned window
# ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text that is easy to predict, but for the window at POSITION, which is noise."""
    num_sequences = 1000
    text = bytearray(b"abcdefgh" * (num_sequences * CONTEXT // 8 - 1))
    window = int(shuffled_index(tf.constant(POSITION, tf.int64), num_sequences, seed=3))
    noise = np.random.default_rng(0).integers(33, 127, CONTEXT - 2)
    text[window * CONTEXT + 1 : window * CONTEXT + CONTEXT - 1] = bytes(noise.tolist())
    text += b"abcdef"  # with an end-of-text token on each side: 1000 whole windows
    folder = tmp_path_factory.mktemp("poisoned")
    (folder / "train.txt").write_bytes(text)
    (folder / "validation.txt").write_bytes(b"abcdefgh" * 50)
    return folder


def poisoned_config(make: Callable[..., Config], poisoned: Path, name: str, **sections: dict[str, object]) -> Config:
    training = {"steps": 60, "spike_threshold": 6.0, **sections.pop("training", {})}
    config = make(name, training=training, checkpoint={"every_steps": 10, "keep": 100}, **sections)
    data = DataConfig(
        source=f"text:{poisoned}/train.txt",
        validation_source=f"text:{poisoned}/validation.txt",
        excluded_positions=config.data.excluded_positions,
    )
    return replace(config, data=data)


def rows_of(config: Config, key: str) -> list[dict[str, object]]:
    lines = Path(str(config.run_dir), "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if key in row]


@pytest.mark.slow
def test_a_rollback_takes_the_average_of_the_weights_back(tiny_config: Callable[..., Config], poisoned: Path) -> None:
    training = {"on_spike": "rollback", "ema_decay": 0.9}
    around = poisoned_config(tiny_config, poisoned, "around", training=training)
    without = poisoned_config(
        tiny_config, poisoned, "without", training=training, data={"excluded_positions": (POSITION,)}
    )
    found, expected = causal_lm.train(around), causal_lm.train(without)
    assert len(rows_of(around, "spike_positions")) == 1
    assert found["state_sha256"] == expected["state_sha256"]


def test_a_rollback_leaves_out_exactly_the_poisoned_window(tiny_config: Callable[..., Config], poisoned: Path) -> None:
    around = poisoned_config(tiny_config, poisoned, "around", training={"on_spike": "rollback"})
    found = causal_lm.train(around)
    (spike,) = rows_of(around, "spike_action")
    assert spike["step"] == STEP + 1
    assert spike["spike_positions"] == [POSITION]
    assert spike["spike_loss"] > spike["spike_limit"]  # type: ignore[operator]
    assert [row["step"] for row in rows_of(around, "loss")] == list(range(1, 61))
    assert found["sequences_seen"] == 60 * BATCH - 1

    configured = poisoned_config(tiny_config, poisoned, "configured", data={"excluded_positions": (POSITION,)})
    expected = causal_lm.train(configured)
    for key in ("weights_sha256", "state_sha256", "validation_loss", "sequences_seen"):
        assert found[key] == expected[key], key
    assert [row["loss"] for row in rows_of(around, "loss")] == [row["loss"] for row in rows_of(configured, "loss")]

    resumed = causal_lm.train(replace(around, training=replace(around.training, steps=61)))  # the ledger is remembered
    assert resumed["sequences_seen"] == 61 * BATCH - 1
    assert len(json.loads(Path(str(around.run_dir), "checkpoints/step_00000061/state.json").read_text())["ledger"]) == 2


def test_skip_goes_on_without_the_update(tiny_config: Callable[..., Config], poisoned: Path) -> None:
    config = poisoned_config(tiny_config, poisoned, "skip", training={"on_spike": "skip", "log_every": 7})
    found = causal_lm.train(config)
    (spike,) = rows_of(config, "spike_action")
    assert (spike["step"], spike["spike_action"], spike["spike_positions"]) == (STEP + 1, "skip", [])
    assert found["step"] == 60
    again = poisoned_config(tiny_config, poisoned, "resumed", training={"on_spike": "skip", "steps": 38})
    causal_lm.train(again)
    resumed = causal_lm.train(replace(again, training=replace(again.training, steps=60)))
    assert resumed["state_sha256"] == found["state_sha256"]


def test_stop_saves_what_was_good(tiny_config: Callable[..., Config], poisoned: Path) -> None:
    config = poisoned_config(tiny_config, poisoned, "stop")
    with pytest.raises(TrainingError, match=r"^step 38: the loss .* is above .*step_00000037.*--training.on_spike"):
        causal_lm.train(config)
    found = causal_lm.train(replace(config, training=replace(config.training, on_spike="rollback")))
    assert found["step"] == 60
    assert found["sequences_seen"] == 60 * BATCH - 1


def nan_at(position: int) -> Callable[..., LossFunction]:
    """The next-token task, but the loss of one position is not a number."""
    original = task.row_losses

    def row_losses(*arguments: object) -> LossFunction:
        of_rows = original(*arguments)  # type: ignore[arg-type]

        def poisoned_losses(rows: dict[str, tf.Tensor], step: tf.Tensor) -> Sums:
            sums, counts = of_rows(rows, step)
            hit = (rows["position"] == position) & (counts > 0)
            return sums * tf.where(hit, np.float64(math.nan), np.float64(1.0)), counts

        return poisoned_losses

    return row_losses


@pytest.mark.parametrize("num_replicas", [1, 2])
def test_a_loss_that_is_not_finite_is_gone_around(
    tiny_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, num_replicas: int
) -> None:
    distribution = {"num_replicas": num_replicas}
    changes = {"training": {"steps": 12, "on_spike": "rollback"}, "distribution": distribution}
    monkeypatch.setattr(task, "row_losses", nan_at(100))
    config = tiny_config("around", **changes)
    found = causal_lm.train(config)
    (spike,) = rows_of(config, "spike_action")
    assert (spike["step"], spike["spike_positions"], spike["spike_loss"]) == (9, [100], None)
    assert spike["spike_tensor"] is not None
    monkeypatch.undo()
    expected = causal_lm.train(tiny_config("configured", **changes, data={"excluded_positions": (100,)}))
    assert found["state_sha256"] == expected["state_sha256"]


def test_spikes_without_end_stop_the_run(tiny_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    original = task.row_losses

    def always_nan(*arguments: object) -> LossFunction:
        of_rows = original(*arguments)  # type: ignore[arg-type]

        def poisoned_losses(rows: dict[str, tf.Tensor], step: tf.Tensor) -> Sums:
            sums, counts = of_rows(rows, step)
            return sums * np.float64(math.nan), counts

        return poisoned_losses

    monkeypatch.setattr(task, "row_losses", always_nan)
    for on_spike, message in (
        ("skip", r"^training.max_spikes \(3\) is reached at step 4"),
        ("rollback", r"^step 1: .* not finite, though its whole batch is excluded"),
    ):
        config = tiny_config(on_spike, training={"steps": 30, "on_spike": on_spike, "max_spikes": 3})
        with pytest.raises(TrainingError, match=message):
            causal_lm.train(config)


@pytest.mark.multiworker
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_workers_go_around_a_spike_together(tmp_path: Path, poisoned: Path) -> None:
    changes = {
        "seed": 3,
        "data.source": f"text:{poisoned}/train.txt",
        "data.validation_source": f"text:{poisoned}/validation.txt",
        "checkpoint.every_steps": 10,
        "training.spike_threshold": 6.0,
        "optimizer.warmup_steps": 5,
    }
    around = tiny_arguments(poisoned, tmp_path / "around", **changes, training__on_spike="rollback")
    with start(tmp_path, [around] * 2) as job:
        assert job.wait() == [0, 0], job.output(1)
    configured = tiny_arguments(poisoned, tmp_path / "configured", **changes, data__excluded_positions=f"[{POSITION}]")
    with start(tmp_path, [configured] * 2) as job:
        assert job.wait() == [0, 0], job.output(1)
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("around", "configured")]
    for key in ("weights_sha256", "state_sha256", "validation_loss", "sequences_seen"):
        assert summaries[0][key] == summaries[1][key], key
    assert summaries[0]["sequences_seen"] == 60 * BATCH - 1
