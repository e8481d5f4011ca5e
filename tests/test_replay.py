"""Past steps, run again: the same bits, the sequences they were hardest for, and where those come from."""

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_spikes import BATCH, POSITION, STEP, poisoned, poisoned_config  # noqa: F401 (a fixture)

from tfdp.config.parsing import to_yaml
from tfdp.replay import PastRun, Replay, Replayer, compare, config_of_layout, main, report
from tfdp.system.exits import ConfigError, TrainingError, run_command
from trainers import causal_lm
from trainers.causal_lm import Config


@pytest.fixture
def letters(tmp_path: Path) -> Path:
    """Sixty documents, each of its own two characters, so short that many windows span two of them."""
    folder = tmp_path / "letters"
    folder.mkdir()
    generator = np.random.default_rng(1)
    for index in range(60):
        text = "".join(generator.choice([chr(0x41 + index), "."], 40 + index))
        (folder / f"{index:02d}.txt").write_text(text, encoding="utf-8")
    return folder


def trained(make: Callable[..., Config], letters: Path, name: str = "run", **sections: dict[str, object]) -> Config:
    defaults: dict[str, dict[str, object]] = {
        "data": {"source": f"text:{letters}/*.txt"},
        "model": {"dropout": 0.1},
        "checkpoint": {"every_steps": 7, "keep": 100},
    }
    config = make(name, **{**defaults, **sections})
    causal_lm.train(config)
    return config


def replayer_of(config: Config, step: int, num_replicas: int | None = None) -> Replayer:
    run = PastRun.open(str(config.run_dir))
    return Replayer(run, run.open_corpus(), step, num_replicas)


def assert_equal_bits(found: Replay, run: PastRun) -> None:
    row = run.logged[found.step]
    for replayed, logged in ((found.loss, row["loss"]), (found.grad_norm, row["grad_norm"])):
        assert np.float32(replayed).tobytes() == np.float32(logged).tobytes(), found.step
    assert report(found, found.step, run).count("equal") == 2


# --- The same bits ---------------------------------------------------------------------------------


def test_any_past_step_is_replayed_to_the_bit(tiny_config: Callable[..., Config], letters: Path) -> None:
    config = trained(tiny_config, letters, training={"steps": 40})
    replayer = replayer_of(config, 40)
    assert list(replayer.run.states) == [7, 14, 21, 28, 35, 40]
    steps = [23, 1, *np.random.default_rng(0).choice(np.arange(2, 41), 8, replace=False).tolist(), 5]
    num_spanning = 0
    for step in steps:
        found = replayer(step, num_sequences=12)
        assert_equal_bits(found, replayer.run)
        assert found.refused is None
        assert sorted(one.position for one in found.worst) == list(range((step - 1) * 12, step * 12))
        losses = [one.loss for one in found.worst]
        assert losses == sorted(losses, reverse=True)
        assert np.mean(losses) == pytest.approx(found.loss, rel=1e-2)  # the last window of the text is shorter
        for one in found.worst:
            letters_seen = dict.fromkeys(re.findall(r"[^.\n]", one.text))
            by_letter = [f"{ord(letter) - 0x41:02d}.txt" for letter in letters_seen]
            assert [name for name in one.documents if name in by_letter] == by_letter
            assert len(one.documents) == len([part for part in one.text.split("\n\n") if part])
            num_spanning += len(one.documents) == 2
    assert num_spanning > 10
    assert replayer._components.train_step._run.experimental_get_tracing_count() == 1


def test_a_canonical_run_has_the_same_bits_on_fewer_replicas(tiny_config: Callable[..., Config], letters: Path) -> None:
    config = trained(
        tiny_config,
        letters,
        training={"steps": 12, "microbatch_size": 3, "verify_every": 0},
        distribution={"num_replicas": 2, "reduction": "canonical"},
    )
    replayer = replayer_of(config, 10, num_replicas=1)
    assert replayer.strategy.num_replicas_in_sync == 1
    found = replayer(10)
    assert_equal_bits(found, replayer.run)
    assert len(found.worst) == 3


# --- Spikes ----------------------------------------------------------------------------------------


