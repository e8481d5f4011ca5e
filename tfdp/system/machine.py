"""The cores, GPUs and ports of this machine, and the share of each worker process. It never loads TensorFlow."""

import contextlib
import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from tfdp.system import exits
from tfdp.system.exits import require


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU, by NVIDIA's data sheet."""

    half_peak: float  # FLOP/s of dense matrix products in bfloat16 or float16
    float32_peak: float  # the same as TF32, which TensorFlow uses for float32
    memory_bytes: float

    def matrix_peak(self, precision: str) -> float:
        """FLOP/s of dense matrix products."""
        return self.float32_peak if precision == "float32" else self.half_peak


GPUS = {
    "B200": Gpu(2250e12, 1125e12, 180e9),
    "H200": Gpu(989e12, 494e12, 141e9),
    "H100": Gpu(989e12, 494e12, 80e9),
    "A100": Gpu(312e12, 156e12, 40e9),  # some have 80 GB
    "L40S": Gpu(362e12, 183e12, 48e9),
    "A10": Gpu(125e12, 62.5e12, 24e9),
    "L4": Gpu(121e12, 60e12, 24e9),
}


def find_gpu(name: str) -> Gpu | None:
    """The kind of a GPU by its name in the driver, such as "NVIDIA H100 80GB HBM3"; None for one not known here."""
    return next((gpu for kind, gpu in GPUS.items() if kind in re.split(r"[\s-]", name)), None)


@dataclass(frozen=True)
class Share:
    """One worker's share of the machine."""

    cores: Collection[int]  # empty: all of them, with fewer cores than workers
    environment: Mapping[str, str]


def share_machine(num_workers: int) -> list[Share]:
    """Cuts the cores and GPUs that this process may use into equal parts, one for each worker.

    Thread counts that the user has set in the environment stay as they are.

    Raises:
      ConfigError: there are GPUs, but fewer than workers.
    """
    cores = available_cores()
    gpus = available_gpus()
    require(
        not gpus or num_workers <= len(gpus),
        "num_workers",
        num_workers,
        f"must be at most the number of GPUs: try {len(gpus)}, or CUDA_VISIBLE_DEVICES=-1 to train on the cores",
    )
    shares = []
    for index in range(num_workers):
        own = cores[index * len(cores) // num_workers : (index + 1) * len(cores) // num_workers]
        own = own if len(cores) >= num_workers else []
        environment = {
            "TF_NUM_INTRAOP_THREADS": str(max(1, len(own))),
            # With one thread, an operation that waits for a peer could hold up the one that the peer waits for.
            "TF_NUM_INTEROP_THREADS": str(max(2, len(own))),
            "OMP_NUM_THREADS": str(max(1, len(own))),
        }
        environment = {name: os.environ.get(name, value) for name, value in environment.items()}
        if gpus:
            each = len(gpus) // num_workers
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[index * each : (index + 1) * each])
        shares.append(Share(own, environment))
    return shares


def available_cores() -> list[int]:
    """Numbers of the cores that this process may run on; none where the system cannot pin processes to cores."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def available_gpus() -> list[str]:
    """Names of the GPUs for CUDA_VISIBLE_DEVICES: what it holds already, or all that `nvidia-smi -L` lists."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        names = [name.strip() for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",")]
        return [name for name in names if name not in ("", "-1")]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [str(index) for index in range(sum(line.startswith("GPU ") for line in listed.splitlines()))]


def free_ports(count: int, avoid: Collection[int] = ()) -> list[int]:
    """That many different free ports of 127.0.0.1, none of them in `avoid`; free until another process takes them."""
    with contextlib.ExitStack() as held:
        ports: list[int] = []
        while len(ports) < count:
            listener = held.enter_context(socket.socket())
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
            if port not in avoid:
                ports.append(port)
        return ports


def preparation(cores: Collection[int]) -> Callable[[], None]:
    """A function to call between fork and exec: pins the process to its cores, and on Linux ends it with its parent."""
    parent = os.getpid()
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>

    def prepare() -> None:
        if cores:
            os.sched_setaffinity(0, cores)
        if libc is not None:
            libc.prctl(set_parent_death_signal, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != parent:
                os._exit(exits.FAILED)

    return prepare


def keep_freed_memory() -> None:
    """Makes this process keep the memory that it frees, for its next step, unless a MALLOC_ variable says otherwise.

    glibc gives every large block back to the kernel when it is freed, and takes new pages, each filled with zeros, when
    the next step asks for the same block again. Without glibc nothing happens.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is None or not hasattr(libc, "mallopt") or any(name.startswith("MALLOC_") for name in os.environ):
        return
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # of <malloc.h>
    libc.mallopt(mmap_max, 0)
    libc.mallopt(trim_threshold, -1)  # never
    libc.mallopt(top_pad, 64 << 20)


def total_memory() -> int:
    """Bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
