"""After any stop: a run that goes on is the run that was never stopped."""

import fcntl
import json
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from workers import WORKER, tiny_arguments

from tfdp.system.exits import ConfigError
from trainers import causal_lm
from trainers.causal_lm import Config

TIMEOUT = 120


def rows(config: Config, key: str = "loss") -> dict[int, float]:
    lines = Path(str(config.run_dir), "metrics.jsonl").read_text().splitlines()
    return {row["step"]: row[key] for row in map(json.loads, lines) if key in row}


@pytest.fixture
def undisturbed(tiny_config: Callable[..., Config]) -> tuple[Config, dict[str, object]]:
    config = tiny_config("undisturbed", model={"dropout": 0.1}, optimizer={"schedule": "cosine"})
    return config, causal_lm.train(config)


def first_half(tiny_config: Callable[..., Config], **sections: dict[str, object]) -> Config:
    """A run of 10 of the 20 steps; `sections` say on which layout."""
    common = {"model": {"dropout": 0.1}, "optimizer": {"schedule": "cosine", "schedule_steps": 20}}
    training = {"steps": 10, **sections.pop("training", {})}
    config = tiny_config("halves", **common, training=training, **sections)
    causal_lm.train(config)
    return config


def second_half(tiny_config: Callable[..., Config], **sections: dict[str, object]) -> dict[str, object]:
    common = {"model": {"dropout": 0.1}, "optimizer": {"schedule": "cosine", "schedule_steps": 20}}
    return causal_lm.train(tiny_config("halves", **common, **sections))


def test_two_halves_are_the_whole_to_the_bit(
    tiny_config: Callable[..., Config], undisturbed: tuple[Config, dict[str, object]]
) -> None:
    config = first_half(tiny_config)
    summary = second_half(tiny_config)
    for key in ("step", "sequences_seen", "weights_sha256", "state_sha256", "validation_loss", "train_loss"):
        assert summary[key] == undisturbed[1][key], key
    assert rows(config) == rows(undisturbed[0])


@pytest.mark.slow
def test_saved_under_4_replicas_resumed_under_3(
    tiny_config: Callable[..., Config], undisturbed: tuple[Config, dict[str, object]]
) -> None:
    config = first_half(tiny_config, distribution={"num_replicas": 4})
    second_half(tiny_config, distribution={"num_replicas": 3})
    reference = rows(undisturbed[0])
    assert list(rows(config)) == list(range(1, 21))
    np.testing.assert_allclose(list(rows(config).values()), list(reference.values()), rtol=1e-5)


def test_a_finished_run_named_again_changes_nothing(tiny_config: Callable[..., Config]) -> None:
    config = tiny_config(training={"steps": 3})
    first = causal_lm.train(config)
    again = causal_lm.train(config)
    assert again["state_sha256"] == first["state_sha256"]
    assert again["step"] == 3
    assert list(rows(config)) == [1, 2, 3]


def test_fewer_steps_than_done_are_refused(tiny_config: Callable[..., Config]) -> None:
    causal_lm.train(tiny_config(training={"steps": 3}))
    with pytest.raises(ConfigError, match=r"training.steps \(2\) must be at least the step .* \(3\): try 3"):
        causal_lm.train(tiny_config(training={"steps": 2}))


def test_another_validation_split_is_refused(tiny_config: Callable[..., Config]) -> None:
    causal_lm.train(tiny_config(training={"steps": 1}))
    with pytest.raises(ConfigError, match="split_sha256 is "):
        causal_lm.train(tiny_config(data={"validation_fraction": 0.4}))


def test_no_whole_checkpoint_is_refused_again_and_again(tiny_config: Callable[..., Config]) -> None:
    causal_lm.train(tiny_config(training={"steps": 1}))
    checkpoint = Path(tiny_config().run_dir or "", "checkpoints", "step_00000001")
    (checkpoint / "weights.safetensors").write_bytes(b"")
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"no checkpoint in .* is whole"):
            causal_lm.train(tiny_config(training={"steps": 2}))
    assert checkpoint.is_dir()


def test_another_model_is_refused_with_every_difference(tiny_config: Callable[..., Config]) -> None:
    causal_lm.train(tiny_config(training={"steps": 1}))
    before = Path(tiny_config().run_dir or "", "config.yaml").read_text()
    with pytest.raises(ConfigError) as caught:
        causal_lm.train(tiny_config(model={"model_dim": 32, "num_heads": 4}))
    assert "model.model_dim is 16 there and 32 here" in str(caught.value)
    assert "model.num_heads is 2 there and 4 here" in str(caught.value)
    assert Path(tiny_config().run_dir or "", "config.yaml").read_text() == before


def test_a_truncated_checkpoint_falls_back_to_the_one_before(
    tiny_config: Callable[..., Config],
    undisturbed: tuple[Config, dict[str, object]],
    capfd: pytest.CaptureFixture[str],
) -> None:
    first_half(tiny_config, checkpoint={"every_steps": 5})
    newest = Path(tiny_config("halves").run_dir or "", "checkpoints", "step_00000010")
    weights = newest / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    summary = second_half(tiny_config)
    error = capfd.readouterr().err
    assert f"{weights} is damaged" in error
    assert "falling back" in error
    assert newest.with_suffix(".damaged").is_dir()
    assert summary["state_sha256"] == undisturbed[1]["state_sha256"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_and_says_how_to_go_on(corpus_dir: Path, tmp_path: Path, number: signal.Signals) -> None:
    arguments = [
        *(sys.executable, "-m", "tfdp.train", "--run_dir", str(tmp_path / "run")),
        *("--data.source", f"text:{corpus_dir}/*.txt", "--data.validation_fraction", "0.2"),
        *("--model.num_layers", "1", "--model.model_dim", "16", "--model.num_heads", "2"),
        *("--model.context_length", "16", "--training.global_batch_size", "12", "--training.steps", "1000000"),
        *("--training.jit_compile", "false", "--training.log_every", "100000", "--training.evaluate_every", "0"),
    ]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("first step"):
                break
        time.sleep(1.0)  # now it is deep inside one call of 100,000 steps
        process.send_signal(number)
        asked = time.monotonic()
        _, error = process.communicate(timeout=TIMEOUT)
    finally:
        process.kill()
    assert process.returncode == 75, error
    assert time.monotonic() - asked < 10
    step = max(int(path.name.removeprefix("step_")) for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert error == (
        f"stopped: after step {step} of 1000000, checkpoint saved; resume with --run_dir {tmp_path / 'run'}\n"
    )
    assert step > 1


def test_a_terminal_that_is_lost_saves_a_checkpoint(corpus_dir: Path, tmp_path: Path) -> None:
    """SIGHUP arrives, and whatever is printed from then on fails."""
    arguments = tiny_arguments(corpus_dir, tmp_path / "run", training__steps=1_000_000, training__log_every=100)
    master, slave = pty.openpty()
    try:
        process = subprocess.Popen(
            [*WORKER, *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(slave)
        printed = b""
        while b"step   200" not in printed:
            printed += os.read(master, 1 << 16)
    finally:
        os.close(master)
    try:
        assert process.wait(timeout=TIMEOUT) == 75
    finally:
        process.kill()
    step = max(int(path.name.removeprefix("step_")) for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert step >= 200
