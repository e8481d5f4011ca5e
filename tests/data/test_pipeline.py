"""The global order: a permutation for every epoch, the same whatever carries it."""

from collections.abc import Iterator
from fractions import Fraction
from functools import cache
from itertools import islice
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from tfdp.config.parsing import load
from tfdp.config.sections import DistributionConfig
from tfdp.data import pipeline
from tfdp.data.sequences import PackedSequences
from tfdp.data.shards import ABSENT, Split
from tfdp.data.sources import check_length
from tfdp.parallel.distribution import make_strategy
from tfdp.system.exits import ConfigError
from trainers.causal_lm import Config

CONTEXT = 4
SEED = 3


@cache
def strategy_of(num_replicas: int) -> tf.distribute.Strategy:
    return make_strategy(DistributionConfig(num_replicas=num_replicas))


def make_split(num_tokens: int) -> Split:
    """A split of the ids 0, 1, 2 ... in two shards."""
    return Split(np.split(np.arange(num_tokens, dtype=np.uint16), [num_tokens // 3]), 1, num_tokens)


def order(start: int, count: int, num_sequences: int, seed: int = SEED) -> list[int]:
    """The windows at `count` positions from `start` on."""
    positions = tf.data.Dataset.range(start, start + count)
    windows = positions.map(lambda position: pipeline.shuffled_index(position, num_sequences, seed))
    return [int(window) for window in windows.as_numpy_iterator()]


def parts(strategy: tf.distribute.Strategy, batch: dict[str, Any], key: str) -> list[np.ndarray]:
    """What each replica holds of a batch, in replica order."""
    return [value.numpy() for value in strategy.experimental_local_results(batch[key])]


def train_batches(num_replicas: int, split: Split, batch_size: int, start_step: int = 0) -> Iterator[dict[str, Any]]:
    sequences = [PackedSequences(split, CONTEXT)]
    whole = pipeline.Order(sequences, [Fraction(1)], "shuffled", SEED, batch_size)
    return iter(pipeline.train_batches(strategy_of(num_replicas), whole, start_step))


def windows(split: Split, indices: list[int] | np.ndarray) -> np.ndarray:
    return PackedSequences(split, CONTEXT).rows(np.array(indices))


# --- The order -------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_sequences", [1, 2, 7, 1000])
def test_every_epoch_is_a_permutation(num_sequences: int) -> None:
    found = np.reshape(order(0, 3 * num_sequences, num_sequences), (3, num_sequences))
    for epoch in found:
        assert sorted(epoch.tolist()) == list(range(num_sequences))


def test_epochs_and_seeds_have_their_own_orders() -> None:
    epochs = np.reshape(order(0, 3000, 1000), (3, 1000))
    orders = [
        *epochs,
        np.arange(1000),
        *(np.array(order(0, 1000, 1000, seed)) for seed in (0, 1, 1234, (1 << 30) - 1)),
    ]
    for index, one in enumerate(orders):
        for other in orders[:index]:
            assert (one == other).mean() < 0.02, "two random permutations agree in about one place of 1000"


@pytest.mark.parametrize("seed", [1 << 30, 1 << 40])
def test_a_seed_that_the_configuration_takes_has_its_own_order(seed: int) -> None:
    """`index_shuffle` looks at the low 30 bits of a seed alone, without a word (TensorFlow 2.21)."""
    try:
        load(Config, ["--seed", str(seed)], "train", "")
    except ConfigError:
        return
    assert order(0, 100, 100, seed) != order(0, 100, 100, 0)


def test_the_order_is_a_function_of_the_position_alone() -> None:
    assert order(0, 50, 20)[33:47] == order(33, 14, 20)


def test_the_order_never_changes() -> None:
    """Resumed runs rest on it: a new TensorFlow that shuffles in another way must not go unnoticed."""
    assert order(0, 10, 10) == [4, 0, 2, 9, 1, 3, 5, 8, 6, 7]
    assert order(10, 10, 10) == [9, 3, 5, 1, 0, 7, 8, 4, 2, 6]


# --- Training batches ------------------------------------------------------------------------------


@pytest.mark.parametrize("num_replicas", [1, 3])
def test_no_iterator_has_a_thread_that_tunes(num_replicas: int) -> None:
    """Letting go of one would wait for that thread, for up to a minute."""
    iterator = train_batches(num_replicas, make_split(101), 12)
    next(iterator)
    of_devices = iterator._iterators[0]._iterator  # type: ignore[attr-defined]
    datasets = [of_devices._dataset] if hasattr(of_devices, "_dataset") else []
    datasets += [each._dataset for each in getattr(of_devices, "_device_iterators", [])]
    assert len(datasets) >= num_replicas
    assert [dataset.options().autotune.enabled for dataset in datasets] == [False] * len(datasets)


@pytest.mark.parametrize("start_step", [0, 1, 5])
@pytest.mark.parametrize("num_replicas", [1, 2, 3, 4])
def test_each_replica_holds_its_consecutive_positions(num_replicas: int, start_step: int) -> None:
    batch_size, strategy = 12, strategy_of(num_replicas)
    share = batch_size // num_replicas
    batches = islice(train_batches(num_replicas, make_split(101), batch_size, start_step), 3)
    for step, batch in enumerate(batches, start=start_step):
        found = parts(strategy, batch, "position")
        assert len(found) == num_replicas
        for replica, positions in enumerate(found):
            first = step * batch_size + replica * share
            assert positions.tolist() == list(range(first, first + share))


@pytest.mark.parametrize("num_replicas", [1, 2, 3, 4])
def test_the_rows_hold_the_windows_of_their_positions(num_replicas: int) -> None:
    split, strategy = make_split(102), strategy_of(num_replicas)
    assert PackedSequences(split, CONTEXT).num_sequences == 26
    expected = windows(split, order(0, 48, 26))
    batches = list(islice(train_batches(num_replicas, split, 12), 4))
    rows = np.concatenate([part for batch in batches for part in parts(strategy, batch, "tokens")])
    assert rows.dtype == np.int32
    np.testing.assert_array_equal(rows, expected)


@pytest.mark.parametrize("num_replicas", [1, 2])
def test_an_epoch_of_batches_predicts_every_token_once(num_replicas: int) -> None:
    split, strategy = make_split(47), strategy_of(num_replicas)  # 12 windows, the last with 2 targets of 4
    batches = islice(train_batches(num_replicas, split, 4), 3)
    rows = np.concatenate([part for batch in batches for part in parts(strategy, batch, "tokens")])
    targets = rows[:, 1:]
    assert sorted(targets[targets != ABSENT].tolist()) == list(range(1, 47))


def test_a_batch_may_be_larger_than_an_epoch() -> None:
    split = make_split(10)
    (batch,) = islice(train_batches(2, split, 12), 1)
    rows = np.concatenate(parts(strategy_of(2), batch, "tokens"))
    np.testing.assert_array_equal(rows, windows(split, order(0, 12, 3)))


def test_a_run_may_go_on_at_a_far_step_at_once() -> None:
    step = 1 << 33
    (batch,) = islice(train_batches(2, make_split(101), 12, step), 1)
    positions = np.concatenate(parts(strategy_of(2), batch, "position"))
    assert positions.tolist() == list(range(step * 12, step * 12 + 12))


# --- Validation batches ----------------------------------------------------------------------------


@pytest.mark.parametrize("num_replicas", [1, 2, 3, 4])
@pytest.mark.parametrize("num_tokens", [5, 47, 49, 97, 102])  # 1, 12, 12, 24 and 26 windows
def test_validation_holds_every_window_once_whatever_the_size(num_tokens: int, num_replicas: int) -> None:
    split, strategy, batch_size = make_split(num_tokens), strategy_of(num_replicas), 12
    num_sequences = PackedSequences(split, CONTEXT).num_sequences
    batches, num_batches = pipeline.validation_batches(strategy, [PackedSequences(split, CONTEXT)], batch_size)
    assert num_batches == -(-num_sequences // batch_size)
    found = [parts(strategy, batch, "tokens") for batch in islice(batches, num_batches)]
    assert {part.shape for parts_of_batch in found for part in parts_of_batch} == {(12 // num_replicas, CONTEXT + 1)}
    rows = np.concatenate([part for parts_of_batch in found for part in parts_of_batch])
    np.testing.assert_array_equal(rows[:num_sequences], windows(split, np.arange(num_sequences)))
    targets = rows[:, 1:]
    assert (targets[num_sequences:] == ABSENT).all(), "a row past the end counts no token"
    assert targets[targets != ABSENT].tolist() == list(range(1, num_tokens))


# --- Lengths ---------------------------------------------------------------------------------------


def test_a_split_of_one_sequence_is_long_enough() -> None:
    check_length(make_split(9), "train", 8)


def test_a_split_shorter_than_a_sequence_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        check_length(make_split(8), "validation", 8)
    assert str(caught.value) == (
        "model.context_length (8) must fit into the validation split, which has 8 tokens: try 7 or more text"
    )


@pytest.mark.parametrize(("num_documents", "num_bytes"), [(0, 0), (1, 0)])
def test_a_split_without_text_is_refused(num_documents: int, num_bytes: int) -> None:
    empty = Split([np.full(1 + num_documents, 255, np.uint16)], num_documents, num_bytes)
    with pytest.raises(ConfigError, match=r"the train split must not be empty: it holds no text"):
        check_length(empty, "train", 8)
