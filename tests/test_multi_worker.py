"""Several processes on loopback: the same run as one, stopped together, and aware of each other's end."""

import json
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from workers import Job, free_ports, start, tiny_arguments

from tfdp.parallel.cluster import probe

pytestmark = [pytest.mark.multiworker, pytest.mark.timeout(240)]


def losses(run_dir: Path) -> list[float]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def summary(run_dir: Path) -> dict[str, float]:
    return json.loads((run_dir / "summary.json").read_text())


def run(tmp_path: Path, corpus: Path, name: str, num_workers: int, **changes: object) -> Path:
    arguments = tiny_arguments(corpus, tmp_path / name, **changes)
    with start(tmp_path, [arguments] * num_workers) as job:
        codes = job.wait()
        assert codes == [0] * num_workers, [job.output(index) for index in range(num_workers)]
    return tmp_path / name


def log_of(tmp_path: Path) -> str:
    """What the chief of the only job of this folder has printed."""
    [log] = tmp_path.glob("worker-0-*.log")
    return log.read_text()


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, corpus_dir: Path) -> Path:
    return run(tmp_path_factory.mktemp("one"), corpus_dir, "one", 1, model__dropout=0.1)


@pytest.mark.parametrize(("num_workers", "num_replicas"), [(2, 1), (2, 2), pytest.param(3, 1, marks=pytest.mark.slow)])
def test_many_workers_are_one_process(
    tmp_path: Path, corpus_dir: Path, one: Path, num_workers: int, num_replicas: int
) -> None:
    changes = {"model__dropout": 0.1, "distribution__num_replicas": num_replicas}
    changes["training__sample_tokens"] = 300  # the chief samples while the others leave, and is not alarmed
    many = run(tmp_path, corpus_dir, "many", num_workers, **changes)
    np.testing.assert_allclose(losses(many), losses(one), rtol=1e-5)
    assert len(losses(many)) == 60
    assert summary(many)["sequences_seen"] == summary(one)["sequences_seen"] == 60 * 12
    assert summary(many)["num_workers"] == num_workers
    assert summary(many)["num_replicas"] == num_workers * num_replicas
    assert summary(many)["validation_loss"] == pytest.approx(summary(one)["validation_loss"], rel=1e-5)
    way = "TCP" if num_replicas == 1 else "gRPC"
    assert f"{num_workers * num_replicas} replicas on CPU, {num_workers} workers over {way}" in log_of(tmp_path)


