"""Killed, stopped and rebuilt: after all of it, the run is the one that nobody touched. Long; `make test-slow`."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from workers import Job, start, tf_config, tiny_arguments

from tfdp.launch import LaunchConfig, newest_step, run_job

pytestmark = [pytest.mark.slow, pytest.mark.multiworker]

LEDGER_WORKER = Path(__file__).with_name("ledger_worker.py")
SAVE_EVERY = 10


def command(folder: Path, name: str, delay: float = 0.0) -> list[str]:
    return [sys.executable, "-u", str(LEDGER_WORKER), str(folder / f"{name}.ledger"), str(delay), str(folder / "fault")]


def ledger(folder: Path, name: str) -> list[tuple[int, list[int]]]:
    lines = (folder / f"{name}.ledger").read_text().splitlines()
    return [(int(line.split()[0]), [int(word) for word in line.split()[1:]]) for line in lines]


def summary(run_dir: Path) -> dict[str, object]:
    return json.loads((run_dir / "summary.json").read_text())


def losses(run_dir: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def workers_of(run_dir: Path) -> list[int]:
    """Process ids of the workers of a run, the chief first."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            arguments = (entry / "cmdline").read_bytes().split(b"\0")
            if (
                entry.name.isdigit()
                and str(run_dir).encode() in arguments
                and LEDGER_WORKER.name.encode() in b" ".join(arguments)
            ):
                variables = (entry / "environ").read_bytes().split(b"\0")
                config = next(text for text in variables if text.startswith(b"TF_CONFIG="))
                index, pid = json.loads(config.partition(b"=")[2])["task"]["index"], int(entry.name)
                found[index] = min(pid, found.get(index, pid))  # a process that a worker starts looks like it at first
        except (OSError, StopIteration):
            continue
    return [found[index] for index in sorted(found)]


