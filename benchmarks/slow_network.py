"""A slow network on one machine: hosts as network namespaces, and a relay that carries their packets late.

`tc` of many kernels can limit a rate but not add a delay (netem is missing). Here each host is a namespace with a
tunnel device, and one process reads the packets of all, holds them back and writes them to the host they are for. A
host sends at a limited rate, one packet after the other; every packet is under way for the delay. Needs root, iproute2
and /dev/net/tun.
"""

import contextlib
import ctypes
import fcntl
import heapq
import multiprocessing
import os
import selectors
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection

_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_CLONE_NEWNET = 0x40000000
_MTU = 9000  # large packets: fewer of them to carry
_MOST_WAITING = 0.5  # seconds of packets that a host may have waiting; more are dropped, as a router would


@dataclass(frozen=True)
class Host:
    """One end of the network: start its processes with `ip netns exec NAME`."""

    name: str
    address: str


@contextlib.contextmanager
def slow_network(num_hosts: int, mbits_per_second: float, delay_seconds: float) -> Iterator[list[Host]]:
    """Hosts that reach one another at this rate, each packet after this delay."""
    hosts = [Host(f"slow{os.getpid()}x{index}", f"10.78.0.{index + 1}") for index in range(num_hosts)]
    ready, theirs = multiprocessing.Pipe()
    relay = multiprocessing.Process(
        target=_relay, args=(hosts, mbits_per_second * 1e6 / 8, delay_seconds, theirs), daemon=True
    )
    try:
        for host in hosts:
            _ip("netns", "add", host.name)
            _ip("-n", host.name, "tuntap", "add", "dev", "slow", "mode", "tun")
            _ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", "slow")
            _ip("-n", host.name, "link", "set", "slow", "mtu", str(_MTU), "up")
            _ip("-n", host.name, "link", "set", "lo", "up")
        relay.start()
        if not ready.poll(10) or ready.recv() != "ready":
            raise OSError("the relay has not started")
        yield hosts
    finally:
        if relay.pid is not None:
            relay.kill()
            relay.join()
        for host in hosts:
            subprocess.run(["ip", "netns", "delete", host.name], capture_output=True, check=False)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], capture_output=True, check=True)


def _open_device(host: Host) -> int:
    """The tunnel of a host, opened inside its namespace; the descriptor works outside too."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open("/proc/self/ns/net") as own, open(f"/run/netns/{host.name}") as theirs:
        if libc.setns(theirs.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
        try:
            device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
            fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH", b"slow", _IFF_TUN | _IFF_NO_PI))
        finally:
            libc.setns(own.fileno(), _CLONE_NEWNET)
    return device


def _relay(hosts: list[Host], bytes_per_second: float, delay: float, ready: Connection) -> None:
    """Carries packets until it is killed."""
    devices = {bytes(map(int, host.address.split("."))): _open_device(host) for host in hosts}
    free_at = dict.fromkeys(devices.values(), 0.0)  # when a host has sent all that it has handed over
    under_way: list[tuple[float, int, int, bytes]] = []  # (arrival, number, device, packet)
    number = 0
    with selectors.DefaultSelector() as selector:
        for device in devices.values():
            selector.register(device, selectors.EVENT_READ)
        ready.send("ready")
        while True:
            wait = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
            for key, _ in selector.select(wait):
                with contextlib.suppress(BlockingIOError):
                    while packet := os.read(key.fd, _MTU + 100):
                        now, target = time.monotonic(), devices.get(packet[16:20])
                        begins = max(now, free_at[key.fd])
                        if packet[0] >> 4 != 4 or target is None or begins - now > _MOST_WAITING:
                            continue
                        free_at[key.fd] = begins + len(packet) / bytes_per_second
                        number += 1
                        heapq.heappush(under_way, (free_at[key.fd] + delay, number, target, packet))
            while under_way and under_way[0][0] <= time.monotonic():
                _, _, target, packet = heapq.heappop(under_way)
                with contextlib.suppress(OSError):
                    os.write(target, packet)


def main() -> None:
    """Shows that the network is as slow as it says: `python benchmarks/slow_network.py MBITS DELAY_MS`."""
    mbits, delay = float(sys.argv[1]), float(sys.argv[2]) / 1000
    with slow_network(2, mbits, delay) as (one, other):
        receive = (
            "import socket,time; s=socket.create_server(('',5000)); c,_=s.accept(); c.sendall(b'x'); "
            "n=0; t=time.monotonic()\nwhile d:=c.recv(1<<16): n+=len(d)\n"
            "print(f'{n*8/1e6/(time.monotonic()-t):.2f} Mbit/s')"
        )
        send = (
            f"import socket,time; t=time.monotonic(); c=socket.create_connection(('{one.address}',5000)); c.recv(1);"
            f"print(f'{{(time.monotonic()-t)*1000:.1f}} ms for two round trips',flush=True);"
            f"c.sendall(bytes({int(mbits * 5e5)}))"
        )
        receiver = subprocess.Popen(["ip", "netns", "exec", one.name, sys.executable, "-c", receive])
        time.sleep(1.0)
        subprocess.run(["ip", "netns", "exec", other.name, sys.executable, "-c", send], check=True)
        receiver.wait()


if __name__ == "__main__":
    main()
