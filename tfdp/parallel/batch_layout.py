"""How the global batch is cut: replicas, micro-batches, and how many of those are computed in parallel.

Arithmetic alone: it needs neither TensorFlow nor devices, so that a plan cuts as a run does.
"""

import os
from dataclasses import dataclass, replace

from tfdp.config.options import whole_number
from tfdp.config.sections import DistributionConfig, TrainingConfig
from tfdp.system.exits import require
from tfdp.system.machine import available_cores

_FEW_PARAMS = 16_000_000  # a gradient of so many costs little beside the products of a micro-batch, however short
_MANY_TOKENS = 1024  # of a micro-batch: its products cost much beside any gradient


@dataclass(frozen=True)
class BatchLayout:
    """How one global batch is cut; sizes in sequences."""

    global_batch_size: int
    microbatch_size: int  # of one forward pass on one replica
    parallel_microbatches: int = 1  # that a replica computes at the same time, each on cores of its own


def cut_batch(
    num_replicas: int, training: TrainingConfig, reduction: str = "fast", parallel_microbatches: int = 1
) -> BatchLayout:
    """Cuts the global batch: without `training.microbatch_size` into one micro-batch for each parallel one.

    Raises:
      ConfigError: the global batch cannot be cut evenly among the replicas, or, where the reduction is canonical,
        the replicas do not own whole subtrees.
    """
    unit = num_replicas * (training.microbatch_size or 1)
    within = "num_replicas" if training.microbatch_size is None else "num_replicas * training.microbatch_size"
    require(
        training.global_batch_size % unit == 0,
        "training.global_batch_size",
        training.global_batch_size,
        f"must be a multiple of {within} ({unit}): try {-(-training.global_batch_size // unit) * unit}",
    )
    size = training.microbatch_size or training.global_batch_size // (num_replicas * parallel_microbatches)
    num_microbatches = training.global_batch_size // size
    listed = ", ".join(map(str, possible_owners(num_microbatches)))
    require(
        reduction != "canonical" or owns_nodes(num_microbatches, num_replicas),
        "distribution.reduction",
        reduction,
        f"needs replicas that own whole subtrees of the {num_microbatches} micro-batches, a power of two each, and "
        f"there are {num_replicas}: try {listed} replicas, or another training.microbatch_size",
    )
    return BatchLayout(training.global_batch_size, size, parallel_microbatches)


def of_islands(training: TrainingConfig, distribution: DistributionConfig) -> TrainingConfig:
    """The keys that cut a batch, where what is computed at the same time is an island: its rows are the micro-batch."""
    if distribution.synchronization == "every_step":
        return training
    return replace(training, microbatch_size=training.global_batch_size // distribution.num_islands)


def cut(
    num_replicas: int, training: TrainingConfig, distribution: DistributionConfig, parallel_microbatches: int = 1
) -> BatchLayout:
    """The global batch as `distribution.synchronization` cuts it: among replicas, or among islands.

    Raises:
      ConfigError: it cannot be cut so; or the replicas cannot share the islands.
    """
    if distribution.synchronization == "every_step":
        return cut_batch(num_replicas, training, distribution.reduction, parallel_microbatches)
    num_islands = distribution.num_islands
    rows = training.global_batch_size // num_islands
    listed = ", ".join(map(str, possible_owners(num_islands)))
    rule = f"must be shared by the replicas, a power of two each, and there are {num_replicas}: try {listed} replicas"
    require(owns_nodes(num_islands, num_replicas), "distribution.num_islands", num_islands, rule)
    size = training.microbatch_size or rows
    rule = f"must divide the sequences of an island in a step ({rows}): try {rows}"
    require(rows % size == 0, "training.microbatch_size", size, rule)
    return BatchLayout(training.global_batch_size, size, parallel_microbatches)


def parallel_microbatches(
    config: DistributionConfig,
    training: TrainingConfig,
    num_workers: int,
    num_params: int,
    context_length: int,
    num_gpus: int,
) -> int:
    """Micro-batches that a replica computes at the same time, from `training.parallel_microbatches`.

    On a CPU, one operation after the other on one core wastes less than each operation on all cores. But every
    micro-batch computes a gradient of its own, which is read and added: few tokens for many weights are not worth it.

    Raises:
      ConfigError: the micro-batches of a replica cannot be cut into groups of so many.
    """
    num_local = config.num_replicas or max(1, num_gpus)
    share = training.global_batch_size // (num_workers * num_local)
    count = share // training.microbatch_size if training.microbatch_size else share
    chosen = training.parallel_microbatches
    if chosen is not None:
        unit = "micro-batches" if training.microbatch_size else "sequences"
        rule = f"must divide the {count} {unit} of a replica: try 1"
        require(count % chosen == 0, "training.parallel_microbatches", chosen, rule)
        return chosen
    cores = 1 if num_gpus else max(1, num_threads() // num_local)
    width = 1 << cores.bit_length() - 1
    while width > 1:
        tokens = (training.microbatch_size or share // width) * context_length
        pays = num_params <= _FEW_PARAMS or tokens >= _MANY_TOKENS
        if count % width == 0 and pays:
            return width
        width //= 2
    return 1


def describe_batch(num_owners: int, layout: BatchLayout, owner: str = "replica") -> str:
    """How the global batch is cut, for people: "48 sequences = 2 replicas x 3 micro-batches x 8"."""
    total, size, parallel = layout.global_batch_size, layout.microbatch_size, layout.parallel_microbatches
    count = total // (num_owners * size)
    return (
        f"{total} sequences = {num_owners} {owner}{'s' * (num_owners > 1)} x {count} "
        f"micro-batch{'es' * (count > 1)} x {size}{f', {parallel} in parallel,' if parallel > 1 else ''}"
    )


def num_threads() -> int:
    """Threads that this process has for its operations: those that the launcher or the user has set, or its cores."""
    given = whole_number(os.environ.get("TF_NUM_INTRAOP_THREADS", ""))
    return given or len(available_cores()) or os.cpu_count() or 1


def owns_nodes(num_terms: int, num_owners: int) -> bool:
    """Whether owners of equal shares of consecutive terms each hold one node of the tree."""
    share, rest = divmod(num_terms, num_owners)
    return rest == 0 and (num_owners == 1 or share & (share - 1) == 0)


def possible_owners(num_terms: int) -> list[int]:
    """The numbers of owners that can share the tree over `num_terms` terms."""
    return [owners for owners in range(1, num_terms + 1) if owns_nodes(num_terms, owners)]
