"""What ends a run before its last step: patience and time; and that it stays ended, or goes on, as its keys say."""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from workers import start, tiny_arguments

from tfdp.config.sections import TrainingConfig
from tfdp.training.checkpoint import CheckpointFolder
from tfdp.training.ending import TimeLimit, reason_to_end
from trainers import causal_lm
from trainers.causal_lm import Config

PATIENCE = {"steps": 60, "patience": 3, "evaluate_every": 2}
STORMY = {"learning_rate": 0.2}  # so high that the validation loss goes up and down


def files_of(config: Config) -> dict[str, bytes]:
    folder = Path(str(config.run_dir))
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rows_of(config: Config, key: str) -> dict[int, float]:
    lines = Path(str(config.run_dir), "metrics.jsonl").read_text().splitlines()
    return {row["step"]: row[key] for row in map(json.loads, lines) if key in row}


@pytest.mark.parametrize(
    ("step", "num_not_better", "seconds", "expected"),
    [
        (10, 0, 0.0, "steps"),
        (10, 3, 60.0, "steps"),
        (9, 3, 60.0, "patience"),
        (9, 2, 60.0, "max_seconds"),
        (9, 2, 59.9, None),
    ],
)
def test_a_run_ends_by_the_first_key_that_it_reaches(
    step: int, num_not_better: int, seconds: float, expected: str | None
) -> None:
    training = TrainingConfig(steps=10, patience=3, max_seconds=60.0)
    assert reason_to_end(training, step, num_not_better, seconds) == expected
    if step < 10:
        assert reason_to_end(TrainingConfig(steps=10), step, num_not_better, seconds) is None


def test_a_time_limit_asks_once_after_its_time_and_not_where_the_work_was_done_before() -> None:
    asked: list[float] = []
    deadline = time.monotonic() + 0.1
    with TimeLimit(deadline, lambda: asked.append(time.monotonic())):
        time.sleep(0.3)
    assert len(asked) == 1 and deadline <= asked[0]
    with TimeLimit(time.monotonic() + 0.1, lambda: asked.append(0.0)), TimeLimit(None, lambda: asked.append(0.0)):
        pass
    time.sleep(0.3)
    assert len(asked) == 1


@pytest.fixture
def impatient(tiny_config: Callable[..., Config]) -> Config:
    saving = {"every_steps": 3, "keep": 100}
    return tiny_config("impatient", training=PATIENCE, optimizer=STORMY, checkpoint=saving)


def killed_after(config: Config, step: int) -> Config:
    """A copy of a run as it is where its process dies soon after a step."""
    killed = replace(config, run_dir=f"{config.run_dir}-killed-{step}")
    shutil.copytree(str(config.run_dir), str(killed.run_dir))
    Path(str(killed.run_dir), "summary.json").unlink()
    folder = CheckpointFolder(Path(str(killed.run_dir), "checkpoints"))
    for later in (each for each in folder.steps() if each > step):
        shutil.rmtree(folder.path(later))
    return killed


def test_patience_ends_a_run_where_it_ends_undisturbed_and_it_stays_ended(
    impatient: Config, capfd: pytest.CaptureFixture[str]
) -> None:
    summary = causal_lm.train(impatient)
    losses = rows_of(impatient, "validation_loss")
    best = min(losses, key=lambda step: losses[step])
    assert summary["step"] == max(losses) == best + 2 * 3 < 60
    assert (summary["ended_by"], summary["evaluations_not_better"]) == ("patience", 3)
    assert summary["best_validation_loss"] == losses[best] and summary["validation_loss"] == losses[best + 6]
    line = f"ended      after step {best + 6} of 60: training.patience (3) evaluations in a row had no better"
    assert f"{line} validation_loss\n" in capfd.readouterr().out

    killed = killed_after(impatient, best + 4)  # between the second of the three evaluations and the last
    again = causal_lm.train(killed)
    for key in ("step", "ended_by", "evaluations_not_better", "state_sha256", "best_validation_loss"):
        assert again[key] == summary[key], key
    assert rows_of(killed, "validation_loss") == losses

    before, training = files_of(impatient), impatient.training
    assert causal_lm.train(replace(impatient, training=replace(training, patience=2))) == summary
    assert files_of(impatient) == before
    assert "finished   already: its record stays as it is" in capfd.readouterr().out
    more = causal_lm.train(replace(impatient, training=replace(training, patience=4)))
    assert more["step"] > summary["step"] and len(more["history"]) == 2


