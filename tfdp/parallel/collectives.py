"""Sums over all replicas, from inside a step; and how many replicas and workers there are."""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from tfdp.ops.sums import sum_in_tree
from tfdp.parallel.exchange import Exchange

_GATHER_ELEMENTS = 1 << 24  # of one piece of a canonical sum over workers: 64 MiB from each replica
# Over workers TensorFlow packs tensors of one type end to end, by default all of them. That would undo our packs, and
# it fails where statistics travel in float32 beside gradients in bfloat16; with 1 byte per pack it sends what it is
# given.
_AS_PACKED = tf.distribute.experimental.CommunicationOptions(bytes_per_pack=1)


class Workers(tf.distribute.MultiWorkerMirroredStrategy):
    """MultiWorkerMirroredStrategy with the TCP connections that carry gradients past TensorFlow, if there are any.

    Attributes:
      exchange: with the other workers.
    """

    exchange: Exchange | None = None


def exchange_of(strategy: tf.distribute.Strategy) -> Exchange | None:
    return strategy.exchange if isinstance(strategy, Workers) else None


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


def transport_of(strategy: tf.distribute.Strategy) -> str:
    """What carries gradients from worker to worker: TCP, NCCL or gRPC; "memory" where there is one worker."""
    if num_workers(strategy) == 1:
        return "memory"
    return "TCP" if exchange_of(strategy) else "NCCL" if on_gpu(strategy) else "gRPC"


def on_gpu(strategy: tf.distribute.Strategy) -> bool:
    """Whether the replicas are GPUs."""
    return any("GPU" in device for device in strategy.extended.worker_devices)


def sum_step(
    packs: list[tf.Tensor], statistics: tf.Tensor, reduction: str = "fast"
) -> tuple[list[tf.Tensor], tf.Tensor]:
    """Sums a step's gradients and statistics over all replicas: its one reduction. Call it in replica context.

    Args:
      packs: flat gradients, of one type.
      statistics: a float32 vector.
      reduction: fast or canonical.

    Returns:
      The sums, in the types of the terms. Over TCP a sum in bfloat16 is rounded once, however many workers there are.
    """
    strategy = tf.distribute.get_replica_context().strategy
    exchange = exchange_of(strategy)
    if exchange is None:
        *packs, statistics = replica_sum([*packs, statistics], reduction)
        return packs, statistics
    dtype, sizes = packs[0].dtype, [int(pack.shape[0]) for pack in packs]
    workers, bounds = num_workers(strategy), exchange.bounds(sum(sizes))
    own = bounds[worker_index(strategy) + 1] - bounds[worker_index(strategy)]
    all_statistics, terms = tf.numpy_function(exchange.scatter, [statistics, *packs], [tf.float32, dtype])
    all_statistics = tf.ensure_shape(all_statistics, [workers, *statistics.shape])
    part = _sum_rows(tf.ensure_shape(terms, [workers, own]))
    sums = tf.numpy_function(lambda part: exchange.gather(part, sizes), [part], [dtype] * len(sizes))
    return [tf.ensure_shape(each, [size]) for each, size in zip(sums, sizes, strict=True)], _sum_rows(all_statistics)


def sum_facts(facts: tf.Tensor) -> tf.Tensor:
    """Sums a float32 vector over all replicas, in the tree. Call it in replica context."""
    nothing = tf.zeros([tf.distribute.get_replica_context().num_replicas_in_sync])
    return sum_step([nothing], facts, "canonical")[1]


def gather_words(words: tf.Tensor, earlier: tf.Tensor) -> tf.Tensor:
    """The rows of all replicas in order: int32 (rows, size) -> (replicas * rows, size). Call it in replica context.

    `earlier` is what an earlier collective brought: over TCP one follows the other, on all workers in the same order.
    """
    context = tf.distribute.get_replica_context()
    rows, size = words.shape
    num_replicas = context.num_replicas_in_sync
    if num_replicas == 1:
        return words
    exchange = exchange_of(context.strategy)
    if exchange is None:
        return tf.ensure_shape(context.all_gather(words, axis=0), [num_replicas * rows, size])
    flat, total = tf.reshape(words, [-1]), num_replicas * rows * size  # which the workers share evenly
    arguments = [flat, tf.reshape(earlier, [-1])[0]]
    gathered = tf.numpy_function(lambda part, _: exchange.gather(part, [total])[0], arguments, tf.int32)
    return tf.reshape(gathered, [num_replicas * rows, size])


@tf.function(jit_compile=True, autograph=False)
def _sum_rows(terms: tf.Tensor) -> tf.Tensor:
    """The tree of sums.py over the first axis, in float32; here each worker owns one node."""
    return tf.cast(sum_in_tree(tf.unstack(tf.cast(terms, tf.float32))), terms.dtype)


def replica_sum(values: tf.Tensor | Sequence[tf.Tensor], reduction: str = "fast") -> Any:
    """Sums tensors over all replicas by TensorFlow's collectives, sent in order. Call it in a replica context.

    The order of a `fast` sum is TensorFlow's; that of a `canonical` one is the tree of sums.py over the replicas. In
    one process the strategy adds in the tree already. Otherwise every replica gathers
    the terms, piece by piece, and adds them itself: R times the bytes of a plain reduction, because TensorFlow's
    strategies have no reduce-scatter. Two terms need no gathering.
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
    if exchange_of(strategy) is not None:
        return 0
    in_memory = num_workers(strategy) == 1 and int(strategy.num_replicas_in_sync) <= 2
    return 0 if in_memory else 16 << 20


def num_reductions(strategy: tf.distribute.Strategy, num_packs: int) -> int:
    """Reductions that `sum_step` makes of so many packs and the statistics of a step."""
    return 1 if exchange_of(strategy) is not None else num_packs + 1


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
    return local_replica_index() == 0


def local_replica_index() -> int:
    """Index of this replica among those of its process; in a replica context."""
    context = tf.distribute.get_replica_context()
    return int(tf.get_static_value(context.replica_id_in_sync_group) % num_local_replicas(context.strategy))


def first_replica(strategy: tf.distribute.Strategy, per_replica: Any) -> Any:
    """The value of this process's first replica, for results that are the same on all."""
    return strategy.experimental_local_results(per_replica)[0]
