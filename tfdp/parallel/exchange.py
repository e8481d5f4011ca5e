"""Sums over workers on CPUs through plain TCP: each adds up one part of the gradient and hands it to the others.

TensorFlow's collectives send tensors as gRPC messages, copied several times on their way: between two processes of one
machine a ring needs 116 ms for 42 MB. Here bytes go from the arrays into the socket and back, in 30 ms. A sum is a
reduce-scatter and an all-gather, both directly between all pairs (as in Thakur et al. 2005, "Optimization of Collective
Communication Operations in MPICH"), so each worker sends and receives 2 (n - 1) / n of the bytes, as in a ring, in two
rounds whatever n is. The terms of a sum come in the order of the workers.

It knows sockets and NumPy; collectives.py says what is added, and when.
"""

import math
import selectors
import socket
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise

import numpy as np

from tfdp.parallel import cluster as clusters
from tfdp.parallel.cluster import Cluster

_KEEP_ALIVE_SECONDS = 30  # of silence at most, before the system probes whether the other end is there
_READY = b"!"  # a worker sends this once it has reached the exchange and reads
_MOST_PIECES = 512  # handed to the system in one call; Linux takes 1024
_ALIGNMENT = 64  # bytes; TensorFlow uses the memory of an array without a copy where it is aligned so


class Exchange:
    """The connections of one worker to all others.

    Args:
      cluster: of this worker.
      connections: to each peer, by its index.
      timeout_seconds: how long a connection may be cut off before it counts as broken.
    """

    def __init__(
        self, cluster: Cluster, connections: Mapping[int, socket.socket], timeout_seconds: float = 60.0
    ) -> None:
        self._cluster, self._connections = cluster, dict(connections)
        for connection in self._connections.values():
            connection.setblocking(False)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            _notice_cuts(connection, timeout_seconds)

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
        """Sends and receives at the same time, because no socket buffer holds a whole message.

        A peer gets one byte only until it has arrived here too. While it still compiles, say, more bytes than its
        system buffers would stay unacknowledged, and the connection would look cut.
        """
        ready = {peer: np.empty(len(_READY), np.uint8) for peer in incoming}
        to_send = {peer: [memoryview(_READY)] for peer in outgoing}
        to_fill = {peer: _bytes_of([ready[peer], *arrays]) for peer, arrays in incoming.items()}
        awaited = set(outgoing)
        with selectors.DefaultSelector() as selector:
            for peer, connection in self._connections.items():
                _follow(selector, connection, peer, to_send[peer], to_fill[peer])
            while selector.get_map():
                for key, events in selector.select():
                    peer, connection = key.data, self._connections[key.data]
                    try:
                        received = _move(connection, events, to_send[peer], to_fill[peer])
                    except BlockingIOError:  # not ready after all
                        continue
                    except OSError as error:
                        raise ConnectionError(clusters.broken_link(self._cluster.name(peer), error)) from None
                    if received and peer in awaited:
                        awaited.remove(peer)
                        to_send[peer] += _bytes_of(outgoing[peer])
                    _follow(selector, connection, peer, to_send[peer], to_fill[peer])


def _notice_cuts(connection: socket.socket, timeout_seconds: float) -> None:
    """Makes the system break a connection whose other end is silent for `timeout_seconds`, idle or not.

    By default Linux waits a quarter of an hour for unacknowledged bytes, and two hours where nothing is sent.
    Keep-alive probes also stop firewalls from dropping a connection while workers compile or evaluate.
    """
    options = {
        "TCP_USER_TIMEOUT": int(timeout_seconds * 1000),
        "TCP_KEEPIDLE": max(1, min(_KEEP_ALIVE_SECONDS, int(timeout_seconds / 2))),
        "TCP_KEEPINTVL": max(1, int(timeout_seconds / 6)),
        "TCP_KEEPCNT": 3,
    }
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in options.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _move(connection: socket.socket, events: int, to_send: list[memoryview], to_fill: list[memoryview]) -> int:
    """Sends and receives as much as the connection is ready for; returns the bytes received."""
    if events & selectors.EVENT_WRITE:
        _advance(to_send, connection.sendmsg(to_send[:_MOST_PIECES]))
    if not events & selectors.EVENT_READ:
        return 0
    received = connection.recv_into(to_fill[0])
    if received == 0:
        raise ConnectionError("the connection was closed")
    _advance(to_fill, received)
    return received


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
    """Registers what a connection still has to send or receive; unregisters it once there is nothing."""
    events = (selectors.EVENT_WRITE if to_send else 0) | (selectors.EVENT_READ if to_fill else 0)
    known = selector.get_map().get(connection.fileno())
    if known and not events:
        selector.unregister(connection)
    elif events and not known:
        selector.register(connection, events, peer)
    elif known and known.events != events:
        selector.modify(connection, events, peer)


def _empty_arrays(shapes: Sequence[tuple[int, ...]], dtype: np.dtype) -> list[np.ndarray]:
    """Arrays whose memory TensorFlow uses without a copy."""
    sizes = [math.prod(shape) * dtype.itemsize for shape in shapes]
    begins = list(accumulate((-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes), initial=0))
    memory = np.empty(begins[-1] + _ALIGNMENT, np.uint8)
    memory = memory[-memory.ctypes.data % _ALIGNMENT :]
    return [
        memory[begin : begin + size].view(dtype).reshape(shape)
        for begin, size, shape in zip(begins, sizes, shapes, strict=False)
    ]
