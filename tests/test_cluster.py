"""Who the workers are, and whether they are alive."""

import contextlib
import json
import socket
import threading

import pytest
import tensorflow as tf

from tfdp.cluster import Cluster, Watch, broken_link, parse_tf_config, probe, require_agreement
from tfdp.exits import ConfigError, PeerLost

GOOD = {"cluster": {"worker": ["a:1", "b:2"]}, "task": {"type": "worker", "index": 1}}


def test_a_worker_finds_its_place() -> None:
    assert parse_tf_config(json.dumps(GOOD)) == Cluster(("a:1", "b:2"), 1)


def test_a_chief_comes_before_the_workers() -> None:
    jobs = {"chief": ["c:1"], "worker": ["a:1", "b:2"]}
    found = [
        parse_tf_config(json.dumps({"cluster": jobs, "task": {"type": kind, "index": index}})).index
        for kind, index in (("chief", 0), ("worker", 0), ("worker", 1))
    ]
    assert found == [0, 1, 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "TF_CONFIG ({) must be JSON like"),
        ("[]", "TF_CONFIG ([]) must be JSON like"),
        ('{"cluster": {"worker": ["a:1"]}}', "must be JSON like"),
        (json.dumps({**GOOD, "task": {"type": "worker", "index": 2}}), "TF_CONFIG (task.index 2) must lie in 0..1"),
        (json.dumps({**GOOD, "task": {"type": "worker", "index": -1}}), "TF_CONFIG (task.index -1) must lie in 0..1"),
        (json.dumps({**GOOD, "task": {"type": "ps", "index": 0}}), "TF_CONFIG (task.type ps) must be one of the jobs"),
        (json.dumps({**GOOD, "cluster": {"worker": ["a:1", "b"]}}), "TF_CONFIG (b) must be host:port"),
        (json.dumps({**GOOD, "cluster": {"worker": ["a:1", "b:0"]}}), "TF_CONFIG (b:0) must be host:port"),
        (json.dumps({**GOOD, "cluster": {"worker": ["a:1", "a:1"]}}), "TF_CONFIG (a:1) must name each address once"),
        (json.dumps({**GOOD, "cluster": {**GOOD["cluster"], "ps": ["p:1"]}}), "TF_CONFIG (ps) must name the jobs"),  # type: ignore[dict-item]
    ],
)
def test_a_wrong_tf_config_is_one_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_tf_config(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


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