class Killer(threading.Thread):
    """Kills random workers of a run at random moments, or leaves a fault for the next save; spread over the steps.

    Kill number k waits until the run has saved a random step of the k-th of as many equal parts, so that a fast machine
    is not done before the last one. The launcher waits ever longer after attempts without a new checkpoint: a life that
    follows one without has to save, any other may be killed before it does.
    """

    def __init__(self, folder: Path, run_dir: Path, num_kills: int, num_steps: int, seed: int) -> None:
        super().__init__(daemon=True)
        self._fault, self._run_dir, self._random = folder / "fault", run_dir, random.Random(seed)
        # none is due in the last part: a life goes on a little before it is killed
        part = num_steps // (num_kills + 1)
        self._due = [part * index + self._random.randrange(part) for index in range(num_kills)]
        self.num_faults = 0

    def run(self) -> None:
        seen: set[tuple[int, ...]] = set()
        before, has_fault = newest_step(self._run_dir), False
        for due in self._due:
            life = self._next_life(seen)
            seen.add(life)
            previous, before = before, newest_step(self._run_dir)
            if has_fault:  # it ends by itself, inside one of its saves
                self._wait(life, lambda: False)
                has_fault = False
                continue
            if previous < before and self._random.random() < 0.3:  # while it starts, or soon after
                time.sleep(self._random.uniform(0, 8))
            else:
                target = max(due, before + 1)
                self._wait(life, lambda target=target: newest_step(self._run_dir) >= target)
                time.sleep(self._random.uniform(0, 0.5))
            has_fault = newest_step(self._run_dir) > before and self._random.random() < 0.25
            if has_fault:
                self._fault.write_text(str(self._random.randint(1, 12)))
                self.num_faults += 1
            os.kill(self._random.choice(life), signal.SIGKILL)

    def _next_life(self, seen: set[tuple[int, ...]]) -> tuple[int, ...]:
        while len(pids := tuple(workers_of(self._run_dir))) < 2 or pids in seen:
            time.sleep(0.05)
        return pids

    def _wait(self, life: tuple[int, ...], arrived: Callable[[], bool]) -> None:
        while set(life) <= set(workers_of(self._run_dir)) and not arrived():
            time.sleep(0.02)


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("num_kills", [10, pytest.param(40, marks=pytest.mark.full)])
def test_kills_change_nothing(
    tmp_path: Path, corpus_dir: Path, capfd: pytest.CaptureFixture[str], num_kills: int
) -> None:
    num_steps = 100 * num_kills
    changes = {"training__steps": num_steps, "checkpoint__every_steps": SAVE_EVERY, "model__dropout": 0.1}
    changes |= {"training__log_every": SAVE_EVERY}
    untouched = tmp_path / "untouched"
    config = LaunchConfig(num_workers=2)
    assert run_job(config, tiny_arguments(corpus_dir, untouched, **changes), untouched) == 0
    killed = tmp_path / "killed"
    killer = Killer(tmp_path, killed, num_kills, num_steps, seed=1)
    killer.start()
    arguments = tiny_arguments(corpus_dir, killed, **changes)
    code = run_job(
        LaunchConfig(num_workers=2, max_restarts=2 * num_kills), arguments, killed, command(tmp_path, "killed", 0.012)
    )
    output = capfd.readouterr()
    assert code == 0, output.err[-3000:]
    num_restarts = len(re.findall(r"^launch: restart ", output.err, re.MULTILINE))
    num_deaths = len(re.findall(r"was killed by SIGKILL", output.err))
    positions = ledger(tmp_path, "killed")
    per_step = Counter(step for step, _ in positions)
    num_repeated = sum(count // 2 for count in per_step.values()) - num_steps
    with capfd.disabled():
        print(f"\n{num_deaths} kills ({killer.num_faults} inside a save), {num_restarts} restarts, ", end="")
        print(f"{num_repeated} repeated steps of {num_steps}")
    assert num_deaths >= num_kills
    assert sorted(per_step) == list(range(num_steps))
    assert num_repeated <= (SAVE_EVERY + SAVE_EVERY) * num_restarts  # one interval, and the save under way
    for key in ("weights_sha256", "state_sha256", "sequences_seen", "step", "validation_loss"):
        assert summary(killed)[key] == summary(untouched)[key], key
    assert losses(killed) == losses(untouched)
    assert "damaged" not in output.err


@pytest.mark.timeout(900)
@pytest.mark.parametrize("num_stops", [6, pytest.param(20, marks=pytest.mark.full)])
def test_stops_change_nothing(
    tmp_path: Path, corpus_dir: Path, capfd: pytest.CaptureFixture[str], num_stops: int
) -> None:
    num_steps, generator = 300 * num_stops, random.Random(2)
    changes = {"training__steps": num_steps, "checkpoint__every_steps": 0, "training__log_every": 50}
    arguments = tiny_arguments(corpus_dir, tmp_path / "stopped", **changes)
    slowest = 0.0
    for _ in range(num_stops):
        with start(tmp_path, [arguments] * 2, command(tmp_path, "stopped", 0.005)) as job:
            wait_for_steps(job, tmp_path / "stopped.ledger")
            time.sleep(generator.uniform(0, 1.5))
            asked = time.monotonic()
            job.processes[generator.randrange(2)].send_signal(signal.SIGTERM)
            assert job.wait() == [75, 75]
            slowest = max(slowest, time.monotonic() - asked)
            ends = [job.output(index).splitlines()[-1] for index in range(2)]
            assert ends[0] == ends[1]
            assert ends[0].startswith("stopped: after step ")
    with capfd.disabled():
        print(f"\n{num_stops} stops, the slowest {slowest:.1f} s from the signal to the last exit")
    assert slowest < 10
    with start(tmp_path, [arguments] * 2, command(tmp_path, "stopped")) as job:
        assert job.wait(300) == [0, 0]
    untouched = tiny_arguments(corpus_dir, tmp_path / "untouched", **changes)
    with start(tmp_path, [untouched] * 2) as job:
        assert job.wait(300) == [0, 0]
    per_step = Counter(step for step, _ in ledger(tmp_path, "stopped"))
    assert per_step == Counter(dict.fromkeys(range(num_steps), 2))
    assert summary(tmp_path / "stopped")["state_sha256"] == summary(tmp_path / "untouched")["state_sha256"]
    reference = losses(tmp_path / "untouched")
    assert losses(tmp_path / "stopped") == reference


def wait_for_steps(job: Job, path: Path, timeout: float = 90.0) -> None:
    size, end = path.stat().st_size if path.exists() else 0, time.monotonic() + timeout
    while not path.exists() or path.stat().st_size == size:
        assert time.monotonic() < end, job.output(0)
        time.sleep(0.05)


@pytest.mark.timeout(400)
def test_a_run_moves_from_layout_to_layout(tmp_path: Path, corpus_dir: Path) -> None:
    """4 replicas, 2 workers, 1 replica, 3 replicas: 20 steps each, every position once."""
    stages = [(1, 4), (2, 1), (1, 1), (1, 3)]
    for index, (num_workers, num_replicas) in enumerate(stages):
        changes = {"training__steps": 20 * (index + 1), "distribution__num_replicas": num_replicas}
        arguments = tiny_arguments(corpus_dir, tmp_path / "moved", **changes)
        with start(tmp_path, [arguments] * num_workers, command(tmp_path, "moved")) as job:
            assert job.wait() == [0] * num_workers, job.output(0)
    arguments = tiny_arguments(corpus_dir, tmp_path / "still", training__steps=80)
    with start(tmp_path, [arguments]) as job:
        assert job.wait() == [0]
    found = ledger(tmp_path, "moved")
    assert sorted(position for _, positions in found for position in positions) == list(range(80 * 12))
    assert all(position // 12 == step for step, positions in found for position in positions)
    moved, still = losses(tmp_path / "moved"), losses(tmp_path / "still")
    assert list(moved) == list(still) == list(range(1, 81))
    np.testing.assert_allclose(list(moved.values()), list(still.values()), rtol=1e-5)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.mark.timeout(200)
@pytest.mark.skipif(shutil.which("ip") is None or os.geteuid() != 0, reason="needs root and iproute2")
def test_a_partition_counts_as_a_stall(tmp_path: Path, corpus_dir: Path) -> None:
    """Two network namespaces joined by a pair of virtual interfaces, of which one goes down."""
    names = [f"tfdp{os.getpid()}{letter}" for letter in "ab"]
    devices = [f"v{os.getpid()}{letter}" for letter in "ab"]
    addresses = ["10.201.7.1:23456", "10.201.7.2:23456"]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        try:
            for name in names:
                ip("netns", "add", name)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces are not allowed here: {error.stderr.decode().strip()}")
        ip("link", "add", devices[0], "netns", names[0], "type", "veth", "peer", "name", devices[1], "netns", names[1])
        for name, device, address in zip(names, devices, addresses, strict=True):
            ip("-n", name, "addr", "add", f"{address.partition(':')[0]}/24", "dev", device)
            ip("-n", name, "link", "set", device, "up")
            ip("-n", name, "link", "set", "lo", "up")
        changes = {"training__steps": 1_000_000, "training__log_every": 50, "distribution__peer_timeout_seconds": 4}
        arguments = tiny_arguments(corpus_dir, tmp_path / "run", **changes)
        job = Job(processes, [tmp_path / f"{index}.log" for index in range(2)])
        for index, name in enumerate(names):
            variables = {**os.environ, "TF_CONFIG": tf_config([0, 0], index)}
            content = json.loads(variables["TF_CONFIG"])
            content["cluster"]["worker"] = addresses
            variables["TF_CONFIG"] = json.dumps(content)
            with job.logs[index].open("wb") as log:
                train = ["ip", "netns", "exec", name, sys.executable, "-u", "-m", "tfdp.train", *arguments]
                processes.append(subprocess.Popen(train, stdout=log, stderr=subprocess.STDOUT, env=variables))
        job.wait_for(r"^step +100/")
        cut = time.monotonic()
        ip("-n", names[1], "link", "set", devices[1], "down")
        assert job.wait(60) == [76, 76]
        assert time.monotonic() - cut < 4 + 5 + 1.5
        for index in range(2):
            last = job.output(index).splitlines()[-1]
            assert last.startswith(f"error: worker {1 - index} ({addresses[1 - index]})")
            assert "stalled or cut off" in last
    finally:
        for process in processes:
            process.kill()
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
