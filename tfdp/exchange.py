"""Sums over workers on CPUs through plain TCP: each adds up one part of the gradient and hands it to the others.

TensorFlow's collectives send tensors as gRPC messages, copied several times on their way: between two processes of one
machine a ring needs 116 ms for 42 MB. Here bytes go from the arrays into the socket and back, in 30 ms. A sum is a
reduce-scatter and an all-gather, both directly between all pairs (as in Thakur et al. 2005, "Optimization of Collective
Communication Operations in MPICH"), so each worker sends and receives 2 (n - 1) / n of the bytes, as in a ring, in two
rounds whatever n is. The terms of a sum come in the order of the workers.

It knows sockets and NumPy; who adds, and when, is distribution.py's.
"""

import contextlib
import math
import secrets
import selectors
import socket
import time
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise

import numpy as np

from tfdp import cluster as clusters
from tfdp.cluster import Cluster

_CONNECT_SECONDS = 20.0  # for a connection, once all workers listen
_GREETING_SECONDS = 5.0  # for the first words of whoever connects
_KEEP_ALIVE_SECONDS = 30  # of silence, after which the system asks whether the other end is there
_SECRET_BYTES = 16
_WELCOME = b"!"
_MOST_PIECES = 512  # that a system takes at once; Linux: 1024
_ALIGNMENT = 64  # bytes, from which TensorFlow takes an array's memory as it is


