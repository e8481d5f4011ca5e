"""Strategies, replicas, and the workers that the environment names."""

import json
import os
import subprocess
import sys

import pytest

from tfdp.config.sections import DistributionConfig, TrainingConfig
from tfdp.parallel import batch_layout, collectives, distribution
from tfdp.parallel.cluster import Cluster
from tfdp.parallel.cluster_spec import find_cluster
from tfdp.system.exits import ConfigError


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TF_CONFIG", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("num_replicas", [1, 2, 4])
def test_that_many_replicas_are_made(num_replicas: int) -> None:
    strategy = distribution.make_strategy(DistributionConfig(num_replicas=num_replicas))
    assert strategy.num_replicas_in_sync == num_replicas
    assert collectives.num_local_replicas(strategy) == num_replicas
    assert (collectives.num_workers(strategy), collectives.worker_index(strategy)) == (1, 0)
    assert not collectives.on_gpu(strategy)


def test_one_device_is_a_strategy_too() -> None:
    strategy = distribution.make_strategy(DistributionConfig(strategy="one_device"))
    assert strategy.num_replicas_in_sync == 1


def test_the_global_batch_is_cut_evenly_or_refused() -> None:
    training = TrainingConfig(global_batch_size=24)
    assert batch_layout.cut_batch(4, training).microbatch_size == 6
    small = batch_layout.cut_batch(4, TrainingConfig(global_batch_size=24, microbatch_size=2))
    assert small.microbatch_size == 2
    assert batch_layout.describe_batch(4, small) == "24 sequences = 4 replicas x 3 micro-batches x 2"
    parallel = batch_layout.cut_batch(4, training, parallel_microbatches=2)
    assert parallel.microbatch_size == 3
    assert batch_layout.describe_batch(4, parallel) == "24 sequences = 4 replicas x 2 micro-batches x 3, 2 in parallel,"
    with pytest.raises(ConfigError) as caught:
        batch_layout.cut_batch(4, TrainingConfig(global_batch_size=30))
    assert str(caught.value) == "training.global_batch_size (30) must be a multiple of num_replicas (4): try 32"
    with pytest.raises(
        ConfigError, match=r"\(24\) must be a multiple of num_replicas \* training.microbatch_size \(32\)"
    ):
        batch_layout.cut_batch(4, TrainingConfig(global_batch_size=24, microbatch_size=8))


@pytest.mark.parametrize(
    ("cores", "training", "num_local", "num_params", "context_length", "expected"),
    [
        (2, {"global_batch_size": 12}, 1, 800_000, 64, 2),
        (2, {"global_batch_size": 2}, 1, 124_000_000, 256, 1),  # few tokens for many weights
        (2, {"global_batch_size": 8}, 1, 124_000_000, 256, 2),
        (2, {"global_batch_size": 3}, 1, 800_000, 64, 1),  # cannot be halved
        (2, {"global_batch_size": 12}, 2, 800_000, 64, 1),  # each replica has one core
        (6, {"global_batch_size": 12}, 1, 800_000, 64, 4),
        (8, {"global_batch_size": 12, "microbatch_size": 2}, 1, 800_000, 64, 2),  # six micro-batches
        (2, {"global_batch_size": 12, "parallel_microbatches": 1}, 1, 800_000, 64, 1),
        (1, {"global_batch_size": 12, "parallel_microbatches": 4}, 1, 800_000, 64, 4),
    ],
)
def test_micro_batches_are_computed_parallel_where_it_pays(
    monkeypatch: pytest.MonkeyPatch,
    cores: int,
    training: dict[str, int],
    num_local: int,
    num_params: int,
    context_length: int,
    expected: int,
) -> None:
    monkeypatch.setattr(batch_layout, "available_cores", lambda: list(range(cores)))
    config, sizes = DistributionConfig(num_replicas=num_local), TrainingConfig(**training)  # type: ignore[arg-type]
    assert batch_layout.parallel_microbatches(config, sizes, 1, num_params, context_length, 0) == expected


