"""Token shards -> tf.data: one global order of sequences, and this worker's slice of it.

The order is a pure function of the position: a source by the weights (`mixture.py`), and within the positions of a
source an epoch and a sequence. Nothing is stateful, so a run resumes at any position at no cost, and the order
does not depend on the number of replicas or workers. Step s of a run takes the positions s * G .. s * G + G - 1, where
G is the global batch size.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import tensorflow as tf

from tfdp.data import mixture
from tfdp.data.sequences import Sequences
from tfdp.data.shards import ABSENT
from tfdp.parallel import collectives
from tfdp.tasks.task import Rows

Partition = Literal["shuffled", "block", "row"]
ROW_TYPES = {"tokens": tf.int32, "position": tf.int64, "source": tf.int32}  # of `Rows`
_PREFETCHED = 4  # elements read ahead of the steps


@dataclass(frozen=True)
class Order:
    """The endless global order of training sequences.

    Attributes:
      sequences: of each source.
      weights: of each source; they add up to 1.
      partition: how positions map to the sequences of a source.
        shuffled: position p is sequence index_shuffle(p % N, (seed, p // N), N) of N: each once an epoch.
        block: row r of every global batch walks through the r-th of G contiguous blocks, so that a replica, whatever
          their number, stays inside one contiguous block of the text for an epoch.
        row: position p is sequence p % N: sequences are dealt to the rows in turn, in the order of the text.
      seed: of the shuffle.
      global_batch_size: G.
    """

    sequences: Sequence[Sequences]
    weights: Sequence[Fraction]
    partition: Partition
    seed: int
    global_batch_size: int

    @property
    def tokens_per_sequence(self) -> float:
        """Tokens of a sequence that a model computes, in the mean over the order; what is absent does not count."""
        sizes = [each.num_inputs / max(1, each.num_sequences) for each in self.sequences]
        return sum(float(weight) * size for weight, size in zip(self.weights, sizes, strict=True))

    def locate(self, position: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """(source, sequence) at a position: int64 scalar -> int32 and int64 scalars."""
        return self._locate(mixture.tree(self.weights), tf.cast(position, tf.int64))

    def describe(self, num_steps: int, names: Sequence[str]) -> str:
        """How many sequences, and epochs, of each source a run of so many steps reads, for people."""
        counts = mixture.counts(mixture.tree(self.weights), num_steps * self.global_batch_size)
        parts = [
            f"{count:,} of {each.num_sequences:,} sequences{'' if len(names) == 1 else f' of {name}'} "
            f"({count / each.num_sequences:.3g} epochs)"
            for count, each, name in zip(counts, self.sequences, names, strict=True)
        ]
        return f"{self.partition}, {'; '.join(parts)}"

    def _locate(self, node: mixture.Fork | mixture.Leaf, position: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        if isinstance(node, mixture.Leaf):
            return tf.constant(node.source), self._sequence(node.source, position)
        before = _count_left(node, position)
        goes_left = _count_left(node, position + 1) > before
        left, right = self._locate(node.left, before), self._locate(node.right, position - before)
        return tf.where(goes_left, left[0], right[0]), tf.where(goes_left, left[1], right[1])

    def _sequence(self, source: int, position: tf.Tensor) -> tf.Tensor:
        size = self.sequences[source].num_sequences
        if self.partition == "shuffled":
            return shuffled_index(position, size, (self.seed + source * 0x2545F491) % 2**30)
        if self.partition == "block":
            return block_index(position, size, self.global_batch_size)
        return position % size


def shuffled_index(position: tf.Tensor | int, num_sequences: int, seed: int) -> tf.Tensor:
    """The sequence at a position of the shuffled order: scalar int64 -> scalar int64 in [0, num_sequences)."""
    epoch = position // num_sequences
    return tf.random.experimental.index_shuffle(
        position % num_sequences,
        seed=tf.stack([tf.constant(seed, tf.int64), epoch]),
        max_index=tf.constant(num_sequences - 1, tf.int64),
    )


def block_index(position: tf.Tensor | int, num_sequences: int, num_rows: int) -> tf.Tensor:
    """The sequence at a position where each of `num_rows` rows walks through a contiguous block of its own.

    An epoch gives row r the block of as many sequences as there are positions of r in it, one after the other. So
    blocks differ in length by one at most, and each sequence comes exactly once an epoch.
    """
    position = tf.convert_to_tensor(position, tf.int64)
    start = position // num_sequences * num_sequences  # position where the epoch starts
    first_row, row = start % num_rows, position % num_rows
    whole, rest = num_sequences // num_rows, num_sequences % num_rows
    # The `rest` rows from first_row on, counted round, have one sequence more; how many of them lie before this row:
    longer = tf.clip_by_value(row - first_row, 0, rest) + tf.clip_by_value(first_row + rest - num_rows, 0, row)
    return row * whole + longer + (position - start) // num_rows


def train_batches(
    strategy: tf.distribute.Strategy, order: Order, start_step: int, excluded_positions: Collection[int] = ()
) -> Iterable[Any]:
    """The endless batches of a run from `start_step` on, distributed over the replicas.

    Each element holds, per replica, `global_batch_size / num_replicas` rows: consecutive positions, in
    replica order. An excluded position keeps its row, all `ABSENT`, so nothing else moves: a run that rolled back
    around some positions equals one that excluded them from the start.
    """
    positions = _worker_positions(strategy, order.global_batch_size, start_step)
    located = _map(positions, lambda position: (position, *order.locate(position)))
    absent = np.array(sorted(excluded_positions), dtype=np.int64)

    def read(positions: np.ndarray, sources: np.ndarray, indices: np.ndarray) -> np.ndarray:
        tokens = _rows(order.sequences, sources, indices)
        tokens[np.isin(positions, absent)] = ABSENT
        return tokens

    return _distribute(strategy, located, read, order.global_batch_size, order.sequences[0].width)


def validation_batches(
    strategy: tf.distribute.Strategy, sequences: Sequence[Sequences], global_batch_size: int
) -> tuple[Iterable[Any], int]:
    """The whole splits of all sources in order, each sequence once, and the number of batches.

    Every replica gets the same number of rows in every batch; rows past the end are all `ABSENT`, so they
    count no token, and no worker enters a collective more often than another.
    """
    ends = np.cumsum([each.num_sequences for each in sequences])
    starts = tf.constant(ends - [each.num_sequences for each in sequences], tf.int64)
    last = len(sequences) - 1

    def locate(position: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        source = tf.minimum(tf.reduce_sum(tf.cast(position >= tf.constant(ends, tf.int64), tf.int32)), last)
        return position, source, position - tf.gather(starts, source)

    def read(_: np.ndarray, sources: np.ndarray, indices: np.ndarray) -> np.ndarray:
        return _rows(sequences, sources, indices)

    positions = _map(_worker_positions(strategy, global_batch_size, 0), locate)
    num_batches = -(-int(ends[-1]) // global_batch_size)
    return _distribute(strategy, positions, read, global_batch_size, sequences[0].width), num_batches


def rows_of(batch: Rows, size: int) -> Callable[[int | tf.Tensor], Rows]:
    """The rows of this replica's micro-batches, by index."""

    def rows(index: int | tf.Tensor) -> Rows:
        return {
            key: tf.ensure_shape(value[index * size : (index + 1) * size], [size, *value.shape[1:]])
            for key, value in batch.items()
        }

    return rows


def rows_of_steps(strategy: tf.distribute.Strategy, batches: Iterator[Any], num_steps: tf.Tensor) -> list[Rows]:
    """The rows of the next steps for each replica of this process: (steps, rows of a replica, ...); inside a graph.

    Args:
      batches: an iterator of `train_batches`.
      num_steps: int32 scalar.
    """
    num_replicas = collectives.num_local_replicas(strategy)
    shapes: list[dict[str, tf.TensorShape]] = []

    def read(count: tf.Tensor, arrays: list[dict[str, tf.TensorArray]]) -> tuple[tf.Tensor, Any]:
        parts = {key: strategy.experimental_local_results(value) for key, value in next(batches).items()}
        rows = [{key: part[index] for key, part in parts.items()} for index in range(num_replicas)]
        shapes[:] = [{key: value.shape for key, value in of_replica.items()} for of_replica in rows]
        written = [
            {key: array.write(count, of_replica[key]) for key, array in of_arrays.items()}
            for of_arrays, of_replica in zip(arrays, rows, strict=True)
        ]
        return count + 1, written

    arrays = [
        {key: tf.TensorArray(dtype, num_steps, infer_shape=False) for key, dtype in ROW_TYPES.items()}
        for _ in range(num_replicas)
    ]
    _, arrays = tf.while_loop(lambda count, _: count < num_steps, read, (tf.constant(0), arrays), parallel_iterations=1)
    return [
        {key: tf.ensure_shape(array.stack(), [None, *of_shapes[key]]) for key, array in of_arrays.items()}
        for of_arrays, of_shapes in zip(arrays, shapes, strict=True)
    ]


def _count_left(fork: mixture.Fork, position: tf.Tensor) -> tf.Tensor:
    """`mixture.count_left` for an int64 scalar."""
    periods, rest = position // fork.total, position % fork.total
    return periods * fork.left_share + (rest * fork.left_share + fork.total // 2) // fork.total


def _rows(sequences: Sequence[Sequences], sources: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """The sequences of several sources, in the order asked for; an index past the end gives a row of `ABSENT`."""
    rows = np.full((len(indices), sequences[0].width), ABSENT, dtype=np.int32)
    for source, each in enumerate(sequences):
        wanted = np.flatnonzero((sources == source) & (indices < each.num_sequences))
        rows[wanted] = each.rows(indices[wanted])
    return rows


def _worker_positions(strategy: tf.distribute.Strategy, global_batch_size: int, start_step: int) -> tf.data.Dataset:
    """This worker's positions of every step from `start_step` on, as an endless dataset of int64 scalars."""
    rows = global_batch_size // collectives.num_workers(strategy)
    offset = collectives.worker_index(strategy) * rows
    first = start_step * rows

    def position(index: tf.Tensor) -> tf.Tensor:
        return (index // rows) * global_batch_size + offset + index % rows

    # `repeat` makes the dataset infinite in name too: of a finite one, tf.distribute asks all replicas before each
    # batch whether anybody has run out.
    return _map(tf.data.Dataset.range(first, np.iinfo(np.int64).max).repeat(), position)


def _map(dataset: tf.data.Dataset, function: Callable[..., Any], **options: Any) -> tf.data.Dataset:
    """`dataset.map` of a function that is TensorFlow's operations already: reading its source would cost time."""
    return dataset.map(tf.autograph.experimental.do_not_convert(function), **options)


def _distribute(
    strategy: tf.distribute.Strategy,
    located: tf.data.Dataset,
    read: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray],
    global_batch_size: int,
    width: int,
) -> Iterable[Any]:
    """Reads the sequences of (position, source, index) in batches and hands each replica its rows."""

    def batch(position: tf.Tensor, source: tf.Tensor, index: tf.Tensor) -> Rows:
        tokens = tf.numpy_function(read, [position, source, index], tf.int32, stateful=False)
        return {
            "tokens": tf.ensure_shape(tokens, (global_batch_size, width)),
            "position": tf.ensure_shape(position, (global_batch_size,)),
            "source": tf.ensure_shape(source, (global_batch_size,)),
        }

    # tf.distribute cuts a batch into one part per replica *of all workers* and gives the parts to the local
    # replicas one after the other. A worker's own rows, batched by the global size, therefore reach its
    # replicas in the right shares and in order, and one element lasts for as many steps as there are workers.
    dataset = located.batch(global_batch_size, drop_remainder=True)
    dataset = _map(dataset, batch, num_parallel_calls=1, deterministic=True).prefetch(_PREFETCHED)
    options = _untuned()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    return _Distributed(strategy.experimental_distribute_dataset(dataset.with_options(options)))


def _untuned() -> tf.data.Options:
    """Options without the thread that tunes a pipeline: there is nothing to tune in ours.

    The thread sleeps longer and longer, up to a minute, and does not always notice that its iterator is gone; whoever
    lets go of the iterator waits until it wakes up (TensorFlow 2.21).
    """
    options = tf.data.Options()
    options.autotune.enabled = False
    return options


class _Distributed:
    """A distributed dataset. The iterators over it that TensorFlow makes for each device are not tuned either."""

    def __init__(self, dataset: Iterable[Any]) -> None:
        self._dataset = dataset

    def __iter__(self) -> Iterator[Any]:
        # No public option reaches the datasets of the devices; tests/data/test_pipeline.py fails when this moves.
        from tensorflow.python.data.ops import multi_device_iterator_ops

        make = multi_device_iterator_ops._create_device_dataset
        multi_device_iterator_ops._create_device_dataset = lambda *given: make(*given).with_options(_untuned())
        try:
            return iter(self._dataset)
        finally:
            multi_device_iterator_ops._create_device_dataset = make
