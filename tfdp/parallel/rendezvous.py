"""How the workers open the connections over which they exchange arrays.

Each listens at its own address, at a port that the system chooses, and tells the others through the coordination
service, with a secret that a caller must present. Strangers who connect to the port cannot hold up the workers.
"""

import contextlib
import hmac
import ipaddress
import secrets
import selectors
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tfdp.parallel import cluster as clusters
from tfdp.parallel.cluster import Cluster
from tfdp.parallel.exchange import Exchange

_CONNECT_SECONDS = 20.0  # for a connection, once all workers listen
_GREETING_SECONDS = 5.0  # for the greeting of a caller
_MOST_CALLERS = 128  # connections whose greeting is not complete; beyond that the oldest is dismissed
_SECRET_BYTES = 16
_WELCOME = b"!"


def connect(cluster: Cluster, timeout_seconds: float) -> Exchange | None:
    """Connects this worker with all others; all of them must call it. None on all if any two cannot reach each other.

    Args:
      timeout_seconds: how long a connection may be cut off before it counts as broken.
    """
    connections: dict[int, socket.socket] = {}
    secret = secrets.token_hex(_SECRET_BYTES)
    with contextlib.ExitStack() as held:
        try:
            listener = held.enter_context(_listen(cluster))
            port = listener.getsockname()[1]
        except OSError:
            port = 0  # cannot listen: no worker will call it
        clusters.publish("exchange", cluster.index, f"{secret} {port}")
        published = [clusters.read("exchange", index).split() for index in range(cluster.num_workers)]
        if all(int(port) for _, port in published):
            connections = _meet(cluster, listener, published)
    clusters.publish("exchange_size", cluster.index, str(len(connections)))
    sizes = [int(clusters.read("exchange_size", index)) for index in range(cluster.num_workers)]
    exchange = Exchange(cluster, connections, timeout_seconds)
    if min(sizes) == len(cluster.peers):
        return exchange
    exchange.close()
    with contextlib.suppress(
        Exception
    ):  # a worker that must have an exchange exits next: not before all have read this
        clusters.barrier("exchange", _GREETING_SECONDS)
    return None


def _meet(cluster: Cluster, listener: socket.socket, published: Sequence[Sequence[str]]) -> dict[int, socket.socket]:
    """Connections to the workers that can be reached in time: calls those before this one, answers those after it."""
    end = time.monotonic() + _CONNECT_SECONDS
    connections: dict[int, socket.socket] = {}
    with contextlib.suppress(OSError):
        for peer in range(cluster.index):
            secret, port = published[peer]
            connections[peer] = _call(_host(cluster, peer), int(port), _greeting(secret, cluster.index), end)
        greetings = {
            peer: _greeting(published[cluster.index][0], peer) for peer in cluster.peers if peer > cluster.index
        }
        with _Reception(listener, greetings) as reception:
            connections |= reception.wait(end)
    return connections


def _host(cluster: Cluster, index: int) -> str:
    return cluster.addresses[index].rpartition(":")[0].strip("[]")


def _greeting(secret: str, index: int) -> bytes:
    return f"{secret}{index:08d}".encode()


# ---------------------------------------------------------------------------------------------------
# Listening
# ---------------------------------------------------------------------------------------------------


def _listen(cluster: Cluster) -> socket.socket:
    """Listens at this worker's own address, or at all addresses where its name does not resolve to one of them."""
    host = _host(cluster, cluster.index)
    try:
        family, *_, own = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        if not _is_loopback(host) or all(_is_loopback(_host(cluster, peer)) for peer in cluster.peers):
            return socket.create_server(own, family=family)
        why = f"resolves to {own[0]} here"
    except OSError as error:
        why = f"is no address of this machine ({error.strerror})"
    name = cluster.name(cluster.index)
    print(f"exchange   listens at all addresses of this machine: {name} {why}", file=sys.stderr, flush=True)
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _is_loopback(host: str) -> bool:
    """Whether a name stands for this machine alone, such as the 127.0.1.1 that some systems give their own name."""
    try:
        return ipaddress.ip_address(socket.getaddrinfo(host, 0)[0][4][0]).is_loopback
    except OSError:
        return False


