"""Where a run computes: the strategy, its replicas and workers, and what they sum.

The only module whose behaviour hangs on environment variables. A single device is a strategy too, so that nothing
above this module has a second path for "without distribution".
"""

import contextlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from tfdp.cluster import Cluster, require_free_port
from tfdp.config import DistributionConfig, TrainingConfig, require
from tfdp.exchange import Exchange
from tfdp.exits import ConfigError
from tfdp.machine import available_cores, keep_freed_memory
from tfdp.native import joining_in_background
from tfdp.options import whole_number
from tfdp.rendezvous import connect
from tfdp.sums import owns_nodes, possible_owners, sum_in_tree

_FEW_PARAMS = 16_000_000  # whose gradient costs little against the products of a micro-batch, however short
_MANY_TOKENS = 1024  # of a micro-batch, whose products cost much against any gradient
_GATHER_ELEMENTS = 1 << 24  # of one piece of a canonical sum over workers: 64 MiB from each replica
# Over workers TensorFlow lays tensors end to end until a pack has as many bytes: by default all of them, of one type.
_AS_PACKED = tf.distribute.experimental.CommunicationOptions(bytes_per_pack=1)


def make_strategy(
    config: DistributionConfig,
    cluster: Cluster | None = None,
    parallel_microbatches: int = 1,
    meanwhile: Callable[[], None] = lambda: None,
) -> tf.distribute.Strategy:
    """Makes the strategy of this process. Call it before TensorFlow has touched a device.

    Where there is no GPU, `num_replicas` logical CPU devices are made, one replica each; they share the
    machine's cores, so this rehearses a machine with several GPUs.

    Args:
      config, cluster: who computes.
      parallel_microbatches: that each replica will compute at the same time; each gets its share of the cores.
      meanwhile: is called again and again while it waits for other workers; what it raises ends the waiting.

    Raises:
      ConfigError: more replicas are asked for than there are GPUs, or the devices are already fixed.
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
    if config.strategy == "one_device":
        return tf.distribute.OneDeviceStrategy(devices[0])
    # Logical CPUs share their memory, so a plain sum on the first one beats a ring of copies. TensorFlow's own, AddN,
    # starts with whichever term's memory it may overwrite: from three terms on, its bits can change from run to run.
    if config.reduction == "canonical" or (not gpus and num_replicas > 2):
        reduction = tf.distribute.ReductionToOneDevice(accumulation_fn=sum_in_tree)
    else:
        reduction = None if gpus else tf.distribute.ReductionToOneDevice()
    return tf.distribute.MirroredStrategy(devices, cross_device_ops=reduction)


class _Workers(tf.distribute.MultiWorkerMirroredStrategy):
    """MultiWorkerMirroredStrategy, and the connections over which gradients travel past TensorFlow, if there are any.

    Attributes:
      exchange: with the other workers.
    """

    exchange: Exchange | None = None


def _exchange_of(strategy: tf.distribute.Strategy) -> Exchange | None:
    return strategy.exchange if isinstance(strategy, _Workers) else None


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
        return _Workers(resolver, options)
    finally:
        CollectiveAllReduceExtended._initialize_local_devices = original


def _bypass_proxies(cluster: Cluster) -> None:
    """Has gRPC connect the workers directly, also where the environment names a proxy for all else.

    gRPC obeys `http_proxy` and its like but for the hosts in `no_grpc_proxy`, or in `no_proxy` where that is not set.
    Nothing else reads the former, so what other libraries reach through the user's proxies stays as it is.
    """
    ours, general = "no_grpc_proxy", "no_proxy"  # in small letters alone
    hosts = [address.rpartition(":")[0].strip("[]") for address in cluster.addresses]
    given = os.environ.get(ours) or os.environ.get(general) or ""
    os.environ[ours] = ",".join(dict.fromkeys([*filter(None, given.split(",")), *hosts]))


def connect_workers(strategy: tf.distribute.Strategy, config: DistributionConfig, cluster: Cluster) -> None:
    """Opens the connections over which gradients travel from worker to worker, where they are to.

    Call it once on every worker, after all have agreed on their configuration. Without it, or where workers do not
    reach one another, gradients go through TensorFlow's collectives.

    Raises:
      ConfigError: distribution.transport is tcp, which is not possible here.
    """
    if not isinstance(strategy, _Workers) or config.transport == "tensorflow":
        return
    if not on_gpu(strategy) and num_local_replicas(strategy) == 1 and config.bytes_per_pack is None:
        strategy.exchange = connect(cluster, config.peer_timeout_seconds)
    require(
        config.transport != "tcp" or strategy.exchange is not None,
        "distribution.transport",
        config.transport,
        "needs CPUs, not GPUs, and workers that reach one another at any port: try auto",
    )


def num_workers(strategy: tf.distribute.Strategy) -> int:
    """Number of processes that train together."""
    return int(strategy.num_replicas_in_sync) // num_local_replicas(strategy)


def worker_index(strategy: tf.distribute.Strategy) -> int:
    """Index of this process among the workers; worker 0 is the chief."""
    resolver = strategy.cluster_resolver
    return int(resolver.task_id or 0) if resolver else 0


def num_local_replicas(strategy: tf.distribute.Strategy) -> int:
    """Number of replicas in this process."""
    return len(strategy.extended.worker_devices)


def microbatch_size(
    strategy: tf.distribute.Strategy, training: TrainingConfig, reduction: str = "fast", parallel_microbatches: int = 1
) -> int:
    """Sequences of one forward pass on one replica.

    Without `training.microbatch_size`, all of a replica's share, or its parts that are computed side by side.

    Raises:
      ConfigError: the global batch cannot be cut evenly among the replicas, or, where the reduction is canonical,
        the replicas do not own whole subtrees.
    """
    replicas = int(strategy.num_replicas_in_sync)
    unit = replicas * (training.microbatch_size or 1)
    within = "num_replicas" if training.microbatch_size is None else "num_replicas * training.microbatch_size"
    require(
        training.global_batch_size % unit == 0,
        "training.global_batch_size",
        training.global_batch_size,
        f"must be a multiple of {within} ({unit}): try {-(-training.global_batch_size // unit) * unit}",
    )
    size = training.microbatch_size or training.global_batch_size // (replicas * parallel_microbatches)
    num_microbatches = training.global_batch_size // size
    listed = ", ".join(map(str, possible_owners(num_microbatches)))
    require(
        reduction != "canonical" or owns_nodes(num_microbatches, replicas),
        "distribution.reduction",
        reduction,
        f"needs replicas that own whole subtrees of the {num_microbatches} micro-batches, a power of two each, and "
        f"there are {replicas}: try {listed} replicas, or another training.microbatch_size",
    )
    return size


def parallel_microbatches(
    config: DistributionConfig, training: TrainingConfig, num_workers: int, num_params: int, context_length: int
) -> int:
    """Micro-batches that a replica computes at the same time, from `training.parallel_microbatches`.

    On a CPU, one operation after the other on one core wastes less than each operation on all cores. But every
    micro-batch computes a gradient of its own, which is read and added: few tokens for many weights are not worth it.

    Raises:
      ConfigError: the micro-batches of a replica cannot be cut into groups of so many.
    """
    gpus = tf.config.list_physical_devices("GPU")
    num_local = config.num_replicas or max(1, len(gpus))
    share = training.global_batch_size // (num_workers * num_local)
    count = share // training.microbatch_size if training.microbatch_size else share
    chosen = training.parallel_microbatches
    if chosen is not None:
        unit = "micro-batches" if training.microbatch_size else "sequences"
        rule = f"must divide the {count} {unit} of a replica: try 1"
        require(count % chosen == 0, "training.parallel_microbatches", chosen, rule)
        return chosen
    cores = 1 if gpus else max(1, _num_threads() // num_local)
    width = 1 << cores.bit_length() - 1
    while width > 1:
        tokens = (training.microbatch_size or share // width) * context_length
        pays = num_params <= _FEW_PARAMS or tokens >= _MANY_TOKENS
        if count % width == 0 and pays:
            return width
        width //= 2
    return 1


def describe(strategy: tf.distribute.Strategy) -> str:
    """Replicas and workers for people: "4 replicas on CPU, 2 workers over gRPC"."""
    replicas, workers = int(strategy.num_replicas_in_sync), num_workers(strategy)
    kind = gpu_names(strategy)[0] if on_gpu(strategy) else "CPU"
    way = "" if workers == 1 else f" over {transport_of(strategy)}"
    return f"{replicas} replica{'s' * (replicas > 1)} on {kind}, {workers} worker{'s' * (workers > 1)}{way}"


def transport_of(strategy: tf.distribute.Strategy) -> str:
    """What carries gradients from worker to worker: TCP, NCCL or gRPC; "memory" where there is one worker."""
    if num_workers(strategy) == 1:
        return "memory"
    return "TCP" if _exchange_of(strategy) else "NCCL" if on_gpu(strategy) else "gRPC"


def describe_batch(
    strategy: tf.distribute.Strategy, training: TrainingConfig, size: int, parallel_microbatches: int
) -> str:
    """How the global batch is cut, for people: "48 sequences = 2 replicas x 3 micro-batches x 8"."""
    replicas = int(strategy.num_replicas_in_sync)
    count = training.global_batch_size // (replicas * size)
    plural = "es" * (count > 1)
    return (
        f"{training.global_batch_size} sequences = {replicas} replica{'s' * (replicas > 1)} x {count} "
        f"micro-batch{plural} x {size}{f', {parallel_microbatches} side by side,' if parallel_microbatches > 1 else ''}"
    )


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


def on_gpu(strategy: tf.distribute.Strategy) -> bool:
    """Whether the replicas are GPUs."""
    return any("GPU" in device for device in strategy.extended.worker_devices)


def sum_step(packs: list[tf.Tensor], told: tf.Tensor, reduction: str = "fast") -> tuple[list[tf.Tensor], tf.Tensor]:
    """Sums a step's gradients and what is told of it over all replicas: its one reduction. Call it in replica context.

    Args:
      packs: flat gradients, of one type.
      told: a float32 vector.
      reduction: fast or canonical.

    Returns:
      The sums, as they came. Those of less than float32 are rounded to their type; over TCP once, however many workers.
    """
    strategy = tf.distribute.get_replica_context().strategy
    exchange = _exchange_of(strategy)
    if exchange is None:
        *packs, told = replica_sum([*packs, told], reduction)
        return packs, told
    dtype, sizes = packs[0].dtype, [int(pack.shape[0]) for pack in packs]
    workers, bounds = num_workers(strategy), exchange.bounds(sum(sizes))
    own = bounds[worker_index(strategy) + 1] - bounds[worker_index(strategy)]
    told_by_all, terms = tf.numpy_function(exchange.scatter, [told, *packs], [tf.float32, dtype])
    told_by_all = tf.ensure_shape(told_by_all, [workers, *told.shape])
    part = _sum_rows(tf.ensure_shape(terms, [workers, own]))
    sums = tf.numpy_function(lambda part: exchange.gather(part, sizes), [part], [dtype] * len(sizes))
    return [tf.ensure_shape(each, [size]) for each, size in zip(sums, sizes, strict=True)], _sum_rows(told_by_all)


@tf.function(jit_compile=True, autograph=False)
def _sum_rows(terms: tf.Tensor) -> tf.Tensor:
    """The tree of sums.py over the first axis, in float32; one replica of each worker owns one node."""
    return tf.cast(sum_in_tree(tf.unstack(tf.cast(terms, tf.float32))), terms.dtype)


def replica_sum(values: tf.Tensor | Sequence[tf.Tensor], reduction: str = "fast") -> Any:
    """Sums tensors over all replicas by TensorFlow's collectives, sent in order. Call it in a replica context.

    The order of a `fast` sum is TensorFlow's; that of a `canonical` one is the tree of sums.py over the replicas. In
    one process the strategy adds in the tree already, and two terms have one order. Otherwise every replica gathers
    the terms, piece by piece, and adds them itself.
    """
    context = tf.distribute.get_replica_context()
    if context.num_replicas_in_sync == 1:
        return values
    if reduction == "fast" or context.num_replicas_in_sync == 2 or num_workers(context.strategy) == 1:
        if isinstance(values, tf.Tensor):
            return context.all_reduce(tf.distribute.ReduceOp.SUM, values, _AS_PACKED)
        backwards = context.all_reduce(tf.distribute.ReduceOp.SUM, list(values)[::-1], _AS_PACKED)
        return backwards[::-1]  # over workers TensorFlow begins with the last one
    return tf.nest.map_structure(_gathered_sum, values)


def _gathered_sum(values: tf.Tensor) -> tf.Tensor:
    context = tf.distribute.get_replica_context()
    flat = tf.reshape(values, [-1])
    length = int(flat.shape[0])
    pieces = tf.split(flat, [min(_GATHER_ELEMENTS, length - at) for at in range(0, length, _GATHER_ELEMENTS)])
    gathered = [context.all_gather(piece[tf.newaxis], axis=0) for piece in pieces]
    total = tf.concat([sum_in_tree(tf.unstack(terms, context.num_replicas_in_sync)) for terms in gathered], axis=0)
    return tf.reshape(total, values.shape)


def default_bytes_per_pack(strategy: tf.distribute.Strategy) -> int:
    """Bytes of a pack of a reduction.

    Over gRPC 16 MiB: TensorFlow's ring cuts a pack of two workers into pieces of 4 MiB, the most that it sends at once
    (42 MB on one machine: 185 ms in packs of 4 MiB, 116 of 16 MiB, 125 in one). Over NCCL more, whose calls cost more.

    0 where laying gradients end to end would cost more than it saves: over plain TCP, which sends them from where they
    are, and where two replicas share one memory.
    """
    if on_gpu(strategy):
        return 32 << 20
    if _exchange_of(strategy) is not None:
        return 0
    in_memory = num_workers(strategy) == 1 and int(strategy.num_replicas_in_sync) <= 2
    return 0 if in_memory else 16 << 20


def num_reductions(strategy: tf.distribute.Strategy, num_packs: int) -> int:
    """Reductions that `sum_step` makes of so many packs and what is told of the step."""
    return 1 if _exchange_of(strategy) is not None else num_packs + 1


def replica_slots(values: tf.Tensor) -> tf.Tensor:
    """Lays a float32 tensor into this replica's slot: (num_replicas, *shape), 0 in the slots of the others.

    Summed over the replicas, in whatever order, the slots hold the values of all. Call it in a replica context.
    """
    context = tf.distribute.get_replica_context()
    mine = tf.range(context.num_replicas_in_sync) == context.replica_id_in_sync_group
    return tf.where(tf.reshape(mine, [-1, *[1] * len(values.shape)]), values[tf.newaxis], 0.0)


def replica_gather(values: tf.Tensor) -> tf.Tensor:
    """The values of all replicas in order, (num_replicas, *shape), for small float32 tensors; one collective."""
    return tf.reshape(
        replica_sum(tf.reshape(replica_slots(values), [-1])),
        [tf.distribute.get_replica_context().num_replicas_in_sync, *values.shape],
    )


def is_first_replica() -> bool:
    """Whether this is the replica of its process that `first_replica` takes; true outside of all replicas too."""
    if not tf.distribute.has_strategy() or tf.distribute.in_cross_replica_context():
        return True
    context = tf.distribute.get_replica_context()
    return bool(tf.get_static_value(context.replica_id_in_sync_group) % num_local_replicas(context.strategy) == 0)


def first_replica(strategy: tf.distribute.Strategy, per_replica: Any) -> Any:
    """The value of this process's first replica, for results that are the same on all."""
    return strategy.experimental_local_results(per_replica)[0]


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


def _num_threads() -> int:
    """Threads that this process has for its operations: as many as the launcher or the user has set, or its cores."""
    given = whole_number(os.environ.get("TF_NUM_INTRAOP_THREADS", ""))
    return given or len(available_cores()) or os.cpu_count() or 1


def _share_cores(num_parts: int, canonical: bool) -> None:
    """Gives each part that computes at the same time its share of the threads of this process.

    A canonical run has one thread for each operation, always: where a product sums over more than about 300 terms, XLA
    and oneDNN add them up in blocks whose size depends on whether they have several.
    """
    if not canonical and num_parts == 1:
        return
    with contextlib.suppress(RuntimeError):  # fixed since TensorFlow started in this process
        tf.config.threading.set_intra_op_parallelism_threads(1 if canonical else max(1, _num_threads() // num_parts))
        if num_parts > 1:
            tf.config.threading.set_inter_op_parallelism_threads(max(2, num_parts))
