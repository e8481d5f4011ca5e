"""The workers of a job: who they are, what they must agree on, and whether they are alive.

The addresses come from `TF_CONFIG` or SLURM (see cluster_spec.py). Agreement goes through the key-value store
of TensorFlow's coordination service, outside the collectives, so that a wrong cluster is found before the first
of them. Liveness is asked of each peer's own gRPC server once a second: a process that is compiling still
answers, one that is dead refuses, and one that is stopped or cut off stays silent.
"""

import contextlib
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from tfdp.parallel import native
from tfdp.system.exits import ConfigError, PeerLost, TrainingError, leave
from tfdp.system.messages import shown

_PROBE_SECONDS = 1.0
_PATIENCE_SECONDS = 24 * 3600.0  # for a peer that is at work; the failure detector finds one that dies or stalls
_NOTICE_SECONDS = 30.0  # between two lines that say which workers the start waits for
_MOST_NAMED = 5  # workers in a line
# An HTTP/2 connection preface and an empty SETTINGS frame: a live gRPC server answers with its own SETTINGS.
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
_FRAME_HEADER_SIZE, _FRAME_TYPE, _SETTINGS = 9, 3, 4
_ABSENCES = {
    "dead": "refuses connections",
    "silent": "does not answer",
    "foreign": "answers, but as another program",
    "unknown": "has a host name that cannot be resolved here",
}
_DEATHS = {  # of one that has answered before
    "dead": "is dead: it refuses connections",
    "foreign": "is dead: another program answers in its place",
}
_RESTART = "start all workers again with the same run_dir: they go on from the newest checkpoint"


@dataclass(frozen=True)
class Cluster:
    """The addresses "host:port" of all workers in order, and this process's place; worker 0 is the chief."""

    addresses: tuple[str, ...] = ("localhost:0",)
    index: int = 0

    @property
    def num_workers(self) -> int:
        return len(self.addresses)

    @property
    def is_chief(self) -> bool:
        return self.index == 0

    @property
    def peers(self) -> list[int]:
        return [index for index in range(self.num_workers) if index != self.index]

    def name(self, index: int) -> str:
        return f"worker {index} ({self.addresses[index]})"


def require_agreement(
    cluster: Cluster, facts: Mapping[str, Any], meanwhile: Callable[[str], None] = lambda _: None
) -> None:
    """Compares facts such as configuration keys and digests over all workers.

    Args:
      meanwhile: called about once a second during the wait, with a text that says which worker it waits for.

    Raises:
      ConfigError: on every worker, naming the first key that differs and the worker that has another value.
    """
    if cluster.num_workers == 1:
        return
    publish("facts", cluster.index, json.dumps(dict(facts)))
    differing = None
    for peer in cluster.peers:
        waits_for = f"{cluster.name(peer)} has not published its configuration"
        theirs = json.loads(_read_patiently("facts", peer, partial(meanwhile, waits_for)))
        for key in {**facts, **theirs}:
            if differing is None and theirs.get(key) != json.loads(json.dumps(facts.get(key))):
                differing = (key, peer, theirs.get(key))
    with contextlib.suppress(Exception):
        barrier("facts", _PROBE_SECONDS * 10)
    if differing is not None:
        key, peer, value = differing
        raise ConfigError(
            f"{key} ({shown(facts.get(key))}) must be the same on all workers: {cluster.name(peer)} has "
            f"{shown(value)}, {cluster.name(cluster.index)} has {shown(facts.get(key))}"
        )


def require_free_port(cluster: Cluster) -> None:
    """Checks that this worker can listen where the others expect it.

    Raises:
      TrainingError: another process listens there.
    """
    port = int(cluster.addresses[cluster.index].rpartition(":")[2])
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        name = cluster.name(cluster.index)
        raise TrainingError(
            f"this worker cannot listen at its own address, {name}: {os.strerror(error.errno or 0)}"
        ) from None


