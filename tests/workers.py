"""Starts the workers of a job as processes on loopback, for tests that watch, stop and kill them."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

WORKER = [sys.executable, "-u", "-m", "tfdp.train"]


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def tf_config(ports: Sequence[int], index: int) -> str:
    addresses = [f"127.0.0.1:{port}" for port in ports]
    return json.dumps({"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}})


@dataclass
class Job:
    """Workers that run; their output goes to files."""

    processes: list[subprocess.Popen[bytes]]
    logs: list[Path]

    def wait_for(self, pattern: str, timeout: float = 90.0, worker: int = 0) -> None:
        """Waits until a worker has printed a line that matches."""
        end = time.monotonic() + timeout
        while not re.search(pattern, self.output(worker), re.MULTILINE):
            assert time.monotonic() < end, f"no {pattern} in:\n{self.output(worker)}"
            assert self.processes[worker].poll() is None, f"worker {worker} ended:\n{self.output(worker)}"
            time.sleep(0.05)

    def wait(self, timeout: float = 120.0) -> list[int]:
        """Exit codes of all workers."""
        end = time.monotonic() + timeout
        return [process.wait(max(0.1, end - time.monotonic())) for process in self.processes]

    def output(self, worker: int) -> str:
        return self.logs[worker].read_text(errors="replace")

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()


def start(
    folder: Path,
    per_worker: Sequence[Sequence[str] | None],
    command: Sequence[str] = WORKER,
    environment: dict | None = None,
    ports: Sequence[int] = (),
) -> Job:
    """Starts one worker for each list of arguments, and none, at an address of its own, for each None."""
    ports = ports or free_ports(len(per_worker))
    processes, logs = [], []
    for index, arguments in enumerate(per_worker):
        if arguments is None:
            continue
        variables = {**os.environ, "OMP_NUM_THREADS": "1", "TF_NUM_INTRAOP_THREADS": "1", **(environment or {})}
        if len(per_worker) > 1:
            variables["TF_CONFIG"] = tf_config(ports, index)
        logs.append(folder / f"worker-{index}-{ports[0]}.log")
        with logs[-1].open("wb") as log:
            processes.append(
                subprocess.Popen([*command, *arguments], stdout=log, stderr=subprocess.STDOUT, env=variables)
            )
    return Job(processes, logs)


def tiny_arguments(corpus: Path, run_dir: Path, **changes: object) -> list[str]:
    """Flags of a tiny job; a key's dot is written as two underscores: `training__steps=5`."""
    keys: dict[str, object] = {
        "run_dir": run_dir,
        "data.source": f"text:{corpus}/*.txt",
        "data.validation_fraction": 0.2,
        "model.num_layers": 1,
        "model.num_heads": 2,
        "model.model_dim": 16,
        "model.context_length": 16,
        "optimizer.name": "adamw",
        "optimizer.learning_rate": 1e-2,
        "optimizer.schedule": "constant",
        "training.global_batch_size": 12,
        "training.steps": 60,
        "training.log_every": 1,
        "training.evaluate_every": 0,
        "training.sample_tokens": 0,
        "training.jit_compile": "false",
        "checkpoint.every_steps": 0,
        **{key.replace("__", "."): value for key, value in changes.items()},
    }
    return [text for key, value in keys.items() for text in (f"--{key}", str(value))]
