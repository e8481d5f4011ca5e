"""Sums over workers through sockets, here between threads of one process."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations

import ml_dtypes
import numpy as np
import pytest

from tfdp import cluster as clusters
from tfdp import exchange
from tfdp.cluster import Cluster
from tfdp.exchange import Exchange

pytestmark = pytest.mark.timeout(60)


def cluster(num_workers: int, index: int) -> Cluster:
    return Cluster(tuple(f"127.0.0.1:{port}" for port in range(1, num_workers + 1)), index)


def connected(num_workers: int) -> list[Exchange]:
    connections: list[dict[int, socket.socket]] = [{} for _ in range(num_workers)]
    for one, other in combinations(range(num_workers), 2):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            connections[one][other] = socket.create_connection(listener.getsockname())
            connections[other][one] = listener.accept()[0]
    return [Exchange(cluster(num_workers, index), found) for index, found in enumerate(connections)]


@pytest.fixture(params=[2, 3, 5])
def workers(request: pytest.FixtureRequest) -> Iterator[list[Exchange]]:
    found = connected(request.param)
    yield found
    for each in found:
        each.close()


def at_once(tasks: list[Callable[[], object]]) -> list:
    with ThreadPoolExecutor(len(tasks)) as pool:
        return [future.result() for future in [pool.submit(task) for task in tasks]]


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("sizes", [[7, 300_000, 1, 12], [1, 1]])  # more than a socket holds; fewer than workers
def test_each_worker_gets_its_part_from_all_and_all_parts_back(
    workers: list[Exchange], dtype: np.dtype, sizes: list[int]
) -> None:
    num_workers = len(workers)
    random = np.random.default_rng(0)
    arrays = [[random.normal(size=size).astype(dtype) for size in sizes] for _ in workers]
    told = [np.array([index, 10.0 * index], np.float32) for index in range(num_workers)]
    scattered = at_once(
        [lambda w=worker, i=index: w.scatter(told[i], *arrays[i]) for index, worker in enumerate(workers)]
    )
    ends = workers[0].bounds(sum(sizes))
    for index, (smalls, terms) in enumerate(scattered):
        np.testing.assert_array_equal(smalls, told)
        for peer in range(num_workers):
            whole = np.concatenate(arrays[peer])
            np.testing.assert_array_equal(terms[peer], whole[ends[index] : ends[index + 1]])
    parts = [terms[-1] for _, terms in scattered]
    for found in at_once(
        [lambda w=worker, p=part: w.gather(p, sizes) for worker, part in zip(workers, parts, strict=True)]
    ):
        assert [len(array) for array in found] == sizes
        assert all(array.ctypes.data % 64 == 0 for array in found)
        for array, sent in zip(found, arrays[-1], strict=True):
            np.testing.assert_array_equal(array, sent)


def test_a_worker_that_leaves_is_named() -> None:
    staying, leaving = connected(2)
    leaving.close()
    with pytest.raises(ConnectionError, match=r"the connection to worker 1 \(127\.0\.0\.1:2\) broke: "):
        staying.scatter(np.zeros(1, np.float32), np.zeros(1_000_000, np.float32))
    staying.close()


def meet(secrets_told: list[str], reachable: list[bool], stranger: bytes = b"") -> list[dict[int, socket.socket]]:
    """What each worker's `_meet` finds, where some of them are told a port at which nobody listens."""
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in reachable]
    with socket.create_server(("127.0.0.1", 0)) as unused:
        closed = unused.getsockname()[1]
    ports = [listener.getsockname()[1] for listener in listeners]
    told = [
        (secret, str(port if known else closed))
        for secret, port, known in zip(secrets_told, ports, reachable, strict=True)
    ]
    callers = []
    if stranger:
        callers.append(socket.create_connection(listeners[0].getsockname()))
        callers[0].sendall(stranger)
    found = at_once(
        [
            lambda index=index: exchange._meet(cluster(len(reachable), index), listeners[index], told)
            for index in range(len(reachable))
        ]
    )
    for one in [*listeners, *callers]:
        one.close()
    return found


def close(found: list[dict[int, socket.socket]]) -> None:
    for connections in found:
        for connection in connections.values():
            connection.close()


SECRETS = ["a" * 32, "b" * 32, "c" * 32]


def test_workers_meet_whoever_knocks_meanwhile() -> None:
    found = meet(SECRETS, [True] * 3, stranger=b"GET / HTTP/1.1\r\nHost: a.b.c.d.e.f.g.h\r\n\r\n")
    assert [sorted(connections) for connections in found] == [[1, 2], [0, 2], [0, 1]]
    close(found)


def test_a_greeting_may_come_in_pieces() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as caller:
        caller.sendall(b"1234")
        threading.Timer(0.2, lambda: caller.sendall(b"5678")).start()
        answering, _ = listener.accept()
        assert exchange._receive(answering, 8, time.monotonic() + 10) == b"12345678"
        with pytest.raises(TimeoutError):
            exchange._receive(answering, 8, time.monotonic() + 0.2)
        answering.close()


def test_workers_that_cannot_be_reached_are_missed_by_all_they_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "_CONNECT_SECONDS", 1.0)
    found = meet(SECRETS[:2], [False, True])
    assert found == [{}, {}]


class Board:
    """The key-value store of the coordination service, between threads."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._told: dict[tuple[str, int], str] = {}
        self._changed = threading.Condition()
        for name in ("publish", "read", "barrier"):
            monkeypatch.setattr(clusters, name, getattr(self, name))

    def publish(self, topic: str, index: int, value: str) -> None:
        with self._changed:
            self._told[topic, index] = value
            self._changed.notify_all()

    def read(self, topic: str, index: int) -> str:
        with self._changed:
            assert self._changed.wait_for(lambda: (topic, index) in self._told, timeout=20)
            return self._told[topic, index]

    def barrier(self, _name: str, _timeout_seconds: float) -> None:
        pass


@pytest.mark.parametrize("reachable", [True, False])
def test_all_are_connected_or_none_is(monkeypatch: pytest.MonkeyPatch, reachable: bool) -> None:
    Board(monkeypatch)
    call = exchange._call

    def fail(host: str, port: int, greeting: bytes, end: float) -> socket.socket:
        if not reachable and greeting.endswith(b"2"):  # worker 2 reaches nobody
            raise ConnectionRefusedError("no way")
        return call(host, port, greeting, end)

    monkeypatch.setattr(exchange, "_call", fail)
    monkeypatch.setattr(exchange, "_CONNECT_SECONDS", 10.0 if reachable else 1.0)
    found = at_once([lambda index=index: exchange.connect(cluster(3, index)) for index in range(3)])
    assert [each is not None for each in found] == [reachable] * 3
    for each in filter(None, found):
        each.close()