def publish(topic: str, index: int, value: str) -> None:
    """Publishes a value to all workers under (topic, index), which can be set once."""
    _context().set_config_key_value(f"tfdp/{topic}/{index}", value)


def read(topic: str, index: int, timeout_seconds: float = _PATIENCE_SECONDS) -> str:
    """Waits for what a worker publishes."""
    value: str = _context().get_config_key_value(f"tfdp/{topic}/{index}", int(timeout_seconds * 1000))
    return value


def _read_patiently(topic: str, index: int, meanwhile: Callable[[], None]) -> str:
    """Waits as `read` does, and calls `meanwhile` about once a second."""
    from tensorflow import errors

    while True:
        try:
            return read(topic, index, timeout_seconds=1.0)
        except errors.DeadlineExceededError:
            meanwhile()


def barrier(name: str, timeout_seconds: float) -> None:
    """Waits until every worker is here."""
    native.wait_at_barrier(_context(), f"tfdp/{name}", timeout_seconds)


def _context() -> Any:
    # The coordination service has no public Python interface; tests/test_multi_worker.py fails when this one moves.
    from tensorflow.python.eager import context

    return context.context()


# ---------------------------------------------------------------------------------------------------
# Who is alive
# ---------------------------------------------------------------------------------------------------


def probe(address: str, timeout_seconds: float) -> str:
    """Asks a worker's gRPC server for a sign of life.

    Returns:
      "alive"; "dead", it refuses; "silent"; "foreign", what answers is no gRPC server; or "unknown", a name that stands
      for no address.
    """
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=timeout_seconds) as connection:
            connection.settimeout(timeout_seconds)
            connection.sendall(_HELLO)
            answer = connection.recv(_FRAME_HEADER_SIZE, socket.MSG_WAITALL)
    except ConnectionError:
        return "dead"
    except socket.gaierror:
        return "unknown"
    except OSError:
        return "silent"
    if not answer:
        return "dead"
    return "alive" if len(answer) == _FRAME_HEADER_SIZE and answer[_FRAME_TYPE] == _SETTINGS else "foreign"