def test_a_step_after_a_rollback_is_replayed_as_it_finally_happened(
    tiny_config: Callable[..., Config],
    poisoned: Path,  # noqa: F811
) -> None:
    config = poisoned_config(tiny_config, poisoned, "around", training={"on_spike": "rollback"})
    causal_lm.train(config)
    replayer = replayer_of(config, STEP + 1)
    assert replayer.run.excluded_positions == {POSITION}
    for step in (STEP + 1, STEP - 4, 59):
        found = replayer(step, num_sequences=BATCH)
        assert_equal_bits(found, replayer.run)
        assert POSITION not in [one.position for one in found.worst]
        assert len(found.worst) == BATCH - (step == STEP + 1)


def test_a_skipped_step_is_replayed_and_those_after_it(
    tiny_config: Callable[..., Config],
    poisoned: Path,  # noqa: F811
) -> None:
    config = poisoned_config(tiny_config, poisoned, "skipped", training={"on_spike": "skip"})
    causal_lm.train(config)
    replayer = replayer_of(config, STEP + 1)
    found = replayer(STEP + 1)
    assert_equal_bits(found, replayer.run)
    assert found.refused is not None
    assert found.refused.describe() in report(found, STEP + 1, replayer.run)
    assert found.worst[0].position == POSITION
    assert_equal_bits(replayer(STEP + 3), replayer.run)


def test_the_spike_that_ended_a_run_is_told(tiny_config: Callable[..., Config], poisoned: Path) -> None:  # noqa: F811
    config = poisoned_config(tiny_config, poisoned, "stopped", training={"on_spike": "stop"})
    with pytest.raises(TrainingError) as stop:
        causal_lm.train(config)
    replayer = replayer_of(config, STEP + 1)
    assert replayer.run.reached == STEP
    found = replayer(STEP + 1)
    assert (found.step, found.worst[0].position) == (STEP + 1, POSITION)
    assert found.refused is not None and found.loss == found.refused.loss > found.refused.limit
    assert str(stop.value).startswith(found.refused.describe())
    told = report(found, STEP + 1, replayer.run)
    assert f"step {STEP + 1} was not logged" in told
    assert "loss       " + str(np.float32(found.loss)) in told
    with pytest.raises(ConfigError, match=rf"^step \({STEP + 2}\) must lie in \[1, 38\]: the run has reached {STEP}$"):
        replayer(STEP + 2)
    object.__setattr__(replayer.run, "reached", 60)  # as if it had gone on, under other rules
    found = replayer(STEP + 5)
    assert found.step == STEP + 1
    assert "the replay ends at step 38, before step 42" in report(found, STEP + 5, replayer.run)


# --- The command -----------------------------------------------------------------------------------


def test_the_command_tells_the_step_and_its_worst_sequences(tiny_config: Callable[..., Config], letters: Path) -> None:
    config = trained(tiny_config, letters, training={"steps": 9, "verify_every": 0}, distribution={"num_replicas": 2})
    run_dir = Path(str(config.run_dir))
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    command = [sys.executable, "-m", "tfdp.replay", "--run_dir", str(run_dir), "--step", "9", "--num_sequences", "2"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=dict(os.environ))
    assert (result.returncode, result.stderr) == (0, "")
    row = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()][8]
    loss, grad_norm = (re.escape(str(np.float32(row[key]))) for key in ("loss", "grad_norm"))
    sequence = r"\d\.\d{4} nats per token, position (96|97|98|99|10[0-7]), from \d\d\.txt(, \d\d\.txt)?\n  \| \S+\n"
    expected = (
        rf"run        \S+/run\n"
        rf"step       9 of 9, from the checkpoint of step 7\n"
        rf"devices    2 replicas on CPU, 1 worker\n\n"
        rf" +replayed +logged +bits\n"
        rf"loss +{loss} +{loss} +equal\n"
        rf"grad norm +{grad_norm} +{grad_norm} +equal\n\n"
        rf"sequences of its batch with the highest loss per token, before the update:\n\n{sequence}\n{sequence}"
    )
    assert re.fullmatch(expected, result.stdout), result.stdout
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == before, "nothing is written"