@dataclass
class _Caller:
    """A connection whose greeting is not complete."""

    connection: socket.socket
    until: float
    said: bytes = b""


class _Reception:
    """Accepts the connections of the workers that call, serving all callers at once.

    Args:
      greetings: the one that each worker must send.
    """

    def __init__(self, listener: socket.socket, greetings: Mapping[int, bytes]) -> None:
        self._listener, self._greetings = listener, greetings
        self._length = len(_greeting(secrets.token_hex(_SECRET_BYTES), 0))
        self._callers: list[_Caller] = []  # the oldest first
        self._found: dict[int, socket.socket] = {}

    def __enter__(self) -> "_Reception":
        self._selector = selectors.DefaultSelector()
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ)
        return self

    def __exit__(self, *_: object) -> None:
        for caller in list(self._callers):
            self._dismiss(caller)
        self._selector.close()

    def wait(self, end: float) -> dict[int, socket.socket]:
        """The connections to the workers that have called; all of them, or those that did before the end."""
        while len(self._found) < len(self._greetings) and time.monotonic() < end:
            soonest = min([end, *(caller.until for caller in self._callers[:1])])
            for key, _ in self._selector.select(max(0.0, soonest - time.monotonic())):
                if key.data is None:
                    self._admit()
                elif key.data in self._callers:  # and not dismissed just now
                    self._hear(key.data)
            while self._callers and self._callers[0].until <= time.monotonic():
                self._dismiss(self._callers[0])
        return self._found

    def _admit(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:  # it has left again
            return
        if len(self._callers) == _MOST_CALLERS:
            self._dismiss(self._callers[0])
        connection.setblocking(False)
        caller = _Caller(connection, time.monotonic() + _GREETING_SECONDS)
        self._callers.append(caller)
        self._selector.register(connection, selectors.EVENT_READ, caller)

    def _hear(self, caller: _Caller) -> None:
        try:
            more = caller.connection.recv(self._length - len(caller.said))
        except BlockingIOError:
            return
        except OSError:  # not one of our workers
            more = b""
        caller.said += more
        if more and len(caller.said) < self._length:
            return
        peer = self._peer_of(caller.said)
        self._dismiss(caller, close=peer is None)
        if peer is not None:
            caller.connection.send(_WELCOME)
            self._found[peer] = caller.connection

    def _peer_of(self, said: bytes) -> int | None:
        """The worker with this greeting, compared in constant time, so that a stranger learns nothing."""
        matching = [peer for peer, greeting in self._greetings.items() if hmac.compare_digest(greeting, said)]
        return matching[0] if matching and matching[0] not in self._found else None

    def _dismiss(self, caller: _Caller, close: bool = True) -> None:
        self._callers.remove(caller)
        self._selector.unregister(caller.connection)
        if close:
            caller.connection.close()


# ---------------------------------------------------------------------------------------------------
# Calling
# ---------------------------------------------------------------------------------------------------


def _call(host: str, port: int, greeting: bytes, end: float) -> socket.socket:
    connection = socket.create_connection((host, port), timeout=_remaining(end))
    connection.sendall(greeting)
    if _receive(connection, len(_WELCOME), end) != _WELCOME:
        connection.close()
        raise ConnectionError("the greeting was refused")
    return connection


def _receive(connection: socket.socket, length: int, end: float) -> bytes:
    """`length` bytes, or fewer if the other end has no more."""
    received = b""
    while len(received) < length:
        connection.settimeout(_remaining(end))
        more = connection.recv(length - len(received))
        if not more:
            break
        received += more
    return received


def _remaining(end: float) -> float:
    seconds = end - time.monotonic()
    if seconds <= 0:
        raise TimeoutError("timed out")
    return seconds
