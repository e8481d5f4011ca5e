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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from types import FrameType

from tfdp.config.parsing import load
from tfdp.config.run_config import with_run_config
from tfdp.interop.origin import with_origin_keys
from tfdp.parallel.restarts import History, job_code, whereabouts
from tfdp.recipe import load_recipe
from tfdp.system import exits
from tfdp.system.exits import ConfigError, require
from tfdp.system.machine import Share, free_ports, preparation, share_machine
from tfdp.system.prefixed import Console
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
class Role:
    """The place of a process in the job, as TF_CONFIG names it."""

    kind: str
    index: int

    @property
    def name(self) -> str:
        return self.kind if self.kind == "chief" else f"{self.kind} {self.index}"


@dataclass(frozen=True)
class LaunchConfig:
    """The number of workers, and what happens when one dies."""

    num_workers: int = 1
    """Worker processes on this machine; they share its cores, and its GPUs where there are any."""
    num_parameter_servers: int = 0
    """With distribution.strategy parameter_server: processes that hold the weights for the workers, besides a chief,
    which hands out the work. A worker that dies is started again by itself."""
    max_restarts: int = 0
    """How often the whole job is restarted from the newest checkpoint after a worker has died."""
    grace_seconds: float = 15.0
    """Seconds that the other workers have to end by themselves after one has died, before they are killed."""

    @property
    def roles(self) -> list[Role]:
        """All processes of the job."""
        workers = [Role("worker", index) for index in range(self.num_workers)]
        servers = [Role("ps", index) for index in range(self.num_parameter_servers)]
        return [Role("chief", 0), *workers, *servers] if servers else workers

    def __post_init__(self) -> None:
        require(self.num_workers >= 1, "num_workers", self.num_workers, "must be at least 1: try 2")
        rule = f"must be at most {MOST_WORKERS} on one machine: start more by deploy/ on several"
        require(self.num_workers <= MOST_WORKERS, "num_workers", self.num_workers, rule)
        servers = self.num_parameter_servers
        require(
            0 <= servers <= MOST_WORKERS, "num_parameter_servers", servers, f"must lie in [0, {MOST_WORKERS}]: try 1"
        )
        require(self.max_restarts >= 0, "max_restarts", self.max_restarts, "must not be negative: try 0")
        require(self.grace_seconds >= 0, "grace_seconds", self.grace_seconds, "must not be negative: try 15")


@dataclass
class Worker:
    """One process of the job, and the threads that pass its output on."""

    role: Role
    process: subprocess.Popen[bytes]
    readers: list[threading.Thread] = field(default_factory=list)
    ended_by_launcher: bool = False  # its exit code then says nothing about the job

    @property
    def name(self) -> str:
        return f"{self.role.name} (pid {self.process.pid})"

    @property
    def code(self) -> int:
        """Its exit code, or minus the number of the signal that ended it."""
        code = self.process.returncode
        return 128 - code if code > 128 else code


def main() -> None:
    config, arguments = read_command_line(sys.argv[1:])
    arguments, run_dir = name_run_directory(arguments, config.num_parameter_servers)
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


def name_run_directory(arguments: Sequence[str], num_parameter_servers: int = 0) -> tuple[list[str], Path]:
    """Checks the arguments of the workers once for all of them, and names the run directory if they do not.

    Workers and restarts must agree on that name, so it cannot be left to each process.

    Raises:
      ConfigError: what any worker would say about the arguments.
      SystemExit: the arguments hold `--help` or `--print_config`.
    """
    layered = with_run_config(arguments)
    _, config = load_recipe(layered, "python -m tfdp.train", "", with_origin_keys)
    strategy = getattr(getattr(config, "distribution", None), "strategy", None)
    is_pool = strategy == "parameter_server"
    rule = "needs distribution.strategy parameter_server: add it after --, or leave this key at 0"
    require(is_pool or not num_parameter_servers, "num_parameter_servers", num_parameter_servers, rule)
    rule = "needs tfdp.launch --num_parameter_servers: try 1"
    require(not is_pool or num_parameter_servers > 0, "distribution.strategy", strategy, rule)
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
    roles = config.roles
    shares = share_machine(config.num_workers)
    history = History(newest_step(run_dir))
    used_ports: set[int] = set()
    cores = len(shares[0].cores) or "all"
    console.say(f"{config.num_workers} workers, cores for each: {cores}, run directory {run_dir}")
    with _recorded_signals() as received:
        while True:
            used_ports.update(ports := free_ports(len(roles), used_ports))
            job = _Job([*worker_command, *arguments], dict(zip(roles, ports, strict=True)), shares, console)
            try:
                job.start()
                _supervise(job, config.grace_seconds, received, console)
            finally:
                _kill(job.workers)
            codes = [worker.code for worker in job.workers if not worker.ended_by_launcher]
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