def test_mistakes_of_users_are_told_in_one_line(
    tiny_config: Callable[..., Config],
    letters: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = tiny_config(data={"source": f"text:{letters}/*.txt"}, training={"steps": 2})
    run = Path(str(config.run_dir))
    saved = run / "checkpoints" / "step_00000002"
    saved.mkdir(parents=True)
    (run / "config.yaml").write_text(to_yaml(config))
    layout = {"num_workers": 1, "num_replicas": 1, "microbatch_size": 12}
    (saved / "state.json").write_text(json.dumps({"identity": {"corpus_sha256": "0" * 64}, "layout": layout}))

    def assert_refused(message: str, *arguments: str, run_dir: str = str(run)) -> None:
        monkeypatch.setattr(sys, "argv", ["tfdp.replay", "--run_dir", run_dir, *arguments])
        assert run_command(main) == 2
        out, error = capsys.readouterr()
        assert out == ""
        assert re.fullmatch(f"error: {message}\n", error), error

    assert_refused(r"run_dir \(\S+/none\) must be the directory of a run: .*", run_dir=f"{tmp_path}/none")
    assert_refused(r"step \(0\) must be at least 1, .*", "--step", "0")
    assert_refused(r"step \(3\) must lie in \[1, 2\]: the run has 2", "--step", "3")
    assert_refused(
        r"distribution\.num_replicas \(2\) must divide the number of micro-batches of a step of this run \(1\): try 1",
        *("--distribution.num_replicas", "2"),
    )
    assert_refused(
        r"data\.source \(text:\S+\) must be the text that the run was trained on: its sha256 was 0+\.\.\., .*"
    )
    (run / "config.yaml").write_text(to_yaml(replace(config, trainer="my.recipe")))
    (tmp_path / "my").mkdir()
    (tmp_path / "my" / "recipe.py").write_text("from trainers.causal_lm import Config, train\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert_refused(r"trainer \(my\.recipe\) must be a recipe with a make_model function to be replayed")


def test_a_run_that_told_nothing_yet_is_replayed_from_its_seed(
    tiny_config: Callable[..., Config], letters: Path
) -> None:
    config = trained(tiny_config, letters, training={"steps": 2})
    expected = PastRun.open(str(config.run_dir)).logged[1]
    Path(str(config.run_dir), "metrics.jsonl").write_text('{"step": 1, "lo')
    for path in Path(str(config.run_dir), "checkpoints").iterdir():
        path.rename(path.with_suffix(".suspect"))
    replayer = replayer_of(config, 1)
    assert (replayer.run.reached, dict(replayer.run.states)) == (0, {})
    found = replayer(1, num_sequences=0)
    assert (found.loss, found.grad_norm, found.worst) == (expected["loss"], expected["grad_norm"], [])


def test_the_layout_is_that_of_the_process_that_carried_the_step(tiny_config: Callable[..., Config]) -> None:
    config = tiny_config(training={"global_batch_size": 24})
    run = Path(str(config.run_dir))
    for step, num_workers, num_replicas, microbatch_size in ((7, 1, 1, 24), (14, 2, 4, 3), (21, 1, 2, 12)):
        saved = run / "checkpoints" / f"step_{step:08d}"
        saved.mkdir(parents=True)
        layout = {"num_workers": num_workers, "num_replicas": num_replicas, "microbatch_size": microbatch_size}
        (saved / "state.json").write_text(json.dumps({"layout": layout}))
    (run / "config.yaml").write_text(to_yaml(config))
    past = PastRun.open(str(run))
    for step, num_replicas, microbatch_size in (
        (1, 1, 24),
        (7, 1, 24),
        (8, 4, 3),
        (14, 4, 3),
        (21, 2, 12),
        (25, 2, 12),
    ):
        found = config_of_layout(past, step, None)
        assert (found.distribution.num_replicas, found.training.microbatch_size) == (num_replicas, microbatch_size)
        assert found.distribution.strategy == "auto"
    assert config_of_layout(past, 8, 2).distribution.num_replicas == 2
    assert [past.checkpoint_before(step) for step in (1, 7, 8, 14, 15)] == [None, None, 7, 7, 14]


@pytest.mark.parametrize(
    ("replayed", "logged", "expected"),
    [
        (0.1, float(np.float32(0.1)), "equal"),
        (2.0, 2.0 + 2**-22, r"different \(relative difference 1\.2e-07\)"),
        (math.nan, None, "not finite in both"),
        (2.0, None, "different"),
    ],
)
def test_bits_are_compared_as_float32(replayed: float, logged: float | None, expected: str) -> None:
    assert re.fullmatch(expected, compare(replayed, logged))