class FailureDetector:
    """Watches the peers of a worker from a thread, and ends this process when one of them is lost.

    Args:
      cluster: of this worker.
      timeout_seconds: how long a peer may be silent, once it has answered; one that refuses connections is lost
        at once. One that has never answered is still starting.
      start_timeout_seconds: how long this worker waits for the others to start.
    """

    def __init__(self, cluster: Cluster, timeout_seconds: float, start_timeout_seconds: float = 600.0) -> None:
        self._cluster, self._timeout, self._start_timeout = cluster, timeout_seconds, start_timeout_seconds
        self._started: float | None = None  # when this worker began to wait for the others
        self._next_notice = _NOTICE_SECONDS  # after how many seconds of waiting the next line is due
        self._answers = dict.fromkeys(cluster.peers, "silent")
        self._heard: dict[int, float] = {}  # when each peer last answered; one that never did is still starting
        self._refused = dict.fromkeys(cluster.peers, 0)
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self.step = 0  # the last step done, for the message

    @contextlib.contextmanager
    def watching(self) -> Iterator["FailureDetector"]:
        """Watches while the block runs; raises PeerLost for an error of a collective that a lost peer has caused."""
        if self._cluster.num_workers == 1:
            yield self
            return
        for peer in self._cluster.peers:
            threading.Thread(target=self._watch, args=(peer,), daemon=True, name=f"watch-worker-{peer}").start()
        try:
            yield self
        except Exception as error:
            if not _is_collective_error(error):
                raise
            lost = self._find_lost(seconds=4.0)
            if lost is not None:
                raise PeerLost(self._message(*lost)) from None
            broken = _BROKEN_LINK.search(str(error))
            if broken is None:
                raise
            raise PeerLost(f"{broken.group()}; {self._advice}") from None
        finally:
            self._stopped.set()

    def wait_for_start(self, waits_for: str | None = None) -> None:
        """To be called often while this worker waits for the others to start: every 30 s it prints which ones.

        Args:
          waits_for: what this worker waits for; None: the peers that have never answered.

        Raises:
          PeerLost: the others have not started within the time limit.
        """
        now = time.monotonic()
        self._started = self._started or now
        waited, limit = now - self._started, f"{self._start_timeout:g} s (distribution.start_timeout_seconds)"
        if waited >= self._start_timeout:
            raise PeerLost(f"the start took longer than {limit}: {waits_for or self._absent()}; {_RESTART}")
        if waited >= self._next_notice:
            self._next_notice += _NOTICE_SECONDS
            print(f"waiting    {waited:.0f} s of {limit}: {waits_for or self._absent()}", file=sys.stderr, flush=True)

    def _absent(self) -> str:
        """Which peers have never answered, and how."""
        absent = [
            f"{self._cluster.name(peer)} {_ABSENCES[self._answers[peer]]}"
            for peer in self._cluster.peers
            if peer not in self._heard
        ]
        rest = f", and {len(absent) - _MOST_NAMED} more" if len(absent) > _MOST_NAMED else ""
        return ", ".join(absent[:_MOST_NAMED]) + rest or "all workers answer, but have not joined"

    def finish_together(self) -> None:
        """Waits until all workers are done, then stops watching them.

        The chief hosts the barrier, so it stays a moment longer: the others must hear that all have arrived.
        """
        if self._cluster.num_workers > 1:
            barrier("finished", _PATIENCE_SECONDS)
            self._stopped.set()
            if self._cluster.is_chief:
                time.sleep(_PROBE_SECONDS / 2)

    def _watch(self, peer: int) -> None:
        while not self._stopped.wait(_PROBE_SECONDS):
            lost = self._ask(peer)
            if lost and not self._stopped.is_set() and self._lock.acquire(blocking=False):
                leave(PeerLost(self._message(peer, lost)))

    def _ask(self, peer: int) -> str | None:
        """Probes a peer; returns how it is lost, if it is."""
        answer = self._answers[peer] = probe(self._cluster.addresses[peer], 2 * _PROBE_SECONDS)
        now = time.monotonic()
        if answer == "alive":
            self._heard[peer], self._refused[peer] = now, 0
        if answer == "alive" or peer not in self._heard:
            return None
        if answer in _DEATHS:
            self._refused[peer] += 1
            return _DEATHS[answer] if self._refused[peer] >= 2 else None
        silence = now - self._heard[peer]
        return f"is stalled or cut off: silent for {silence:.0f} s" if silence >= self._timeout else None

    def _find_lost(self, seconds: float) -> tuple[int, str] | None:
        """After a collective has failed: the first peer that does not answer, however short its silence."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for peer in self._cluster.peers:
                answer = probe(self._cluster.addresses[peer], 2 * _PROBE_SECONDS)
                if answer != "alive":
                    return peer, _DEATHS.get(answer, "is stalled or cut off")
            time.sleep(0.3)
        return None

    def _message(self, peer: int, lost: str) -> str:
        return f"{self._cluster.name(peer)} {lost}; {self._advice}"

    @property
    def _advice(self) -> str:
        return f"the last step done here is {self.step}; {_RESTART}"


def broken_link(name: str, reason: object) -> str:
    """The message that the connection to a worker broke. `watching` recognises it inside an error of TensorFlow."""
    return f"the connection to {name} broke: {reason}."


_BROKEN_LINK = re.compile(r"the connection to worker \d+ \(\S+\) broke: [^.]*")


def _is_collective_error(error: Exception) -> bool:
    from tensorflow import errors

    kinds = (
        errors.UnavailableError,
        errors.DeadlineExceededError,
        errors.AbortedError,
        errors.CancelledError,
        errors.InternalError,
        errors.FailedPreconditionError,
        errors.UnknownError,
    )
    return isinstance(error, kinds)
