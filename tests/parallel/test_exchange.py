"""Sums over workers through sockets, here between threads of one process."""

import ctypes
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations

import ml_dtypes
import numpy as np
import pytest

from tfdp.parallel.cluster import Cluster
from tfdp.parallel.exchange import Exchange

pytestmark = pytest.mark.timeout(60)


def cluster(num_workers: int, index: int) -> Cluster:
    return Cluster(tuple(f"127.0.0.1:{port}" for port in range(1, num_workers + 1)), index)


def connected(num_workers: int, timeout_seconds: float = 60.0) -> list[Exchange]:
    connections: list[dict[int, socket.socket]] = [{} for _ in range(num_workers)]
    for one, other in combinations(range(num_workers), 2):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            connections[one][other] = socket.create_connection(listener.getsockname())
            connections[other][one] = listener.accept()[0]
    return [Exchange(cluster(num_workers, index), found, timeout_seconds) for index, found in enumerate(connections)]


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


# A filter of Linux's that drops all segments that reach a socket, as a line does that is cut without a word.
DROP_ALL = struct.pack("HBBI", 0x06, 0, 0, 0)  # BPF_RET | BPF_K, 0


def cut(*exchanges: Exchange) -> None:
    """Lets nothing reach these workers any more: neither bytes nor the system's confirmations."""
    for connection in (connection for each in exchanges for connection in each._connections.values()):
        program = ctypes.create_string_buffer(DROP_ALL)
        connection.setsockopt(
            socket.SOL_SOCKET, 26, struct.pack("HP", 1, ctypes.addressof(program))
        )  # SO_ATTACH_FILTER


needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux filters what reaches a socket")


@needs_linux
@pytest.mark.parametrize("beforehand", [True, False])
def test_a_connection_that_is_cut_without_a_word_is_noticed_in_time(beforehand: bool) -> None:
    """Beforehand: no byte gets through; else the line is cut while both wait, after an exchange."""
    one, other = connected(2, timeout_seconds=3.0)
    small, large = np.zeros(1, np.float32), np.zeros(4_000_000, np.float32)
    if not beforehand:
        at_once([lambda: one.scatter(small, large), lambda: other.scatter(small, large)])
    cut(one, other)
    started = time.monotonic()
    with pytest.raises(ConnectionError, match=r"the connection to worker 1 \(127\.0\.0\.1:2\) broke: \[Errno 110\]"):
        one.scatter(small, large)
    assert 2 < time.monotonic() - started < 10
    for each in (one, other):
        each.close()


@needs_linux
def test_a_worker_that_waits_in_an_exchange_notices_a_cut_too() -> None:
    one, other = connected(2, timeout_seconds=3.0)
    threading.Timer(1.0, lambda: cut(one, other)).start()
    started = time.monotonic()
    with pytest.raises(ConnectionError, match=r"broke: \[Errno 110\]"):
        one.scatter(np.zeros(1, np.float32), np.zeros(4_000_000, np.float32))  # the other one never comes
    assert 2 < time.monotonic() - started < 12
    for each in (one, other):
        each.close()


def test_a_worker_may_come_to_an_exchange_later_than_a_connection_may_be_cut() -> None:
    """It compiles, say: its system confirms what comes, but its buffers are full."""
    one, other = connected(2, timeout_seconds=1.0)
    small, large = np.zeros(1, np.float32), np.ones(8_000_000, np.float32)

    def late() -> tuple[np.ndarray, np.ndarray]:
        time.sleep(4.0)
        return other.scatter(small, large)

    found = at_once([lambda: one.scatter(small, large), late])
    assert [terms.sum() for _, terms in found] == [8_000_000.0] * 2
    for each in (one, other):
        each.close()
