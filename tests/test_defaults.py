"""The promises where users stand: Muon, XLA, the schedule and all else that a run without flags has.

The tests of each promise take them apart, mostly with AdamW and without XLA, which start faster.
"""

import json
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_spikes import BATCH, CONTEXT, POSITION, STEP, poisoned  # noqa: F401 (a fixture)
from workers import start

from tfdp.config.sections import CheckpointConfig, DataConfig, ModelConfig, TrainingConfig
from tfdp.replay import PastRun, Replayer, report
from trainers import causal_lm
from trainers.causal_lm import Config

BITS = ("weights_sha256", "state_sha256", "validation_loss", "train_loss", "sequences_seen")
STEPS = 16

Run = tuple[Config, dict[str, object]]


def rows_of(run_dir: str | Path | None) -> list[tuple[int, float, float]]:
    lines = Path(str(run_dir), "metrics.jsonl").read_text().splitlines()
    return [(row["step"], row["loss"], row["grad_norm"]) for row in map(json.loads, lines) if "loss" in row]


@pytest.fixture(scope="module")
def make(corpus_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Config]:
    """Makes configurations with the defaults of every key but the text, the size and the cadence."""
    folder = tmp_path_factory.mktemp("defaults")

    def make(name: str, **sections: dict[str, object]) -> Config:
        config = Config(
            run_dir=str(folder / name),
            model=ModelConfig(num_layers=1, num_heads=2, model_dim=64, context_length=64),
            data=DataConfig(source=f"text:{corpus_dir}/*.txt", validation_fraction=0.2),
            training=TrainingConfig(steps=STEPS, global_batch_size=8, log_every=1, sample_tokens=0),
            checkpoint=CheckpointConfig(every_steps=6),
        )
        changed = {name: replace(getattr(config, name), **changes) for name, changes in sections.items()}
        return replace(config, **changed)

    return make


def trained(config: Config) -> Run:
    return config, causal_lm.train(config)


@pytest.fixture(scope="module")
def run(make: Callable[..., Config]) -> Run:
    return trained(make("run"))


def assert_same(found: Run, expected: Run) -> None:
    assert {key: found[1][key] for key in BITS} == {key: expected[1][key] for key in BITS}
    assert rows_of(found[0].run_dir) == rows_of(expected[0].run_dir)


def test_a_run_that_stops_and_goes_on_is_the_run(make: Callable[..., Config], run: Run) -> None:
    whole = {"schedule_steps": STEPS}
    trained(make("halves", training={"steps": 7}, optimizer=whole))
    assert_same(trained(make("halves", optimizer=whole)), run)


def test_two_replicas_have_the_losses_of_one(make: Callable[..., Config], run: Run) -> None:
    config, summary = trained(make("two", distribution={"num_replicas": 2}))
    assert summary["num_replicas"] == 2
    assert summary["validation_loss"] == pytest.approx(run[1]["validation_loss"], rel=1e-5)
    np.testing.assert_allclose(rows_of(config.run_dir), rows_of(run[0].run_dir), rtol=1e-4)  # gradient norms too
    losses, expected = ([loss for _, loss, _ in rows_of(each.run_dir)] for each in (config, run[0]))
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


@pytest.mark.parametrize("counts", [(1, 2), pytest.param((1, 4), marks=pytest.mark.slow)])
def test_canonical_is_one_run_on_any_replicas(make: Callable[..., Config], counts: tuple[int, ...]) -> None:
    """In float32 with XLA, clipped: the default. It was none with Muon, from the third or tenth step on."""
    runs = []
    for num_replicas in counts:
        layout = {"num_replicas": num_replicas, "reduction": "canonical"}
        runs.append(
            trained(make(f"canonical {num_replicas} of {counts}", distribution=layout, training={"microbatch_size": 2}))
        )
    for other in runs[1:]:
        assert_same(other, runs[0])


def test_any_step_is_replayed_to_the_bit(run: Run) -> None:
    past = PastRun.open(str(run[0].run_dir))
    replayer = Replayer(past, past.open_corpus(), STEPS)
    for step in (STEPS, 1, 7):
        assert report(replayer(step), step, replayer.run).count("equal") == 2, step


def test_a_rollback_is_the_run_without_the_poisoned_window(
    make: Callable[..., Config],
    poisoned: Path,  # noqa: F811
) -> None:
    text = {"source": f"text:{poisoned}/train.txt", "validation_source": f"text:{poisoned}/validation.txt"}
    ways = {
        "model": {"context_length": CONTEXT, "model_dim": 16},
        "optimizer": {"learning_rate": 1e-3, "adam_learning_rate": 1e-2},
        "training": {"steps": STEP + 4, "on_spike": "rollback", "spike_threshold": 6.0, "global_batch_size": BATCH},
    }
    around = trained(replace(make("around", data=text, **ways), seed=3))
    rows = Path(str(around[0].run_dir), "metrics.jsonl").read_text().splitlines()
    assert [row["spike_positions"] for row in map(json.loads, rows) if "spike_positions" in row] == [[POSITION]]
    without = {**text, "excluded_positions": (POSITION,)}
    assert_same(around, trained(replace(make("without", data=without, **ways), seed=3)))


@pytest.mark.slow
@pytest.mark.multiworker
@pytest.mark.timeout(900)
@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_run_that_is_killed_and_started_again_is_the_run(corpus_dir: Path, tmp_path: Path, num_workers: int) -> None:
    keys = {
        "data.source": f"text:{corpus_dir}/*.txt",
        "data.validation_fraction": 0.2,
        "model.num_layers": 1,
        "model.context_length": 64,
        "training.steps": 400,
        "training.log_every": 1,
        "training.sample_tokens": 0,
        "checkpoint.every_steps": 7,
    }
    flags = [text for key, value in keys.items() for text in (f"--{key}", str(value))]
    ends = []
    for name, kills in (("undisturbed", []), ("killed", [30, 120, 260])):
        run_dir = tmp_path / name
        for step in kills:
            with start(tmp_path, [[*flags, "--run_dir", str(run_dir)]] * num_workers) as job:
                job.wait_for(rf"^step +{step}/400", timeout=200)
                job.processes[-1].send_signal(signal.SIGKILL)
                codes = job.wait(200)
                assert codes[-1] == -signal.SIGKILL and codes[:-1] == [76] * (num_workers - 1)
        with start(tmp_path, [[*flags, "--run_dir", str(run_dir)]] * num_workers) as job:
            assert job.wait(300) == [0] * num_workers, job.output(0)
        summary = json.loads((run_dir / "summary.json").read_text())
        ends.append(({key: summary[key] for key in BITS}, rows_of(run_dir)))
    assert ends[0] == ends[1]
    assert len(ends[0][1]) == 400
