"""Token shards -> tf.data: one global order of sequences, and this worker's slice of it.

The order is a pure function of (seed, position): position p belongs to epoch p // N and is the window
`index_shuffle(p % N, (seed, epoch), N)`. Nothing is stateful, so a run goes on at any position at no cost,
and the order does not know how many replicas or workers there are. Step s of a run takes the positions
s * G .. s * G + G - 1, where G is the global batch size.
"""

from collections.abc import Collection, Iterable
from typing import Any

import numpy as np
import tensorflow as tf

from tfdp import distribution
from tfdp.exits import ConfigError
from tfdp.shards import ABSENT, Split

Batch = dict[str, tf.Tensor]  # "tokens": (rows, context_length + 1) int32; "position": (rows,) int64


def window_index(position: tf.Tensor | int, num_sequences: int, seed: int) -> tf.Tensor:
    """The window at a position of the shuffled order: scalar int64 -> scalar int64 in [0, num_sequences)."""
    epoch = position // num_sequences
    return tf.random.experimental.index_shuffle(
        position % num_sequences,
        seed=tf.stack([tf.constant(seed, tf.int64), epoch]),
        max_index=tf.constant(num_sequences - 1, tf.int64),
    )


def train_batches(
    strategy: tf.distribute.Strategy,
    split: Split,
    context_length: int,
    global_batch_size: int,
    seed: int,
    start_step: int,
    left_out: Collection[int] = (),
) -> Iterable[Any]:
    """The endless shuffled batches of a run from `start_step` on, distributed over the replicas.

    Each element holds, per replica, `global_batch_size / num_replicas` rows: consecutive positions, in
    replica order. A position that is left out keeps its row, all `ABSENT`: nothing else moves.
    """
    num_sequences = split.num_sequences(context_length)
    positions = _worker_positions(strategy, global_batch_size, start_step)
    shuffled = positions.map(lambda position: (position, window_index(position, num_sequences, seed)))
    return _distribute(strategy, shuffled, split, context_length, global_batch_size, left_out)


def validation_batches(
    strategy: tf.distribute.Strategy, split: Split, context_length: int, global_batch_size: int
) -> tuple[Iterable[Any], int]:
    """The whole split in order, each window once, and the number of batches.

    Every replica gets the same number of rows in every batch; rows past the end are all `ABSENT`, so they
    count no token, and no worker enters a collective more often than another.
    """
    num_batches = -(-split.num_sequences(context_length) // global_batch_size)
    positions = _worker_positions(strategy, global_batch_size, 0).map(lambda position: (position, position))
    return _distribute(strategy, positions, split, context_length, global_batch_size), num_batches


def check_lengths(split: Split, name: str, context_length: int, source: str = "") -> None:
    """Raises `ConfigError` for a split too short to hold one whole sequence."""
    needed = context_length + 1
    if split.num_documents == 0 or split.num_bytes == 0:
        raise ConfigError(f"data.source ({source}): the {name} split must not be empty: it holds no text")
    if split.num_tokens < needed:
        raise ConfigError(
            f"model.context_length ({context_length}) must fit into the {name} split, which has {split.num_tokens} "
            f"tokens: try {split.num_tokens - 1} or more text"
        )


def _worker_positions(strategy: tf.distribute.Strategy, global_batch_size: int, start_step: int) -> tf.data.Dataset:
    """This worker's positions of every step from `start_step` on, as an endless dataset of int64 scalars."""
    rows = global_batch_size // distribution.num_workers(strategy)
    offset = distribution.worker_index(strategy) * rows
    first = start_step * rows

    def position(index: tf.Tensor) -> tf.Tensor:
        return (index // rows) * global_batch_size + offset + index % rows

    # `repeat` makes the dataset infinite in name too: of a finite one, tf.distribute asks all replicas before each
    # batch whether anybody has run out.
    return tf.data.Dataset.range(first, np.iinfo(np.int64).max).repeat().map(position)


def _distribute(
    strategy: tf.distribute.Strategy,
    indexed: tf.data.Dataset,
    split: Split,
    context_length: int,
    global_batch_size: int,
    left_out: Collection[int] = (),
) -> Iterable[Any]:
    """Reads the windows of (position, window) pairs in batches and hands each replica its rows."""
    absent = np.array(sorted(left_out), dtype=np.int64)

    def read(positions: np.ndarray, windows: np.ndarray) -> np.ndarray:
        tokens = split.windows(windows, context_length)
        tokens[np.isin(positions, absent)] = ABSENT
        return tokens

    def batch(position: tf.Tensor, window: tf.Tensor) -> Batch:
        tokens = tf.numpy_function(read, [position, window], tf.int32, stateful=False)
        return {
            "tokens": tf.ensure_shape(tokens, (global_batch_size, context_length + 1)),
            "position": tf.ensure_shape(position, (global_batch_size,)),
        }

    # tf.distribute cuts a batch into one part per replica *of all workers* and gives the parts to the local
    # replicas one after the other. A worker's own rows, batched by the global size, therefore reach its
    # replicas in the right shares and in order, and one element lasts for as many steps as there are workers.
    dataset = indexed.batch(global_batch_size, drop_remainder=True)
    dataset = dataset.map(batch, num_parallel_calls=1, deterministic=True).prefetch(tf.data.AUTOTUNE)
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    return strategy.experimental_distribute_dataset(dataset.with_options(options))
