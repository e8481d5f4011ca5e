"""How workers meet, here threads of one process, and what strangers may do meanwhile."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from tfdp.parallel import cluster as clusters
from tfdp.parallel import rendezvous
from tfdp.parallel.cluster import Cluster

pytestmark = pytest.mark.timeout(60)


def cluster(num_workers: int, index: int) -> Cluster:
    return Cluster(tuple(f"127.0.0.1:{port}" for port in range(1, num_workers + 1)), index)


def at_once(tasks: list[Callable[[], object]]) -> list:
    with ThreadPoolExecutor(len(tasks)) as pool:
        return [future.result() for future in [pool.submit(task) for task in tasks]]


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
            lambda index=index: rendezvous._meet(cluster(len(reachable), index), listeners[index], told)
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


@pytest.mark.parametrize("num_strangers", [4, 200])
def test_strangers_that_say_nothing_cost_no_time(num_strangers: int) -> None:
    """Half of them connect before the worker calls, half after; each may be silent for five seconds."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=num_strangers)
    address = listener.getsockname()
    strangers = [socket.create_connection(address) for _ in range(num_strangers // 2)]
    started = time.monotonic()
    with listener, rendezvous._Reception(listener, {1: b"b" * 40, 2: b"c" * 40}) as reception:

        def call() -> list[socket.socket]:
            found = [rendezvous._call(*address, b"b" * 40, started + 20)]
            strangers.extend(socket.create_connection(address) for _ in range(num_strangers // 2))
            return [*found, rendezvous._call(*address, b"c" * 40, started + 20)]

        callers, found = at_once([call, lambda: reception.wait(started + 20)])
    assert time.monotonic() - started < rendezvous._GREETING_SECONDS
    assert sorted(found) == [1, 2]
    for one in [*strangers, *callers, *found.values()]:
        one.close()


@pytest.mark.parametrize("said", [b"", b"b", b"x" * 40, b"b" * 39 + b"x", b"\xff" * 1000])
def test_who_does_not_know_the_secret_is_turned_away(monkeypatch: pytest.MonkeyPatch, said: bytes) -> None:
    monkeypatch.setattr(rendezvous, "_GREETING_SECONDS", 0.5)
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as stranger,
        rendezvous._Reception(listener, {1: b"b" * 40}) as reception,
    ):
        stranger.sendall(said)
        assert reception.wait(time.monotonic() + 1.5) == {}
        stranger.settimeout(5)
        with contextlib.suppress(ConnectionResetError):  # or an end, where it has not said too much
            assert stranger.recv(1) == b""


def listening_at(addresses: tuple[str, ...], index: int) -> str:
    with rendezvous._listen(Cluster(addresses, index)) as listener:
        return listener.getsockname()[0]


def test_a_worker_listens_at_its_own_address_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert listening_at(("127.0.0.2:1", "127.0.0.1:1"), 0) == "127.0.0.2"
    assert listening_at(("localhost:1", "localhost:2"), 1) in ("127.0.0.1", "::1")
    assert listening_at(("127.0.0.1:1", "[::1]:2"), 1) == "::1"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("own", "why"),
    [
        (
            "127.0.1.1",
            "resolves to 127.0.1.1 here",
        ),  # as Debian calls every machine itself, and reached by none of the others
        ("192.0.2.1", "is no address of this machine ("),  # behind a translation of addresses
        ("no-such-host.invalid", "is no address of this machine ("),
    ],
)
def test_a_worker_whose_name_stands_for_another_address_listens_at_all_and_says_so(
    capsys: pytest.CaptureFixture[str], own: str, why: str
) -> None:
    assert listening_at(("192.0.2.7:1", f"{own}:2"), 1) in ("0.0.0.0", "::")
    said = capsys.readouterr().err
    assert said.startswith(f"exchange   listens at all addresses of this machine: worker 1 ({own}:2) {why}")
    assert len(said.splitlines()) == 1


def test_a_greeting_may_come_in_pieces() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as caller:
        caller.sendall(b"1234")
        threading.Timer(0.2, lambda: caller.sendall(b"5678")).start()
        answering, _ = listener.accept()
        assert rendezvous._receive(answering, 8, time.monotonic() + 10) == b"12345678"
        with pytest.raises(TimeoutError):
            rendezvous._receive(answering, 8, time.monotonic() + 0.2)
        answering.close()


def test_workers_that_cannot_be_reached_are_missed_by_all_they_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "_CONNECT_SECONDS", 1.0)
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
    call = rendezvous._call

    def fail(host: str, port: int, greeting: bytes, end: float) -> socket.socket:
        if not reachable and greeting.endswith(b"2"):  # worker 2 reaches nobody
            raise ConnectionRefusedError("no way")
        return call(host, port, greeting, end)

    monkeypatch.setattr(rendezvous, "_call", fail)
    monkeypatch.setattr(rendezvous, "_CONNECT_SECONDS", 10.0 if reachable else 1.0)
    found = at_once([lambda index=index: rendezvous.connect(cluster(3, index), 60.0) for index in range(3)])
    assert [each is not None for each in found] == [reachable] * 3
    for each in filter(None, found):
        each.close()
