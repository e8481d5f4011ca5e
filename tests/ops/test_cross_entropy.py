"""Losses as sums and counts, against float64 numpy."""

import numpy as np
import pytest
import tensorflow as tf

from tfdp.ops.cross_entropy import projected_cross_entropy
from tfdp.ops.hashing import sequence_keys
from tfdp.tasks.causal_lm import inputs_and_targets, next_token_loss


def reference(logits: np.ndarray, targets: np.ndarray) -> tuple[float, int]:
    logits = logits.astype(np.float64)
    peak = logits.max(axis=-1, keepdims=True)
    log_probabilities = logits - peak - np.log(np.exp(logits - peak).sum(axis=-1, keepdims=True))
    losses = [-log_probabilities[index][target] for index, target in np.ndenumerate(targets) if target >= 0]
    return float(np.sum(losses)), len(losses)


def make_case(seed: int, scale: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    """Logits (rows, time, vocabulary) and targets (rows, time), a third of which are absent."""
    random = np.random.default_rng(seed)
    logits = (random.normal(size=(6, 7, 11)) * scale).astype(np.float32)
    targets = np.where(random.random((6, 7)) < 1 / 3, -random.integers(1, 101, (6, 7)), random.integers(0, 11, (6, 7)))
    return logits, targets.astype(np.int32)


def cross_entropy(logits: tf.Tensor, targets: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Sum and count by way of a projection that leaves its features as they are."""
    losses = projected_cross_entropy(logits, tf.eye(logits.shape[-1]), targets)
    return tf.reduce_sum(losses), tf.reduce_sum(tf.cast(targets >= 0, tf.float32))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("scale", [0.1, 3.0, 100.0])
def test_sum_and_count_equal_float64_numpy(seed: int, scale: float) -> None:
    logits, targets = make_case(seed, scale)
    loss_sum, count = cross_entropy(tf.constant(logits), tf.constant(targets))
    expected_sum, expected_count = reference(logits, targets)
    np.testing.assert_allclose(float(loss_sum), expected_sum, rtol=2e-6)
    assert float(count) == expected_count


@pytest.mark.parametrize("vocab_size", [2, 256])
def test_equal_logits_cost_the_log_of_the_vocabulary(vocab_size: int) -> None:
    loss_sum, count = cross_entropy(tf.zeros([2, 3, vocab_size]), tf.zeros([2, 3], tf.int32))
    np.testing.assert_allclose(float(loss_sum / count), np.log(vocab_size), rtol=1e-6)


def test_the_gradient_is_probability_minus_target_and_zero_where_nothing_is_predicted() -> None:
    logits, targets = make_case(5)
    variable = tf.Variable(logits)
    with tf.GradientTape() as tape:
        loss_sum, _ = cross_entropy(variable, tf.constant(targets))
    exponentials = np.exp(logits.astype(np.float64))
    expected = exponentials / exponentials.sum(axis=-1, keepdims=True) - np.eye(11)[np.maximum(targets, 0)]
    expected[targets < 0] = 0
    np.testing.assert_allclose(tape.gradient(loss_sum, variable).numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("absent", [-1, -7])
def test_nothing_valid_gives_zero_sum_count_and_gradient(absent: int) -> None:
    variable = tf.Variable(make_case(1)[0])
    with tf.GradientTape() as tape:
        loss_sum, count = cross_entropy(variable, tf.fill([6, 7], absent))
    assert (float(loss_sum), float(count)) == (0.0, 0.0)
    np.testing.assert_array_equal(tape.gradient(loss_sum, variable).numpy(), np.zeros([6, 7, 11]))


@pytest.mark.parametrize("sizes", [[6], [3, 3], [1, 5], [2, 1, 3], [1] * 6])
def test_sums_and_counts_add_up_over_any_split_of_the_rows(sizes: list[int]) -> None:
    logits, targets = make_case(2)
    targets[1] = -1  # a split with nothing to predict adds nothing
    parts = zip(tf.split(logits, sizes), tf.split(targets, sizes), strict=True)
    sums = np.sum([[float(value) for value in cross_entropy(*part)] for part in parts], axis=0)
    whole_sum, whole_count = cross_entropy(tf.constant(logits), tf.constant(targets))
    np.testing.assert_allclose(sums[0], float(whole_sum), rtol=1e-6)
    assert sums[1] == float(whole_count)


def test_targets_are_the_inputs_one_later_and_absent_tokens_stay_absent() -> None:
    inputs, targets = inputs_and_targets(tf.constant([[5, 6, 7, 8], [9, 0, -1, -1]]))
    np.testing.assert_array_equal(inputs, [[5, 6, 7], [9, 0, 0]])
    np.testing.assert_array_equal(targets, [[6, 7, 8], [0, -1, -1]])


@pytest.mark.parametrize("dropout_seed", [None, 3])
def test_next_token_loss_scores_each_token_by_what_came_before_it(dropout_seed: int | None) -> None:
    table = np.random.default_rng(0).normal(size=(11, 11)).astype(np.float32)  # a bigram model
    tokens = np.array([[1, 2, 3, 4], [5, 0, 10, -1]], np.int32)
    positions, step = tf.constant([40, 41], tf.int64), tf.constant(20, tf.int64)

    class Bigrams:
        output_table = tf.transpose(table)

        def features(self, inputs: tf.Tensor, keys: tf.Tensor | None = None, starts: None = None) -> tf.Tensor:
            assert (keys is None) == (dropout_seed is None)
            if keys is not None:
                np.testing.assert_array_equal(keys, sequence_keys(3, step, positions))
            return tf.one_hot(inputs, 11)

    rows = {"tokens": tf.constant(tokens), "position": positions}
    loss_sum, count = next_token_loss(Bigrams(), dropout_seed)(rows, step)
    expected, _ = reference(table[np.maximum(tokens[:, :-1], 0)], tokens[:, 1:])
    np.testing.assert_allclose(float(loss_sum[0]), expected, rtol=1e-6)
    assert float(count[0]) == 5


# --- Projected and scored in chunks ----------------------------------------------------------------


def projected_case(seed: int) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Features (rows, time, dim), a table (vocabulary, dim) and targets."""
    random = np.random.default_rng(seed)
    features, table = random.normal(size=(6, 7, 5)), random.normal(size=(11, 5))
    return tf.constant(features, tf.float32), tf.constant(table, tf.float32), tf.constant(make_case(seed)[1])


def loss_and_gradients(function: object, features: tf.Tensor, table: tf.Tensor, jit_compile: bool) -> list[np.ndarray]:
    @tf.function(jit_compile=jit_compile)
    def compute() -> tuple[tf.Tensor, ...]:
        with tf.GradientTape() as tape:
            tape.watch([features, table])
            loss = function(features, table)  # type: ignore[operator]
        return loss, *tape.gradient(loss, [features, table])

    return [value.numpy() for value in compute()]


@pytest.mark.parametrize(("jit_compile", "fuse"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("chunk_size", [None, 0, 1, 4, 13, 41, 42, 100])
def test_chunks_of_any_size_give_the_loss_and_the_gradients_of_the_whole(
    chunk_size: int, jit_compile: bool, fuse: bool
) -> None:
    features, table, targets = projected_case(3)

    def whole(features: tf.Tensor, table: tf.Tensor) -> tf.Tensor:
        logits = tf.einsum("btd,vd->btv", features, table)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(tf.maximum(targets, 0), logits)
        return tf.reduce_sum(tf.where(targets >= 0, losses, 0.0))

    def chunked(features: tf.Tensor, table: tf.Tensor) -> tf.Tensor:
        return tf.reduce_sum(projected_cross_entropy(features, table, targets, chunk_size, fuse))

    expected = loss_and_gradients(whole, features, table, jit_compile=False)
    found = loss_and_gradients(chunked, features, table, jit_compile)
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk_size", [0, 4])
def test_the_gradient_of_another_sum_is_refused_by_nan(chunk_size: int) -> None:
    features, table, targets = projected_case(4)

    def doubled(features: tf.Tensor, table: tf.Tensor) -> tf.Tensor:
        return 2 * tf.reduce_sum(projected_cross_entropy(features, table, targets, chunk_size))

    def single(features: tf.Tensor, table: tf.Tensor) -> tf.Tensor:
        return tf.reduce_sum(projected_cross_entropy(features, table, targets, chunk_size))

    def first_row(features: tf.Tensor, table: tf.Tensor) -> tf.Tensor:
        return tf.reduce_sum(projected_cross_entropy(features, table, targets, chunk_size)[0])

    once, twice = (loss_and_gradients(function, features, table, False) for function in (single, doubled))
    for one, other in zip(once, twice, strict=True):
        np.testing.assert_array_equal(other, 2 * one)
    _, *gradients = loss_and_gradients(first_row, features, table, False)
    assert all(np.all(np.isnan(gradient)) for gradient in gradients)
