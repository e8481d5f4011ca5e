"""Starts N workers of one job on this machine: `python -m tfdp.launch --num_workers N [--max_restarts M] -- ARGS`.

ARGS are those of `python -m tfdp.train`. Every worker is such a process with its own `TF_CONFIG`, its share of the
cores and GPUs, and its name before each line it prints. When a worker dies, the whole job is restarted and
resumes from the newest checkpoint. This module knows processes, signals and folders, and never loads TensorFlow.
It does not reach other machines: there, a cluster's own tool starts the workers (deploy/).
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import IO

from tfdp.config.parsing import load
from tfdp.config.run_config import with_run_config
from tfdp.interop.origin import with_origin_keys
from tfdp.parallel.restarts import History, job_code, whereabouts
from tfdp.recipe import load_recipe
from tfdp.system import exits
from tfdp.system.exits import ConfigError, require
from tfdp.system.machine import Share, free_ports, preparation, share_machine
from tfdp.training.checkpoint import CheckpointFolder

DESCRIPTION = (
    "Start the workers of one training job on this machine and wait for them. Arguments after -- are those of "
    "python -m tfdp.train: python -m tfdp.launch --num_workers 2 -- --training.steps 100"
)
TRAIN = (sys.executable, "-u", "-m", "tfdp.train")
POLL_SECONDS = 0.05
LINGER_SECONDS = 60.0  # for the others to end once one has finished, besides the grace
TERM_SECONDS = 5.0  # between SIGTERM and SIGKILL for a worker that did not notice the end of the others
MOST_WORKERS = 256  # whose output one process with the usual limit of 1024 open files can pass on

_MEANINGS = {
    exits.FAILED: "it failed",
    exits.USER_ERROR: "its configuration was refused",
    exits.STOPPED: "stopped on request",
    exits.PEER_LOST: "it lost a peer",
}


@dataclass(frozen=True)
class LaunchConfig:
    """The number of workers, and what happens when one dies."""

    num_workers: int = 1
    """Worker processes on this machine; they share its cores, and its GPUs where there are any."""
    max_restarts: int = 0
    """How often the whole job is restarted from the newest checkpoint after a worker has died."""
    grace_seconds: float = 15.0
    """Seconds that the other workers have to end by themselves after one has died, before they are killed."""

    def __post_init__(self) -> None:
        require(self.num_workers >= 1, "num_workers", self.num_workers, "must be at least 1: try 2")
        rule = f"must be at most {MOST_WORKERS} on one machine: start more by deploy/ on several"
        require(self.num_workers <= MOST_WORKERS, "num_workers", self.num_workers, rule)
        require(self.max_restarts >= 0, "max_restarts", self.max_restarts, "must not be negative: try 0")
        require(self.grace_seconds >= 0, "grace_seconds", self.grace_seconds, "must not be negative: try 15")


@dataclass
class Worker:
    """One process of the job, and the threads that pass its output on."""

    index: int
    process: subprocess.Popen[bytes]
    readers: list[threading.Thread] = field(default_factory=list)
    ended_by_launcher: bool = False  # its exit code then says nothing about the job

    @property
    def name(self) -> str:
        return f"worker {self.index} (pid {self.process.pid})"

    @property
    def code(self) -> int:
        """Its exit code, or minus the number of the signal that ended it."""
        code = self.process.returncode
        return 128 - code if code > 128 else code


def main() -> None:
    config, arguments = read_command_line(sys.argv[1:])
    arguments, run_dir = name_run_directory(arguments)
    sys.exit(run_job(config, arguments, run_dir))


def read_command_line(argv: Sequence[str]) -> tuple[LaunchConfig, list[str]]:
    """Splits the command line at `--` into the launcher's own configuration and the arguments of the workers."""
    cut = list(argv).index("--") if "--" in argv else len(argv)
    try:
        config = load(LaunchConfig, argv[:cut], "python -m tfdp.launch", DESCRIPTION)
    except ConfigError as error:
        if "--" not in argv and str(error).startswith("unknown key"):
            raise ConfigError(f"{error}; arguments of tfdp.train go after --, as in -- --training.steps 100") from None
        raise
    return config, list(argv[cut + 1 :])