class Exchange:
    """The connections of one worker to all others.

    Args:
      cluster: of this worker.
      connections: to each peer, by its index.
    """

    def __init__(self, cluster: Cluster, connections: Mapping[int, socket.socket]) -> None:
        self._cluster, self._connections = cluster, dict(connections)
        for connection in self._connections.values():
            connection.setblocking(False)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            if hasattr(socket, "TCP_KEEPIDLE"):  # while workers compile or evaluate, no firewall may forget them
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEP_ALIVE_SECONDS)

    def bounds(self, num_numbers: int) -> list[int]:
        """Where the part of each worker begins, and the end."""
        workers = self._cluster.num_workers
        return [num_numbers * index // workers for index in range(workers + 1)]

    def scatter(self, small: np.ndarray, *arrays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Hands each worker its part of the arrays, laid end to end, and all of the small one.

        Args:
          small: a vector, which no worker splits.
          arrays: flat, of one type; the same shapes on all workers.

        Returns:
          The small vectors of all workers, (num_workers, its size); and the terms of this worker's part,
          (num_workers, size of the part).

        Raises:
          ConnectionError: a worker has closed its connection.
        """
        bounds = self.bounds(sum(len(array) for array in arrays))
        parts = [_pieces(arrays, begin, end) for begin, end in pairwise(bounds)]
        own, workers = self._cluster.index, self._cluster.num_workers
        [smalls] = _empty_arrays([(workers, len(small))], small.dtype)
        [terms] = _empty_arrays([(workers, bounds[own + 1] - bounds[own])], arrays[0].dtype)
        smalls[own] = small
        if parts[own]:
            np.concatenate(parts[own], out=terms[own])
        self._swap(
            {peer: [small, *parts[peer]] for peer in self._connections},
            {peer: [smalls[peer], terms[peer]] for peer in self._connections},
        )
        return smalls, terms

    def gather(self, part: np.ndarray, sizes: Sequence[int]) -> list[np.ndarray]:
        """Puts the parts of all workers together: flat arrays of these sizes.

        Raises:
          ConnectionError: a worker has closed its connection.
        """
        arrays = _empty_arrays([(size,) for size in sizes], part.dtype)
        places = [_pieces(arrays, begin, end) for begin, end in pairwise(self.bounds(sum(sizes)))]
        offset = 0
        for place in places[self._cluster.index]:
            place[:] = part[offset : offset + len(place)]
            offset += len(place)
        self._swap({peer: [part] for peer in self._connections}, {peer: places[peer] for peer in self._connections})
        return arrays

    def close(self) -> None:
        for connection in self._connections.values():
            connection.close()

    def _swap(self, outgoing: Mapping[int, Sequence[np.ndarray]], incoming: Mapping[int, Sequence[np.ndarray]]) -> None:
        """Sends and receives at the same time, because nobody's socket holds a whole message."""
        to_send = {peer: _bytes_of(arrays) for peer, arrays in outgoing.items()}
        to_fill = {peer: _bytes_of(arrays) for peer, arrays in incoming.items()}
        with selectors.DefaultSelector() as selector:
            for peer, connection in self._connections.items():
                _follow(selector, connection, peer, to_send[peer], to_fill[peer])
            while selector.get_map():
                for key, events in selector.select():
                    peer, connection = key.data, self._connections[key.data]
                    try:
                        if events & selectors.EVENT_WRITE:
                            _advance(to_send[peer], connection.sendmsg(to_send[peer][:_MOST_PIECES]))
                        if events & selectors.EVENT_READ:
                            received = connection.recv_into(to_fill[peer][0])
                            if received == 0:
                                raise ConnectionError("the connection was closed")
                            _advance(to_fill[peer], received)
                    except BlockingIOError:  # not ready after all
                        continue
                    except OSError as error:
                        raise ConnectionError(clusters.broken_link(self._cluster.name(peer), error)) from None
                    _follow(selector, connection, peer, to_send[peer], to_fill[peer])


def connect(cluster: Cluster) -> Exchange | None:
    """Connects this worker with all others; each of them has to call it. None on all, if two do not reach each other.

    Ports are the system's choice, told through the coordination service, and with them a secret that whoever connects
    has to know.
    """
    connections: dict[int, socket.socket] = {}
    secret = secrets.token_hex(_SECRET_BYTES)
    with contextlib.ExitStack() as held:
        try:
            listener = held.enter_context(_listen())
            port = listener.getsockname()[1]
        except OSError:
            port = 0  # which nobody reaches
        clusters.publish("exchange", cluster.index, f"{secret} {port}")
        told = [clusters.read("exchange", index).split() for index in range(cluster.num_workers)]
        if all(int(port) for _, port in told):
            connections = _meet(cluster, listener, told)
    clusters.publish("exchange_size", cluster.index, str(len(connections)))
    sizes = [int(clusters.read("exchange_size", index)) for index in range(cluster.num_workers)]
    exchange = Exchange(cluster, connections)
    if min(sizes) == len(cluster.peers):
        return exchange
    exchange.close()
    with contextlib.suppress(Exception):  # nobody ends, as some may who need one, before all have read this
        clusters.barrier("exchange", _GREETING_SECONDS)
    return None


def _meet(cluster: Cluster, listener: socket.socket, told: Sequence[Sequence[str]]) -> dict[int, socket.socket]:
    """Calls the workers before this one and answers those after it; as many as can be reached in time."""
    end = time.monotonic() + _CONNECT_SECONDS
    connections: dict[int, socket.socket] = {}
    with contextlib.suppress(OSError):
        for peer in range(cluster.index):
            secret, port = told[peer]
            host = cluster.addresses[peer].rpartition(":")[0].strip("[]")
            connections[peer] = _call(host, int(port), _greeting(secret, cluster.index), end)
        greetings = {_greeting(told[cluster.index][0], peer): peer for peer in cluster.peers if peer > cluster.index}
        while greetings:
            greeting, connection = _accept(listener, end)
            if greeting in greetings:
                connections[greetings.pop(greeting)] = connection
                connection.sendall(_WELCOME)
            else:
                connection.close()
    return connections


def _listen() -> socket.socket:
    """At all addresses of this machine: its own name may stand for another one here than elsewhere."""
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _greeting(secret: str, index: int) -> bytes:
    return f"{secret}{index:08d}".encode()


def _call(host: str, port: int, greeting: bytes, end: float) -> socket.socket:
    connection = socket.create_connection((host, port), timeout=_remaining(end))
    connection.sendall(greeting)
    if _receive(connection, len(_WELCOME), end) != _WELCOME:
        connection.close()
        raise ConnectionError("the greeting was refused")
    return connection


def _accept(listener: socket.socket, end: float) -> tuple[bytes, socket.socket]:
    """The next connection, and what the other end says first."""
    listener.settimeout(_remaining(end))
    connection, _ = listener.accept()
    length = len(_greeting(secrets.token_hex(_SECRET_BYTES), 0))
    try:
        return _receive(connection, length, min(end, time.monotonic() + _GREETING_SECONDS)), connection
    except OSError:  # whoever this is, it is none of ours
        return b"", connection


def _receive(connection: socket.socket, length: int, end: float) -> bytes:
    """So many bytes, or fewer, if the other end has no more."""
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


def _pieces(arrays: Sequence[np.ndarray], begin: int, end: int) -> list[np.ndarray]:
    """What lies from `begin` up to `end` of the arrays laid end to end."""
    found, offset = [], 0
    for array in arrays:
        piece = array[max(0, begin - offset) : max(0, end - offset)]
        if len(piece):
            found.append(piece)
        offset += len(array)
    return found


def _bytes_of(arrays: Sequence[np.ndarray]) -> list[memoryview]:
    return [array.reshape(-1).view(np.uint8).data for array in arrays if array.size]


def _advance(views: list[memoryview], count: int) -> None:
    """Drops the first `count` bytes."""
    done = 0
    while done < len(views) and count >= len(views[done]):
        count -= len(views[done])
        done += 1
    del views[:done]
    if count:
        views[0] = views[0][count:]


def _follow(
    selector: selectors.BaseSelector, connection: socket.socket, peer: int, to_send: list, to_fill: list
) -> None:
    """Waits for what a connection still has to do, and no longer once that is nothing."""
    events = (selectors.EVENT_WRITE if to_send else 0) | (selectors.EVENT_READ if to_fill else 0)
    known = selector.get_map().get(connection.fileno())
    if known and not events:
        selector.unregister(connection)
    elif events and not known:
        selector.register(connection, events, peer)
    elif known and known.events != events:
        selector.modify(connection, events, peer)


def _empty_arrays(shapes: Sequence[tuple[int, ...]], dtype: np.dtype) -> list[np.ndarray]:
    """Arrays whose memory TensorFlow takes over without a copy."""
    sizes = [math.prod(shape) * dtype.itemsize for shape in shapes]
    begins = list(accumulate((-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes), initial=0))
    memory = np.empty(begins[-1] + _ALIGNMENT, np.uint8)
    memory = memory[-memory.ctypes.data % _ALIGNMENT :]
    return [
        memory[begin : begin + size].view(dtype).reshape(shape)
        for begin, size, shape in zip(begins, sizes, shapes, strict=False)
    ]