class _Job:
    """The processes of one attempt.

    Args:
      command: of each, with its arguments.
      ports: of each.
      shares: of the machine, for the workers; what hands out and holds takes what is left.
      console: of their output.
    """

    def __init__(
        self, command: Sequence[str], ports: Mapping[Role, int], shares: Sequence[Share], console: Console
    ) -> None:
        self._command, self._shares, self._console = command, shares, console
        self._addresses: dict[str, list[str]] = {}
        for role, port in ports.items():
            self._addresses.setdefault(role.kind, []).append(f"127.0.0.1:{port}")
        self._roles = list(ports)
        self.workers: list[Worker] = []

    @property
    def is_pool(self) -> bool:
        """Whether a chief hands out work, so that a worker can be started again by itself."""
        return "chief" in self._addresses

    def start(self) -> None:
        """Starts all, each in a session of its own: a terminal's Ctrl-C reaches the launcher only."""
        for role in self._roles:
            self.workers.append(self._started(role))
        self._console.forget_errors()
        for worker in self.workers:  # after the last fork: a child of a process with threads may inherit a lock
            worker.readers = self._console.follow(worker.role.name, worker.process)

    def start_again(self, role: Role) -> Worker:
        worker = self._started(role)
        worker.readers = self._console.follow(role.name, worker.process)
        self.workers.append(worker)
        return worker

    def _started(self, role: Role) -> Worker:
        cluster = {"cluster": self._addresses, "task": {"type": role.kind, "index": role.index}}
        share = self._shares[role.index] if role.kind == "worker" else None
        process = subprocess.Popen(
            self._command,
            env={**os.environ, **(share.environment if share else {}), "TF_CONFIG": json.dumps(cluster)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=preparation(share.cores if share else ()),
        )
        return Worker(role, process)


def _supervise(job: _Job, grace_seconds: float, received: Sequence[int], console: Console) -> None:
    """Returns when every worker has ended; passes signals on, and kills those that outlive a failure for too long."""
    running, num_passed_on = list(job.workers), 0
    deadline: float | None = None
    ending = signal.SIGTERM
    while running:
        for number in received[num_passed_on:]:
            console.say(f"{signal.Signals(number).name}: passed on to {len(running)} workers")
            for worker in running:
                if not job.is_pool or worker.role.kind == "chief":  # the others end when it does
                    worker.process.send_signal(number)
        num_passed_on = len(received)
        for worker in [worker for worker in running if worker.process.poll() is not None]:
            running.remove(worker)
            _drain(worker)
            if job.is_pool and worker.role.kind != "chief" and deadline is None:
                worker.ended_by_launcher = True  # its code is not that of the job
                is_refused = worker.code == exits.USER_ERROR  # and would be again
                again = worker.role.kind == "worker" and not received and not is_refused
                console.say(f"{worker.name} {_how_it_ended(worker.code)}{'; it is started again' if again else ''}")
                if again:
                    running.append(job.start_again(worker.role))
                continue
            if job.is_pool and worker.role.kind == "chief":
                deadline = time.monotonic()
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
                if not job.is_pool:  # whose workers end when their chief does
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


if __name__ == "__main__":
    sys.exit(exits.run_command(main))
