"""Local steps: islands that learn apart for a round are one run under any layout, whoever carries them."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import LONG_RUN, ROOT, summary, tfdp, train_in_layouts

from tfdp.config.sections import DistributionConfig
from tfdp.launch import name_run_directory
from tfdp.parallel.cluster_spec import find_jobs
from tfdp.replay import PastRun
from tfdp.system.exits import ConfigError, TrainingError
from tfdp.training.checkpoint import CheckpointFolder
from trainers import causal_lm
from trainers.causal_lm import Config

SAME = ("weights_sha256", "state_sha256", "validation_loss", "train_loss", "sequences_seen")


def local(num_islands: int = 4, synchronize_every: int = 3, **changes: object) -> dict[str, object]:
    return {
        "synchronization": "local",
        "num_islands": num_islands,
        "synchronize_every": synchronize_every,
        **changes,
    }


def rows_of(run_dir: object) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(str(run_dir), "metrics.jsonl").read_text().splitlines()]


def assert_same(found: dict[str, Any], other: dict[str, Any]) -> None:
    assert {key: found[key] for key in SAME} == {key: other[key] for key in SAME}


@pytest.mark.parametrize(
    ("changes", "replicas"),
    [
        ({"optimizer": {"name": "muon"}, "training": {"jit_compile": "auto"}}, (1, 2)),
        pytest.param(
            {"optimizer": {"name": "muon"}, "training": {"jit_compile": "auto"}}, (1, 4), marks=pytest.mark.slow
        ),
        pytest.param({"distribution": {"outer_optimizer": "average"}}, (1, 2), marks=pytest.mark.slow),
        pytest.param(
            {"training": {"microbatch_size": 1, "jit_compile": False}, "distribution": {"num_islands": 2}},
            (1, 2),
            marks=pytest.mark.slow,
        ),
        pytest.param({"distribution": {"delta_dtype": "int4"}}, (1, 4), marks=pytest.mark.slow),
    ],
    ids=["muon", "muon, four", "average", "micro-batches", "int4"],
)
def test_islands_are_one_run_on_any_number_of_replicas(
    tiny_config: Callable[..., Config], changes: dict[str, dict[str, object]], replicas: tuple[int, ...]
) -> None:
    found, losses = {}, {}
    for count in replicas:
        sections = {
            **changes,
            "model": {"dropout": 0.2},
            "training": {"steps": 10, "evaluate_every": 4, **changes.get("training", {})},
            "distribution": local(**changes.get("distribution", {}), num_replicas=count),
        }
        config = tiny_config(f"{count}", **sections)
        found[count] = causal_lm.train(config)
        with pytest.raises(ConfigError, match=r"a step of islands is not replayed"):
            PastRun.open(str(config.run_dir))
        rows = rows_of(config.run_dir)
        losses[count] = [(row["step"], row["loss"], row["grad_norm"]) for row in rows if "loss" in row]
        # rounds of 3 steps, of which the last is shorter: what is due inside of one happens at its end
        assert [row["step"] for row in rows if "loss" in row] == [3, 6, 9, 10]
        assert [row["step"] for row in rows if "validation_loss" in row] == [6, 9, 10]
    for count in replicas[1:]:
        assert losses[count] == losses[1]
        assert_same(found[count], found[1])


def test_one_step_of_a_round_with_sgd_and_the_mean_is_a_synchronous_step(tiny_config: Callable[..., Config]) -> None:
    shared = {"optimizer": {"name": "sgd", "clip_norm": None, "learning_rate": 0.3}}
    runs = {"every_step": {}, "local": local(4, 1, outer_optimizer="average")}
    losses = {}
    for name, how in runs.items():
        config = tiny_config(name, **shared, distribution=how)
        causal_lm.train(config)
        losses[name] = [row["loss"] for row in rows_of(config.run_dir) if "loss" in row]
    assert losses["every_step"][-1] < losses["every_step"][0] - 0.1
    np.testing.assert_allclose(losses["local"], losses["every_step"], rtol=1e-6)


@pytest.mark.parametrize(
    "replicas", [(2, 1), pytest.param((1, 1), marks=pytest.mark.slow), pytest.param((1, 4), marks=pytest.mark.slow)]
)
def test_rounds_in_two_processes_are_those_of_one(
    tiny_config: Callable[..., Config], replicas: tuple[int, int]
) -> None:
    def run(name: str, steps: int, num_replicas: int) -> dict[str, Any]:
        training = {"steps": steps, "evaluate_every": 6}
        config = tiny_config(
            name, model={"dropout": 0.2}, training=training, distribution=local(num_replicas=num_replicas)
        )
        return causal_lm.train(config)

    run("halves", 6, replicas[0])
    assert_same(run("halves", 12, replicas[1]), run("whole", 12, 1))


def test_a_round_with_a_spike_changes_nothing_or_leaves_out_its_step(tiny_config: Callable[..., Config]) -> None:
    training = {"steps": 60, "spike_threshold": 1e-3}  # so low that a loss above the level is a spike
    config = tiny_config("stop", training=training, distribution=local())
    with pytest.raises(
        TrainingError, match=r"^step \d+ of island \d: the loss .* is above .*; the update was not appl"
    ):
        causal_lm.train(config)
    saved = max(CheckpointFolder(Path(str(config.run_dir), "checkpoints")).steps())
    steps = [row["step"] for row in rows_of(config.run_dir) if "loss" in row]
    assert saved == steps[-1] > 0, "the round before the spike is saved"
    found = causal_lm.train(
        replace(
            config,
            run_dir=f"{config.run_dir}-skip",
            training=replace(config.training, on_spike="skip", max_spikes=1000),
        )
    )
    assert found["step"] == 60
    spikes = [row for row in rows_of(f"{config.run_dir}-skip") if "spike_loss" in row]
    assert spikes and {row["spike_island"] for row in spikes} <= {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"distribution": local(5)}, r"^distribution.num_islands \(5\) must divide training.global_batch_size \(12\)"),
        ({"training": {"precision": "float16"}}, r"^training.precision \(float16\) must be float32 or bfloat16 with"),
        ({"training": {"ema_decay": 0.9}}, r"^training.ema_decay \(0.9\) must be null with"),
        ({"training": {"on_spike": "rollback"}}, r"^training.on_spike \(rollback\) must be stop or skip with"),
    ],
)
def test_what_islands_refuse(
    tiny_config: Callable[..., Config], sections: dict[str, dict[str, object]], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_config("a", **{"distribution": local(), **sections})


@pytest.mark.parametrize(
    ("distribution", "training", "message"),
    [
        (local(6, num_replicas=4), {}, r"^distribution.num_islands \(6\) must be shared .* there are 4: try 1, 3, 6 r"),
        (local(), {"microbatch_size": 2}, r"^training.microbatch_size \(2\) must divide .* \(3\): try 3"),
    ],
)
def test_islands_that_cannot_be_cut_are_refused(
    tiny_config: Callable[..., Config], distribution: dict[str, object], training: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        causal_lm.train(tiny_config("a", distribution=distribution, training=training))


@pytest.mark.parametrize(
    ("cluster", "message"),
    [
        (
            None,
            r"^distribution.strategy \(parameter_server\) needs TF_CONFIG with the jobs chief, worker and ps: try pyt",
        ),
        ({"chief": ["a:1"], "worker": ["a:2"]}, r"^TF_CONFIG \(cluster.ps\) must be there with distribution.strategy"),
        ({"chief": ["a:1"], "worker": ["a:2"], "evaluator": ["a:3"]}, r"must name the jobs chief, worker and ps only"),
    ],
)
def test_a_pool_needs_its_jobs(
    monkeypatch: pytest.MonkeyPatch, cluster: dict[str, list[str]] | None, message: str
) -> None:
    config = DistributionConfig(strategy="parameter_server", synchronization="local")
    monkeypatch.delenv("TF_CONFIG", raising=False)
    if cluster is not None:
        task = {"type": "chief", "index": 0}
        monkeypatch.setenv("TF_CONFIG", json.dumps({"cluster": cluster, "task": task}))
    with pytest.raises(ConfigError, match=message):
        find_jobs(config)


@pytest.mark.parametrize(
    "key",
    [
        {"num_islands": 8},
        {"synchronize_every": 10},
        {"outer_optimizer": "average"},
        {"outer_learning_rate": 1.0},
        {"outer_momentum": 0.5},
        {"delta_dtype": "int4"},
    ],
)
def test_a_key_of_islands_without_islands_is_refused(key: dict[str, Any]) -> None:
    [(name, value)] = key.items()
    rule = rf"^distribution\.{name} \({value}\) is for distribution\.synchronization local: add it, or leave this key"
    with pytest.raises(ConfigError, match=rule):
        DistributionConfig(**key)
    DistributionConfig(synchronization="local", **key)


def test_a_launcher_starts_a_pool_with_its_servers_alone() -> None:
    pool = ["--distribution.strategy=parameter_server", "--distribution.synchronization=local", "--run_dir=r"]
    with pytest.raises(ConfigError, match=r"^num_parameter_servers \(1\) needs distribution.strategy parameter_server"):
        name_run_directory(["--run_dir=r"], 1)
    with pytest.raises(ConfigError, match=r"^distribution.strategy \(parameter_server\) needs tfdp.launch --num_para"):
        name_run_directory(pool, 0)
    assert name_run_directory(pool, 1)[1] == Path("r")


def test_a_pool_hands_out_rounds_of_islands_alone() -> None:
    with pytest.raises(ConfigError, match=r"strategy \(parameter_server\) needs distribution.synchronization local"):
        DistributionConfig(strategy="parameter_server")
    with pytest.raises(ConfigError, match=r"num_replicas \(2\) must be 1 with distribution.strategy parameter_server"):
        DistributionConfig(strategy="parameter_server", synchronization="local", num_replicas=2)


def test_a_run_does_not_change_its_way_to_synchronise(tiny_config: Callable[..., Config]) -> None:
    causal_lm.train(tiny_config("run", training={"steps": 3}))
    with pytest.raises(ConfigError, match=r"distribution.synchronization is every_step there and local here"):
        causal_lm.train(tiny_config("run", training={"steps": 6}, distribution=local()))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_islands_are_one_run_in_any_layout(tmp_path: Path) -> None:
    keys = ["--model.dropout=0.1", "--model.model_dim=32", "--model.num_layers=2", "--model.context_length=32"]
    keys += ["--training.steps=60", "--training.evaluate_every=0", "--training.sample_tokens=0"]
    keys += ["--distribution.synchronization=local", "--distribution.synchronize_every=10"]
    first, *others = train_in_layouts(tmp_path, "runs/islands", keys)
    both = ["--num_workers=2", "--", "--distribution.num_replicas=2", "--run_dir=runs/both", *keys]
    code, _, error = tfdp(tmp_path, "launch", *both, timeout=LONG_RUN)
    assert code == 0, error
    for name in (*others, "runs/both"):
        assert_same(summary(tmp_path / name), summary(tmp_path / first))


def pool_keys(steps: int) -> list[str]:
    keys = {
        "model.dropout": 0.1,
        "model.model_dim": 64,
        "training.steps": steps,
        "training.evaluate_every": 0,
        "training.log_every": 5,
        "distribution.synchronization": "local",
        "distribution.synchronize_every": 5,
        "distribution.delta_dtype": "int8",
    }
    return [f"--{key}={value}" for key, value in keys.items()]


@pytest.mark.slow
@pytest.mark.multiworker
@pytest.mark.timeout(900)
def test_a_pool_that_loses_a_worker_computes_the_run_of_one_process(tmp_path: Path) -> None:
    """The launcher starts the killed worker again; nobody else restarts, and the bits are those of one process."""
    keys = pool_keys(40)
    code, _, error = tfdp(tmp_path, "train", "--run_dir=runs/one", *keys, timeout=LONG_RUN)
    assert code == 0, error
    command = ["tfdp.launch", "--num_workers=2", "--num_parameter_servers=1", "--", "--run_dir=runs/pool", *keys]
    output, metrics = tmp_path / "pool.log", tmp_path / "runs/pool/metrics.jsonl"
    with output.open("wb") as log:
        job = subprocess.Popen(
            [sys.executable, "-m", *command, "--distribution.strategy=parameter_server"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path / "cache")},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 2):
            assert job.poll() is None, output.read_text()
            time.sleep(0.1)
        children = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True).stdout.split()
        assert len(children) == 4  # chief, two workers, parameter server
        os.kill(int(children[1]), signal.SIGKILL)
        assert job.wait(600) == 0, output.read_text()
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    assert output.read_text().count("it is started again") == 1
    assert_same(summary(tmp_path / "runs/pool"), summary(tmp_path / "runs/one"))