def name_run_directory(arguments: Sequence[str]) -> tuple[list[str], Path]:
    """Checks the arguments of the workers once for all of them, and names the run directory if they do not.

    Workers and restarts must agree on that name, so it cannot be left to each process.

    Raises:
      ConfigError: what any worker would say about the arguments.
      SystemExit: the arguments hold `--help` or `--print_config`.
    """
    layered = with_run_config(arguments)
    _, config = load_recipe(layered, "python -m tfdp.train", "", with_origin_keys)
    run_dir = getattr(config, "run_dir", None)
    if run_dir:
        return [*arguments, "--run_dir", run_dir], Path(run_dir)  # a link is followed here, once for all restarts
    named = Path("runs") / datetime.now().strftime("%Y%m%d-%H%M%S")
    return [*arguments, "--run_dir", str(named)], named


def run_job(
    config: LaunchConfig, arguments: Sequence[str], run_dir: Path, worker_command: Sequence[str] = TRAIN
) -> int:
    """Runs the workers to their end, starting all of them again when one dies.

    Args:
      arguments: go to every worker.
      run_dir: of the workers' checkpoints; after two failures without a new one the job is given up.
      worker_command: program and first arguments of a worker.

    Returns:
      The exit code of the job, one of those in tfdp.system.exits.
    """
    console = Console()
    shares = share_machine(config.num_workers)
    history = History(newest_step(run_dir))
    used_ports: set[int] = set()
    cores = len(shares[0].cores) or "all"
    console.say(f"{config.num_workers} workers, cores for each: {cores}, run directory {run_dir}")
    with _recorded_signals() as received:
        while True:
            used_ports.update(ports := free_ports(config.num_workers, used_ports))
            workers = start_workers([*worker_command, *arguments], ports, shares, console)
            try:
                _supervise(workers, config.grace_seconds, received, console)
            finally:
                _kill(workers)
            codes = [worker.code for worker in workers if not worker.ended_by_launcher]
            code = job_code(codes, bool(received))
            if code in (exits.FINISHED, exits.USER_ERROR):
                return code
            history.note(codes, newest_step(run_dir))
            end = history.reason_to_end(config.max_restarts, code, bool(received))
            if end is None:
                console.say(history.announcement(config.max_restarts))
                if _sleep(history.pause_seconds, received):
                    end, code = "stopped on request", exits.STOPPED
            if end is not None:
                console.say(f"{end}; {whereabouts(history.newest)}; resume with --run_dir {run_dir}")
                return code


def _sleep(seconds: float, received: Sequence[int]) -> bool:
    """Waits; returns early, and true, when a signal arrives."""
    deadline = time.monotonic() + seconds
    while not received and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    return bool(received)


def newest_step(run_dir: Path) -> int:
    """The step of the newest checkpoint in a run directory, 0 without one; only whole ones have such a name."""
    return max(CheckpointFolder(run_dir / "checkpoints").steps(), default=0)


# ---------------------------------------------------------------------------------------------------
# Workers
# ---------------------------------------------------------------------------------------------------


