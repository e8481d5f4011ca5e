"""The other end of `pace`: processes that train as many steps as they are told to, and rest in between."""

import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import IO, Any

from tfdp.system.exits import TrainingError
from tfdp.system.machine import free_ports, preparation, share_machine

START_SECONDS = 900.0  # for a first step, compiling included; and for a round


class Running:
    """Processes that train together, between their first step and their end.

    Args:
      name: for messages.
      command: the module that `python -m` runs, and its arguments.
      num_workers: processes; several share the cores and form a cluster.
      together: whether several do form one; otherwise each trains by itself, on its share of the cores.

    Attributes:
      first_step_seconds: from the start of the processes to the end of the first step.
      step_seconds: of each round.
      flops_per_second: see `Pace`.

    Raises:
      TrainingError: a process failed, or did not answer in time.
    """

    def __init__(self, name: str, command: Sequence[str], num_workers: int = 1, together: bool = True) -> None:
        self.name = name
        self.round_steps = 1
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        started = time.monotonic()
        self._processes = self._start([sys.executable, "-m", *command], num_workers, together)
        self.flops_per_second = self._answers()[0]["flops_per_second"]
        self.first_step_seconds = time.monotonic() - started
        self.step_seconds: list[float] = []

    def settle(self, round_seconds: float) -> None:
        """Chooses the steps of a round; the first steps, which warm caches up, are counted nowhere."""
        self.round(1)
        self.round(2)
        self.round_steps = max(1, round(round_seconds / self.step_seconds[-1]))
        self.step_seconds.clear()

    def round(self, num_steps: int | None = None) -> None:
        """Trains the steps of one round, and notes the seconds of one."""
        self._tell(str(num_steps or self.round_steps))
        answers = self._answers()
        self.step_seconds.append(max(answer["seconds_of_step"] for answer in answers))
        self.flops_per_second = answers[0]["flops_per_second"]

    @property
    def median_seconds(self) -> float:
        return statistics.median(self.step_seconds)

    def end(self) -> int:
        """Ends the processes; returns the bytes of memory that they held at most, together."""
        self._tell("end")
        peak = sum(answer["peak_memory_bytes"] for answer in self._answers())
        for process in self._processes:
            process.wait()
        return peak

    def kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()

    def _start(self, command: Sequence[str], num_workers: int, together: bool) -> list[subprocess.Popen[bytes]]:
        several = num_workers > 1
        inherited = {key: value for key, value in os.environ.items() if key != "TF_CONFIG"}
        addresses = [f"127.0.0.1:{port}" for port in free_ports(num_workers)]
        processes = []
        for index, share in enumerate(share_machine(num_workers)):
            cluster = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
            own = {**share.environment, **({"TF_CONFIG": json.dumps(cluster)} if together else {})} if several else {}
            process = subprocess.Popen(
                command,
                env={**inherited, **own},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                preexec_fn=preparation(share.cores if several else ()),
            )
            processes.append(process)
        return processes

    def _tell(self, line: str) -> None:
        for process in self._processes:
            assert process.stdin is not None
            try:
                process.stdin.write(line.encode() + b"\n")
                process.stdin.flush()
            except BrokenPipeError:
                raise self._failure() from None

    def _answers(self) -> list[dict[str, Any]]:
        answers = []
        for process in self._processes:
            assert process.stdout is not None
            ready, _, _ = select.select([process.stdout], [], [], START_SECONDS)
            line = process.stdout.readline() if ready else b""
            if not line:
                raise self._failure()
            answers.append(json.loads(line))
        return answers

    def _failure(self) -> TrainingError:
        self.kill()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return TrainingError(f"{self.name} ended early: {lines[-1] if lines else 'it said nothing'}")