@pytest.mark.parametrize("bytes_per_pack", [pytest.param(None, marks=pytest.mark.slow), 1024])
def test_gradients_travel_in_bfloat16(tmp_path: Path, corpus_dir: Path, one: Path, bytes_per_pack: int | None) -> None:
    """Over plain TCP in one piece, and in packs through TensorFlow."""
    wire: dict[str, object] = {"distribution__wire_dtype": "bfloat16"}
    if bytes_per_pack:
        wire["distribution__bytes_per_pack"] = bytes_per_pack
    many = run(tmp_path, corpus_dir, "many", 2, model__dropout=0.1, **wire)
    rows = [json.loads(line) for line in (many / "metrics.jsonl").read_text().splitlines()]
    num_params = int(summary(many)["num_params"])
    num_packs = -(-num_params * 2 // bytes_per_pack) + 1 if bytes_per_pack else 1  # one for what is told of the step
    assert rows[0]["num_reductions"] == num_packs
    assert num_params * 2 < rows[0]["reduction_bytes"] < num_params * 2 + 1000  # and digests
    np.testing.assert_allclose(losses(many)[:5], losses(one)[:5], rtol=2e-3)
    assert losses(many)[-1] == pytest.approx(losses(one)[-1], rel=0.02)


def test_workers_with_different_keys_are_refused_on_all(tmp_path: Path, corpus_dir: Path) -> None:
    arguments = [tiny_arguments(corpus_dir, tmp_path / "run", optimizer__beta_1=beta) for beta in (0.8, 0.9)]
    with start(tmp_path, arguments) as job:
        assert job.wait() == [2, 2]
        for index in range(2):
            errors = [line for line in job.output(index).splitlines() if line.startswith("error: ")]
            assert len(errors) == 1
            assert errors[0].startswith("error: optimizer.beta_1 (0.")
            assert f"worker {1 - index} (127.0.0.1:" in errors[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("no_proxy", [pytest.param("", marks=pytest.mark.slow), "example.org"])
def test_proxies_of_the_environment_do_not_stand_between_workers(
    tmp_path: Path, corpus_dir: Path, no_proxy: str
) -> None:
    nowhere = "http://127.0.0.1:9"
    names = ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy")
    proxies = {spelling: nowhere for name in names for spelling in (name, name.upper())}
    arguments = tiny_arguments(corpus_dir, tmp_path / "run", training__steps=5)
    with start(tmp_path, [arguments] * 2, environment={**proxies, "no_proxy": no_proxy}) as job:
        assert job.wait() == [0, 0]


def long_job(tmp_path: Path, corpus: Path, **changes: object) -> Job:
    """Two workers that would train for hours, seen to train."""
    settings = {"training__steps": 1_000_000, "training__log_every": 50, "checkpoint__every_steps": 100, **changes}
    job = start(tmp_path, [tiny_arguments(corpus, tmp_path / "run", **settings)] * 2)
    job.wait_for(r"^step +200/")
    return job


def newest_step(run_dir: Path) -> int:
    return max(int(path.name.removeprefix("step_")) for path in (run_dir / "checkpoints").glob("step_*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)])
def test_a_signal_at_one_worker_stops_all_after_the_same_step(
    tmp_path: Path, corpus_dir: Path, number: signal.Signals
) -> None:
    with long_job(tmp_path, corpus_dir) as job:
        asked = time.monotonic()
        job.processes[1].send_signal(number)
        assert job.wait() == [75, 75]
        assert time.monotonic() - asked < 10
        ends = [job.output(index).splitlines()[-1] for index in range(2)]
    step = newest_step(tmp_path / "run")
    assert ends[0] == ends[1]
    assert ends[0].startswith(f"stopped: after step {step} of 1000000, checkpoint saved")


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_dead_worker_is_named_within_5_seconds(tmp_path: Path, corpus_dir: Path, victim: int) -> None:
    with long_job(tmp_path, corpus_dir) as job:
        killed = time.monotonic()
        job.processes[victim].kill()
        assert job.processes[1 - victim].wait(timeout=60) == 76
        assert time.monotonic() - killed < 5
        last = job.output(1 - victim).splitlines()[-1]
    assert last.startswith(f"error: worker {victim} (127.0.0.1:")
    assert "is dead" in last
    assert "the last step done here is" in last


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_stalled_worker_is_named_in_time(tmp_path: Path, corpus_dir: Path, victim: int) -> None:
    with long_job(tmp_path, corpus_dir, distribution__peer_timeout_seconds=3) as job:
        stopped = time.monotonic()
        job.processes[victim].send_signal(signal.SIGSTOP)
        assert job.processes[1 - victim].wait(timeout=60) == 76
        assert time.monotonic() - stopped < 3 + 5
        last = job.output(1 - victim).splitlines()[-1]
    assert last.startswith(f"error: worker {victim} (127.0.0.1:")
    assert "is stalled or cut off" in last


# --- At the start ------------------------------------------------------------------------------------


def wait_for_server(job: Job, port: int, worker: int = 0) -> None:
    """Waits until a worker has begun to wait for the others: then its gRPC server answers."""
    end = time.monotonic() + 120
    while probe(f"127.0.0.1:{port}", 1.0) != "alive":
        assert time.monotonic() < end and job.processes[worker].poll() is None, job.output(worker)
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("number", "index"),
    [
        (signal.SIGTERM, 0),
        pytest.param(signal.SIGINT, 0, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, 0, marks=pytest.mark.slow),
        (signal.SIGTERM, 1),
    ],
)
def test_a_worker_that_waits_for_others_obeys_signals(
    tmp_path: Path, corpus_dir: Path, number: signal.Signals, index: int
) -> None:
    ports, arguments = free_ports(2), tiny_arguments(corpus_dir, tmp_path / "run")
    with start(tmp_path, [arguments if each == index else None for each in range(2)], ports=ports) as job:
        wait_for_server(job, ports[index])
        time.sleep(1)
        asked = time.monotonic()
        job.processes[0].send_signal(number)
        assert job.wait() == [75]
        assert time.monotonic() - asked < 5
        assert job.output(0) == f"stopped: {number.name} before the first step: nothing was lost\n"


def test_a_worker_gives_up_on_others_that_do_not_come(tmp_path: Path, corpus_dir: Path) -> None:
    ports = free_ports(2)
    arguments = tiny_arguments(corpus_dir, tmp_path / "run", distribution__start_timeout_seconds=3)
    with start(tmp_path, [None, arguments], ports=ports) as job:
        assert job.wait() == [76]
        assert job.output(0) == (
            "error: the start took longer than 3 s (distribution.start_timeout_seconds): "
            f"worker 0 (127.0.0.1:{ports[0]}) refuses connections; "
            "start all workers again with the same run_dir: they go on from the newest checkpoint\n"
        )


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_worker_that_comes_and_dies_before_all_are_there_is_named(
    tmp_path: Path, corpus_dir: Path, victim: int
) -> None:
    ports, arguments = free_ports(3), tiny_arguments(corpus_dir, tmp_path / "run")
    with start(tmp_path, [arguments, arguments, None], ports=ports) as job:
        for index in range(2):
            wait_for_server(job, ports[index], index)
        time.sleep(3)  # for each to hear of the other
        killed = time.monotonic()
        job.processes[victim].kill()
        assert job.processes[1 - victim].wait(timeout=60) == 76
        assert time.monotonic() - killed < 10
        assert job.output(1 - victim).startswith(f"error: worker {victim} (127.0.0.1:{ports[victim]}) is dead: ")


SILENT_PEER = """
import os, sys, time
from tfdp.system.startup import load_tensorflow
load_tensorflow()
from tfdp.parallel import distribution
from tfdp.parallel.cluster import FailureDetector, require_agreement
from tfdp.parallel.cluster_spec import find_cluster
from tfdp.config.sections import DistributionConfig
from tfdp.system.exits import end, run_command

def main():
    config = DistributionConfig(start_timeout_seconds=15)
    cluster = find_cluster(config)
    with FailureDetector(cluster, 60.0, config.start_timeout_seconds).watching() as watch:
        distribution.make_strategy(config, cluster, 1, watch.wait_for_start)
        if cluster.index == 1:
            time.sleep(1000)  # its server answers all the while
        require_agreement(cluster, {"seed": 1}, watch.wait_for_start)

end(run_command(main))
"""


@pytest.mark.slow
def test_a_worker_that_never_says_what_it_is_about_to_train_is_named(tmp_path: Path) -> None:
    ports = free_ports(2)
    with start(tmp_path, [[], []], [sys.executable, "-c", SILENT_PEER], ports=ports) as job:
        assert job.processes[0].wait(timeout=120) == 76
        assert (
            "error: the start took longer than 15 s (distribution.start_timeout_seconds): "
            f"worker 1 (127.0.0.1:{ports[1]}) has not published its configuration; start all" in job.output(0)
        )
