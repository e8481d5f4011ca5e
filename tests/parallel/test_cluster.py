"""Whether the workers agree, and are alive."""

import contextlib
import re
import socket
import threading
import time

import pytest
import tensorflow as tf

from tfdp.parallel import cluster as clusters
from tfdp.parallel.cluster import Cluster, FailureDetector, broken_link, probe, require_agreement, require_free_port
from tfdp.system.exits import PeerLost, TrainingError


def test_one_worker_agrees_with_itself() -> None:
    require_agreement(Cluster(), {"seed": 1})


SETTINGS = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # with which every HTTP/2 server begins


def listen(answer: bytes | None) -> tuple[socket.socket, str]:
    """A server that sends `answer` to whoever says something, or nothing at all."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with contextlib.suppress(OSError):  # until the server is closed
            while True:
                connection, _ = server.accept()
                with connection:
                    connection.recv(100)
                    connection.sendall(answer or b"")

    if answer is not None:
        threading.Thread(target=serve, daemon=True).start()
    return server, f"127.0.0.1:{server.getsockname()[1]}"


def test_a_probe_tells_alive_silent_and_dead_apart() -> None:
    server, address = listen(SETTINGS)
    with server:
        assert probe(address, 2.0) == "alive"
    server, address = listen(None)  # the kernel takes the connection, as it does for a stopped process
    with server:
        assert probe(address, 0.2) == "silent"
    assert probe(address, 0.2) == "dead"


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"SSH-2.0-x\r\n", b"no", bytes(9)])
def test_a_probe_does_not_take_another_program_for_a_worker(answer: bytes) -> None:
    server, address = listen(answer)
    with server:
        assert probe(address, 2.0) == "foreign"


def test_a_probe_tells_a_name_that_stands_for_nothing() -> None:
    assert probe("no-such-host.invalid:1", 2.0) == "unknown"


@pytest.mark.timeout(30)
def test_whom_the_start_waits_for_is_told_and_has_an_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(clusters, "_NOTICE_SECONDS", 2.5)
    servers, addresses = zip(*[listen(answer) for answer in (SETTINGS, b"HTTP/1.1 400 Bad Request", b"")], strict=True)
    with contextlib.ExitStack() as held:
        for server in servers:
            held.enter_context(server)
        cluster = Cluster(("127.0.0.1:1", *addresses, "no-such-host.invalid:1"), 0)
        watch = held.enter_context(FailureDetector(cluster, 60.0, start_timeout_seconds=4.0).watching())
        with pytest.raises(PeerLost) as lost:
            while True:
                watch.wait_for_start()
                time.sleep(0.05)
    absent = (
        f"worker 2 ({addresses[1]}) answers, but as another program, worker 3 ({addresses[2]}) refuses connections, "
        "worker 4 (no-such-host.invalid:1) has a host name that cannot be resolved here"
    )
    limit = "4 s (distribution.start_timeout_seconds): "
    assert re.fullmatch(f"waiting    [23] s of {re.escape(limit + absent)}\n", capsys.readouterr().err)
    assert str(lost.value).startswith(f"the start took longer than {limit}{absent}; start all workers again")


def test_many_absent_workers_are_counted() -> None:
    watch = FailureDetector(Cluster(tuple(f"a:{port}" for port in range(1, 1001)), 0), 60.0, start_timeout_seconds=1.0)
    said = watch._absent()
    assert said.startswith("worker 1 (a:2) does not answer, worker 2 (a:3) does not answer, ")
    assert said.endswith(", worker 5 (a:6) does not answer, and 994 more")


def test_a_port_that_is_taken_is_told_before_anything_waits() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(TrainingError) as refused:
            require_free_port(Cluster(("127.0.0.1:1", address), 1))
    said = f"this worker cannot listen at its own address, worker 1 ({address}): Address already in use"
    assert str(refused.value) == said
    require_free_port(Cluster(("127.0.0.1:1", address), 1))


@pytest.mark.timeout(30)
def test_a_connection_that_breaks_between_the_living_is_named() -> None:
    server, address = listen(SETTINGS)
    cluster = Cluster(("127.0.0.1:1", address), 0)
    with server, pytest.raises(PeerLost) as lost, FailureDetector(cluster, 60.0).watching() as watch:
        watch.step = 7
        reason = broken_link(cluster.name(1), OSError(104, "Connection reset by peer"))
        raise tf.errors.UnknownError(None, None, f"ConnectionError: {reason} Traceback (most recent call last): ...")
    said = f"the connection to worker 1 ({address}) broke: [Errno 104] Connection reset by peer; the last step"
    assert str(lost.value).startswith(f"{said} done here is 7; ")