def start_workers(
    command: Sequence[str], ports: Sequence[int], shares: Sequence[Share], console: "Console"
) -> list[Worker]:
    """Starts one worker for each port, each in a session of its own: a terminal's Ctrl-C reaches the launcher only."""
    addresses = [f"127.0.0.1:{port}" for port in ports]
    workers: list[Worker] = []
    try:
        for index, share in enumerate(shares):
            cluster = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
            process = subprocess.Popen(
                command,
                env={**os.environ, **share.environment, "TF_CONFIG": json.dumps(cluster)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
                preexec_fn=preparation(share.cores),
            )
            workers.append(Worker(index, process))
    except BaseException:
        _kill(workers)
        raise
    console.forget_errors()
    for worker in workers:  # after the last fork: a child of a process with threads may inherit a lock they hold
        worker.readers = console.follow(worker.index, worker.process)
    return workers


def _supervise(workers: Sequence[Worker], grace_seconds: float, received: Sequence[int], console: "Console") -> None:
    """Returns when every worker has ended; passes signals on, and kills those that outlive a failure for too long."""
    running, num_passed_on = list(workers), 0
    deadline: float | None = None
    ending = signal.SIGTERM
    while running:
        for number in received[num_passed_on:]:
            console.say(f"{signal.Signals(number).name}: passed on to {len(running)} workers")
            for worker in running:
                worker.process.send_signal(number)
        num_passed_on = len(received)
        for worker in [worker for worker in running if worker.process.poll() is not None]:
            running.remove(worker)
            _drain(worker)
            if worker.code in (exits.FINISHED, exits.STOPPED) or worker.ended_by_launcher:
                deadline = deadline or time.monotonic() + grace_seconds + LINGER_SECONDS
                continue
            patience = ""
            if running and deadline is None:
                deadline = time.monotonic() + grace_seconds
                patience = f"; waiting up to {grace_seconds:g} s for the others"
            console.say(f"{worker.name} {_how_it_ended(worker.code)}{patience}")
        if running and deadline is not None and time.monotonic() >= deadline:
            for worker in running:
                console.say(f"{worker.name} is still running; sending it {ending.name}")
                worker.ended_by_launcher = True
                worker.process.send_signal(ending)
            deadline, ending = time.monotonic() + TERM_SECONDS, signal.SIGKILL
        time.sleep(POLL_SECONDS)


def _how_it_ended(code: int) -> str:
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code} ({_MEANINGS.get(code, 'it failed')})"


def _drain(worker: Worker) -> None:
    """Kills what a worker has left running in its session, which keeps its output open; reads the rest of it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(worker.process.pid, signal.SIGKILL)
    for reader in worker.readers:
        reader.join(timeout=5)


def _kill(workers: Sequence[Worker]) -> None:
    for worker in workers:
        if worker.process.poll() is None:
            worker.process.kill()
            worker.process.wait()
            _drain(worker)


@contextlib.contextmanager
def _recorded_signals() -> Iterator[list[int]]:
    """Collects the requests to stop that arrive, in order, instead of letting them end this process."""
    received: list[int] = []

    def record(number: int, frame: FrameType | None) -> None:
        received.append(number)

    old = {number: signal.signal(number, record) for number in exits.stop_signals()}
    try:
        yield received
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------------------------------------------
# Output
# ---------------------------------------------------------------------------------------------------


class Console:
    """The output of all workers: whole lines, at once, each with its worker's name in front."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._errors: set[bytes] = set()

    def say(self, message: str) -> None:
        """One line of the launcher itself, on stderr."""
        self._write(sys.stderr.fileno(), f"launch: {message}\n".encode())

    def forget_errors(self) -> None:
        """From now on an error that was seen before is shown again."""
        self._errors.clear()

    def follow(self, index: int, process: subprocess.Popen[bytes]) -> list[threading.Thread]:
        """Starts to pass a worker's output on, stdout to stdout and stderr to stderr."""
        prefix = f"[worker {index}] ".encode()
        pairs = ((process.stdout, sys.stdout.fileno()), (process.stderr, sys.stderr.fileno()))
        readers = [threading.Thread(target=self._pass_on, args=(prefix, *pair), daemon=True) for pair in pairs]
        for reader in readers:
            reader.start()
        return readers

    def _pass_on(self, prefix: bytes, source: IO[bytes], target: int) -> None:
        with source:
            for line in iter(source.readline, b""):
                self._write(target, line if line.endswith(b"\n") else line + b"\n", prefix)

    def _write(self, target: int, line: bytes, prefix: bytes = b"") -> None:
        with self._lock:
            if prefix and line.startswith(b"error: "):
                if line in self._errors:  # every worker finds the same mistake of the user: once is enough
                    return
                self._errors.add(line)
            rest = memoryview(prefix + line)
            with contextlib.suppress(OSError):  # nobody reads any more: the workers continue
                while rest:
                    rest = rest[os.write(target, rest) :]


if __name__ == "__main__":
    sys.exit(exits.run_command(main))
