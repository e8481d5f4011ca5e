"""Whether the workers agree, and are alive."""

import contextlib
import socket
import threading

import pytest
import tensorflow as tf

from tfdp.cluster import Cluster, Watch, broken_link, probe, require_agreement
from tfdp.exits import PeerLost


def test_one_worker_agrees_with_itself() -> None:
    require_agreement(Cluster(), {"seed": 1})


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
    server, address = listen(bytes(9))
    with server:
        assert probe(address, 2.0) == "alive"
    server, address = listen(None)  # the kernel takes the connection, as it does for a stopped process
    with server:
        assert probe(address, 0.2) == "silent"
    assert probe(address, 0.2) == "dead"


@pytest.mark.timeout(30)
def test_a_connection_that_breaks_between_the_living_is_named() -> None:
    server, address = listen(bytes(9))
    cluster = Cluster(("127.0.0.1:1", address), 0)
    with server, pytest.raises(PeerLost) as lost, Watch(cluster, 60.0).watching() as watch:
        watch.step = 7
        reason = broken_link(cluster.name(1), OSError(104, "Connection reset by peer"))
        raise tf.errors.UnknownError(None, None, f"ConnectionError: {reason} Traceback (most recent call last): ...")
    said = f"the connection to worker 1 ({address}) broke: [Errno 104] Connection reset by peer; the last step"
    assert str(lost.value).startswith(f"{said} done here is 7; ")