def test_the_threads_that_a_launcher_has_given_are_shared_too() -> None:
    program = """
import tensorflow as tf
from tfdp.parallel import batch_layout
from tfdp.parallel import distribution
from tfdp.config.sections import DistributionConfig, TrainingConfig
parallel = batch_layout.parallel_microbatches(DistributionConfig(), TrainingConfig(global_batch_size=8), 1, 1000, 64, 0)
distribution.make_strategy(DistributionConfig(), parallel_microbatches=parallel)
print(parallel, tf.config.threading.get_intra_op_parallelism_threads())
two = DistributionConfig(num_replicas=2)
print(batch_layout.parallel_microbatches(two, TrainingConfig(global_batch_size=8), 1, 9, 64, 0))
"""
    environment = {**os.environ, "TF_NUM_INTRAOP_THREADS": "4", "CUDA_VISIBLE_DEVICES": "-1"}
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.split() == ["4", "1", "2"]


def test_micro_batches_that_cannot_be_grouped_are_refused() -> None:
    training = TrainingConfig(global_batch_size=12, microbatch_size=4, parallel_microbatches=2)
    with pytest.raises(
        ConfigError,
        match=r"^training.parallel_microbatches \(2\) must divide the 3 micro-batches of a replica: try 1$",
    ):
        batch_layout.parallel_microbatches(DistributionConfig(), training, 1, 1000, 16, 0)


def test_without_a_cluster_there_is_one_worker() -> None:
    assert find_cluster(DistributionConfig()) == Cluster()
    with pytest.raises(ConfigError, match="needs several workers"):
        find_cluster(DistributionConfig(strategy="multi_worker_mirrored"))


def test_tf_config_names_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    content = {"cluster": {"worker": ["a:1", "b:2"]}, "task": {"type": "worker", "index": 1}}
    monkeypatch.setenv("TF_CONFIG", json.dumps(content))
    assert find_cluster(DistributionConfig()) == Cluster(("a:1", "b:2"), 1)
    with pytest.raises(ConfigError, match="is for one worker, but TF_CONFIG or SLURM name 2"):
        find_cluster(DistributionConfig(strategy="mirrored"))


@pytest.mark.parametrize(
    ("nodes", "tasks", "rank", "addresses"),
    [
        ("n[1-2]", "1(x2)", 1, ("n1:20007", "n2:20007")),
        ("n[9-10]", "2,1", 2, ("n9:20007", "n9:20008", "n10:20007")),  # ranks follow SLURM's order, not the text's
    ],
)
def test_slurm_names_the_workers_in_the_order_of_their_ranks(
    monkeypatch: pytest.MonkeyPatch, nodes: str, tasks: str, rank: int, addresses: tuple[str, ...]
) -> None:
    variables = {"JOB_ID": "7", "PROCID": str(rank), "STEP_NODELIST": nodes, "STEP_TASKS_PER_NODE": tasks}
    for name, value in {**variables, "STEP_NUM_TASKS": str(len(addresses))}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert find_cluster(DistributionConfig()) == Cluster(addresses, rank)


def test_a_slurm_job_of_one_task_is_one_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert find_cluster(DistributionConfig()) == Cluster()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a user who is not listed")
def test_the_cache_must_be_named_where_there_is_no_home() -> None:
    program = """
import os
from tfdp.data import sources
from tfdp.config.sections import DataConfig
os.setuid(54321)
for name in ("HOME", "XDG_CACHE_HOME"):
    os.environ.pop(name, None)
print(sources.cache_dir(DataConfig(cache_dir="here")))
try:
    sources.cache_dir(DataConfig())
except sources.ConfigError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200)
    assert result.stdout.splitlines() == [
        "here",
        "data.cache_dir (null) must be named where the user has no home directory: try --data.cache_dir cache",
    ], result.stderr


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "10.0.0.1,n2,::1"),
        ({"no_proxy": "example.org,n2"}, "example.org,n2,10.0.0.1,::1"),
        ({"no_proxy": "example.org", "no_grpc_proxy": "a,b"}, "a,b,10.0.0.1,n2,::1"),
    ],
)
def test_grpc_bypasses_proxies_for_the_workers_alone(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], expected: str
) -> None:
    for name in ("no_proxy", "no_grpc_proxy", "http_proxy"):
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
        monkeypatch.delenv(name)
    for name, value in {**given, "http_proxy": "http://proxy:1"}.items():
        monkeypatch.setenv(name, value)
    distribution._bypass_proxies(Cluster(("10.0.0.1:1", "n2:1", "[::1]:1"), 0))
    found = {name: os.environ.get(name) for name in ("no_grpc_proxy", "http_proxy", "no_proxy")}
    assert found == {
        "no_grpc_proxy": expected,
        "http_proxy": "http://proxy:1",
        "no_proxy": given.get("no_proxy"),
    }
