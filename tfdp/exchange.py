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
_SECRET_BYTES = 16
_UNWANTED = "unwanted"  # in place of a secret
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
                        name = self._cluster.name(peer)
                        raise ConnectionError(f"the exchange of gradients with {name} broke off: {error}") from None
                    _follow(selector, connection, peer, to_send[peer], to_fill[peer])


def connect(cluster: Cluster, wanted: bool) -> Exchange | None:
    """Connects this worker with all others; each of them has to call it.

    Ports are the system's choice, told through the coordination service, and with them a secret that whoever connects
    has to know.

    Args:
      cluster: of this worker.
      wanted: whether this worker wants connections.

    Returns:
      None on all workers, if one does not want any or two do not reach one another.
    """
    host = cluster.addresses[cluster.index].rpartition(":")[0].strip("[]")
    with _listen(host) as listener:
        secret = secrets.token_hex(_SECRET_BYTES) if wanted else _UNWANTED
        clusters.publish("exchange", cluster.index, f"{secret} {listener.getsockname()[1]}")
        told = [clusters.read("exchange", index).split() for index in range(cluster.num_workers)]
        if any(secret == _UNWANTED for secret, _ in told):
            return None
        connections = _meet(cluster, listener, told)
    clusters.publish("exchange_size", cluster.index, str(len(connections)))
    sizes = [int(clusters.read("exchange_size", index)) for index in range(cluster.num_workers)]
    exchange = Exchange(cluster, connections)
    if min(sizes) == len(cluster.peers):
        return exchange
    exchange.close()
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


def _listen(host: str) -> socket.socket:
    """At the address that the others know, if it is this machine's own, which behind a gateway it is not."""
    family = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]
    try:
        return socket.create_server((host, 0), family=family)
    except OSError:
        return socket.create_server(("", 0), family=family)


def _greeting(secret: str, index: int) -> bytes:
    return f"{secret}{index:08d}".encode()


def _call(host: str, port: int, greeting: bytes, end: float) -> socket.socket:
    connection = socket.create_connection((host, port), timeout=_remaining(end))
    connection.sendall(greeting)
    connection.settimeout(_remaining(end))
    if connection.recv(len(_WELCOME)) != _WELCOME:
        raise ConnectionError("the greeting was refused")
    return connection


def _accept(listener: socket.socket, end: float) -> tuple[bytes, socket.socket]:
    """The next connection, and what the other end says first."""
    listener.settimeout(_remaining(end))
    connection, _ = listener.accept()
    connection.settimeout(min(_GREETING_SECONDS, _remaining(end)))
    try:
        return connection.recv(len(_greeting(secrets.token_hex(_SECRET_BYTES), 0)), socket.MSG_WAITALL), connection
    except OSError:  # whoever this is, it is none of ours
        return b"", connection


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
