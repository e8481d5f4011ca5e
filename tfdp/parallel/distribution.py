"""The strategy of a run: its devices, replicas and workers.

A single device is a strategy too, so no code above this module needs a second path for "without distribution".
"""

import contextlib
import os
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from tfdp.config.sections import DistributionConfig
from tfdp.ops.sums import sum_in_tree
from tfdp.parallel.batch_layout import num_threads
from tfdp.parallel.cluster import Cluster, require_free_port
from tfdp.parallel.cluster_spec import Jobs
from tfdp.parallel.collectives import Workers, num_local_replicas, num_workers, on_gpu, transport_of
from tfdp.parallel.native import joining_in_background
from tfdp.parallel.pool import Pool
from tfdp.parallel.rendezvous import connect
from tfdp.system.exits import ConfigError, require
from tfdp.system.machine import keep_freed_memory


class Coordinator(tf.distribute.OneDeviceStrategy):
    """The one device of a chief that hands out work.

    Attributes:
      pool: of the workers that compute.
    """

    def __init__(self, device: str, pool: Pool) -> None:
        super().__init__(device)
        self.pool = pool


def make_strategy(
    config: DistributionConfig,
    cluster: Cluster | None = None,
    parallel_microbatches: int = 1,
    meanwhile: Callable[[], None] = lambda: None,
    jobs: Jobs | None = None,
) -> tf.distribute.Strategy:
    """Makes the strategy of this process. Call it before TensorFlow has touched a device.

    Where there is no GPU, `num_replicas` logical CPU devices are made, one replica each; they share the
    machine's cores, so this rehearses a machine with several GPUs.

    Args:
      config, cluster: the devices and workers that compute.
      parallel_microbatches: that each replica will compute at the same time; each gets its share of the cores.
      meanwhile: called repeatedly during the wait for other workers; an exception that it raises ends the wait.
      jobs: the processes of a job with parameter servers, whose chief this is.

    Raises:
      ConfigError: more replicas are wanted than there are GPUs, or the devices are already fixed.
      TrainingError: another process has the port of this worker.
    """
    gpus = tf.config.list_physical_devices("GPU")
    num_replicas = config.num_replicas or max(1, len(gpus))
    if gpus:
        require(
            num_replicas <= len(gpus),
            "distribution.num_replicas",
            num_replicas,
            f"must be at most the number of GPUs: try {len(gpus)}",
        )
        for gpu in gpus:
            tf.config.experimental.set_memory_growth(gpu, True)
        if config.reduction == "canonical":
            tf.config.experimental.enable_op_determinism()  # kernels of GPUs add in any order; those of CPUs do not
    else:
        keep_freed_memory()
        _make_logical_cpus(num_replicas)
        _share_cores(num_replicas * parallel_microbatches, config.reduction == "canonical")
    kind = "GPU" if gpus else "CPU"
    if cluster is not None and cluster.num_workers > 1:
        require_free_port(cluster)
        _bypass_proxies(cluster)
        with joining_in_background(meanwhile):
            return _multi_worker_strategy(cluster, kind, num_replicas)
    devices = [f"{kind}:{index}" for index in range(num_replicas)]
    if jobs is not None:
        pool = Pool(jobs)  # before a device is touched
        return Coordinator(devices[0], pool)
    if config.strategy == "one_device":
        return tf.distribute.OneDeviceStrategy(devices[0])
    # Logical CPUs share their memory, so a plain sum on the first one beats a ring of copies. TensorFlow's own, AddN,
    # starts with whichever term's memory it may overwrite: from three terms on, its bits can change from run to run.
    if config.reduction == "canonical" or (not gpus and num_replicas > 2):
        reduction = tf.distribute.ReductionToOneDevice(accumulation_fn=sum_in_tree)
    else:
        reduction = None if gpus else tf.distribute.ReductionToOneDevice()
    return tf.distribute.MirroredStrategy(devices, cross_device_ops=reduction)


def _multi_worker_strategy(cluster: Cluster, kind: str, num_local: int) -> tf.distribute.Strategy:
    """MultiWorkerMirroredStrategy over `num_local` devices of each worker.

    TensorFlow takes all GPUs of a worker but only one CPU, however many logical ones there are. For the time
    of construction its one private method that lists the local devices is replaced by ours, so that several
    replicas per worker can be rehearsed without GPUs; tests/test_multi_worker.py fails when TensorFlow moves it.
    """
    from tensorflow.python.distribute.collective_all_reduce_strategy import CollectiveAllReduceExtended

    def local_devices(_self: Any, _resolver: Any, worker_device: str) -> tuple[tuple[str, ...], str]:
        return tuple(f"{worker_device}/device:{kind}:{index}" for index in range(num_local)), kind

    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
        tf.train.ClusterSpec({"worker": list(cluster.addresses)}),
        task_type="worker",
        task_id=cluster.index,
        num_accelerators={kind: num_local},
        rpc_layer="grpc",
    )
    communication = tf.distribute.experimental.CommunicationImplementation
    options = tf.distribute.experimental.CommunicationOptions(
        implementation=communication.NCCL if kind == "GPU" else communication.RING
    )
    original = CollectiveAllReduceExtended._initialize_local_devices
    CollectiveAllReduceExtended._initialize_local_devices = local_devices
    try:
        return Workers(resolver, options)
    finally:
        CollectiveAllReduceExtended._initialize_local_devices = original