@pytest.mark.slow
def test_patience_counts_wherever_a_run_was_killed_and_other_keys_let_it_go_on(impatient: Config) -> None:
    summary = causal_lm.train(impatient)
    for step in range(0, summary["step"], 5):
        again = causal_lm.train(killed_after(impatient, step))
        for key in ("step", "ended_by", "evaluations_not_better", "state_sha256"):
            assert again[key] == summary[key], (key, step)
    before, training = files_of(impatient), impatient.training
    for same in (training, replace(training, steps=summary["step"])):
        assert causal_lm.train(replace(impatient, training=same)) == summary
        assert files_of(impatient) == before
    steps = summary["step"] + 3
    last = causal_lm.train(replace(impatient, training=replace(training, patience=None, steps=steps)))
    assert (last["step"], last["ended_by"]) == (steps, "steps")


def test_seconds_end_a_run_and_count_over_all_its_starts(
    tiny_config: Callable[..., Config], capfd: pytest.CaptureFixture[str]
) -> None:
    def config(seconds: float) -> Config:
        return tiny_config("timed", training={"steps": 1_000_000, "log_every": 1_000_000, "max_seconds": seconds})

    first = causal_lm.train(config(0.1))  # up before the first call of the step, which tells the workers so
    assert (first["step"], first["ended_by"]) == (1, "max_seconds")
    assert first["run_seconds"] >= first["wall_seconds"] > 0.1
    assert "ended      after step 1 of 1000000: training.max_seconds (0.1) have passed\n" in capfd.readouterr().out
    before, summary = files_of(config(0.1)), Path(str(config(0.1).run_dir), "summary.json")
    assert causal_lm.train(config(0.05)) == first
    assert files_of(config(0.1)) == before
    summary.unlink()  # as if the process had died before it wrote it
    again = causal_lm.train(config(0.1))
    assert (again["step"], again["ended_by"], again["state_sha256"]) == (1, "max_seconds", first["state_sha256"])

    seconds = first["run_seconds"] + 5.0
    more = causal_lm.train(config(seconds))  # some seconds of which go by in one call of a million steps
    assert more["step"] > 10 and more["ended_by"] == "max_seconds"
    assert seconds <= more["run_seconds"] < seconds + 30
    state = CheckpointFolder(Path(str(config(0.1).run_dir), "checkpoints")).state(more["step"])
    assert seconds <= state["seconds"] <= more["run_seconds"]
    assert list(rows_of(config(0.1), "loss"))[-1] == more["step"]


@pytest.mark.slow
@pytest.mark.multiworker
@pytest.mark.timeout(400)
def test_workers_end_after_the_same_step_when_the_time_of_the_chief_is_up(corpus_dir: Path, tmp_path: Path) -> None:
    """It is up after 25 s here, whatever the clock of worker 1 says, which began later."""
    keys = {"training__steps": 1_000_000, "training__log_every": 1_000_000, "training__max_seconds": 25.0}
    arguments = tiny_arguments(corpus_dir, tmp_path / "run", **keys)
    folder = CheckpointFolder(tmp_path / "run" / "checkpoints")
    contents = []
    for _ in range(2):  # the second time nothing is left to do
        with start(tmp_path, [arguments] * 2) as job:
            assert job.wait(200) == [0, 0], [job.output(index) for index in range(2)]
            contents.append((job.output(0), (tmp_path / "run" / "summary.json").read_bytes()))
    (first, summary), (second, again) = contents
    found = json.loads(summary)
    assert found["step"] > 1 and folder.steps() == [found["step"]]
    assert f"ended      after step {found['step']} of 1000000: training.max_seconds (25.0) have passed" in first
    assert found["ended_by"] == "max_seconds" and 25.0 <= found["run_seconds"] < 60
    assert again == summary and "finished   already" in second