def _bypass_proxies(cluster: Cluster) -> None:
    """Makes gRPC connect the workers directly, also where the environment names a proxy.

    gRPC obeys `http_proxy` and the like, except for the hosts in `no_grpc_proxy`, or in `no_proxy` where that is not
    set. Nothing else reads `no_grpc_proxy`, so other libraries keep using the user's proxies.
    """
    ours, general = "no_grpc_proxy", "no_proxy"  # in small letters alone
    hosts = [address.rpartition(":")[0].strip("[]") for address in cluster.addresses]
    given = os.environ.get(ours) or os.environ.get(general) or ""
    os.environ[ours] = ",".join(dict.fromkeys([*filter(None, given.split(",")), *hosts]))


def connect_workers(strategy: tf.distribute.Strategy, config: DistributionConfig, cluster: Cluster) -> None:
    """Opens the TCP connections that carry gradients from worker to worker, where the transport is TCP.

    Every worker calls it once, after all have agreed on their configuration. Without it, or where workers do not reach
    one another, gradients go through TensorFlow's collectives: with several logical CPUs per worker, which rehearse
    GPUs, and with GPUs, which have NCCL. With one CPU replica per worker nothing hides the time of a reduction.

    Raises:
      ConfigError: distribution.transport is tcp, which is not possible here.
    """
    if not isinstance(strategy, Workers) or config.transport == "tensorflow":
        return
    if not on_gpu(strategy) and num_local_replicas(strategy) == 1 and config.bytes_per_pack is None:
        strategy.exchange = connect(cluster, config.peer_timeout_seconds)
    require(
        config.transport != "tcp" or strategy.exchange is not None,
        "distribution.transport",
        config.transport,
        "needs CPUs, not GPUs, and workers that reach one another at any port: try auto",
    )


def describe(strategy: tf.distribute.Strategy) -> str:
    """Replicas and workers for people: "4 replicas on CPU, 2 workers over gRPC"."""
    replicas, workers = int(strategy.num_replicas_in_sync), num_workers(strategy)
    kind = gpu_names(strategy)[0] if on_gpu(strategy) else "CPU"
    way = "" if workers == 1 else f" over {transport_of(strategy)}"
    return f"{replicas} replica{'s' * (replicas > 1)} on {kind}, {workers} worker{'s' * (workers > 1)}{way}"


def num_gpus() -> int:
    """GPUs of this process."""
    return len(tf.config.list_physical_devices("GPU"))


def gpu_names(strategy: tf.distribute.Strategy) -> list[str]:
    """The model name of each replica's GPU, over all workers; empty on CPUs."""
    if not on_gpu(strategy):
        return []
    details = tf.config.experimental.get_device_details(tf.config.list_physical_devices("GPU")[0])
    return [str(details.get("device_name", "GPU"))] * int(strategy.num_replicas_in_sync)


def shared_facts(strategy: tf.distribute.Strategy) -> dict[str, object]:
    """What the devices and libraries of all workers must have in common."""
    return {
        "replicas of each worker": num_local_replicas(strategy),
        "devices": "GPU" if on_gpu(strategy) else "CPU",
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
    }


def _make_logical_cpus(count: int) -> None:
    cpu = tf.config.list_physical_devices("CPU")[0]
    wanted = [tf.config.LogicalDeviceConfiguration() for _ in range(count)]
    try:
        if len(tf.config.get_logical_device_configuration(cpu) or [None]) < count:
            tf.config.set_logical_device_configuration(cpu, wanted)
    except RuntimeError:
        made = len(tf.config.list_logical_devices("CPU"))
        raise ConfigError(
            f"distribution.num_replicas ({count}) must be fixed before TensorFlow starts: this process has {made}"
        ) from None


def _share_cores(num_parts: int, canonical: bool) -> None:
    """Gives each of `num_parts` parallel computations its share of the threads of this process.

    A canonical run always has one thread per operation: where a product sums over more than about 300 terms, XLA and
    oneDNN add in blocks whose size depends on whether they have several threads.
    """
    if not canonical and num_parts == 1:
        return
    with contextlib.suppress(RuntimeError):  # TensorFlow has started in this process: they are fixed
        tf.config.threading.set_intra_op_parallelism_threads(1 if canonical else max(1, num_threads() // num_parts))
        if num_parts > 1:
            tf.config.threading.set_inter_op_parallelism_threads(max(2, num_parts))
