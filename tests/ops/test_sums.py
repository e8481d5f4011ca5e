"""Sums whose bits do not depend on who adds what."""

import numpy as np
import pytest
import tensorflow as tf

from tfdp.ops.sums import fixed_sum, running_sum, sum_in_tree, tree_sum
from tfdp.parallel.batch_layout import owns_nodes, possible_owners

COUNTS = [*range(1, 18), 32]


def terms(count: int, size: int = 40) -> np.ndarray:
    """Rows of floats whose sum has other bits in any other order."""
    generator = np.random.default_rng(count)
    scale = np.exp2(generator.integers(-6, 7, (count, size)))
    return (generator.normal(size=(count, size)) * scale).astype(np.float32)


def reference(rows: np.ndarray) -> np.ndarray:
    """The tree over rows, in numpy's float32."""
    nodes = list(rows)
    while len(nodes) > 1:
        pairs = [nodes[index] + nodes[index + 1] for index in range(0, len(nodes) - 1, 2)]
        nodes = pairs + nodes[2 * len(pairs) :]
    return nodes[0]


def summed(rows: np.ndarray, function: object = tree_sum) -> np.ndarray:
    values = tf.constant(rows)
    return tf.function(lambda: function(lambda index: values[index], len(rows)))().numpy()  # type: ignore[operator]


@pytest.mark.parametrize("count", COUNTS)
def test_the_tree_over_terms_computed_one_by_one(count: int) -> None:
    rows = terms(count)
    np.testing.assert_array_equal(summed(rows), reference(rows))
    np.testing.assert_array_equal(tree_sum(lambda index: tf.constant(rows)[index], count).numpy(), reference(rows))


@pytest.mark.parametrize("count", COUNTS)
def test_the_tree_over_terms_that_are_there(count: int) -> None:
    rows = terms(count)
    np.testing.assert_array_equal(sum_in_tree([tf.constant(row) for row in rows]).numpy(), reference(rows))


@pytest.mark.parametrize("function", [running_sum, tree_sum])
@pytest.mark.parametrize(("count", "width"), [(2, 2), (4, 2), (4, 4), (6, 2), (8, 2), (8, 8), (12, 4)])
def test_terms_computed_side_by_side_give_the_same_bits(function: object, count: int, width: int) -> None:
    values = tf.constant(terms(count))
    wide = tf.function(lambda: function(lambda index: [values[index]] * 2, count, width))()  # type: ignore[operator]
    for found in wide:
        np.testing.assert_array_equal(found, summed(terms(count), function))


def test_the_order_matters() -> None:
    rows = terms(8)
    in_order = summed(rows, running_sum)
    np.testing.assert_array_equal(in_order, sum(rows[1:], start=rows[0]))
    assert np.mean(in_order != summed(rows)) > 0.3
    np.testing.assert_allclose(in_order, summed(rows), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("count", [count for count in COUNTS if count >= 4])
def test_from_left_to_right_gives_other_bits(count: int) -> None:
    """So that the tests above can fail."""
    rows = terms(count)
    assert np.any(sum(rows[1:], start=rows[0]) != reference(rows))


@pytest.mark.parametrize("count", [4, 8, 16])
def test_additions_around_the_tree_do_not_change_its_order(count: int) -> None:
    """TensorFlow's arithmetic optimizer turns nested additions into an AddN, which adds from left to right."""
    rows, (first, second) = terms(count), terms(2)
    arguments = [tf.constant(row) for row in (first, second, *rows)]

    @tf.function
    def in_a_larger_sum(first: tf.Tensor, second: tf.Tensor, *nodes: tf.Tensor) -> tf.Tensor:
        return first + (second + sum_in_tree([nodes[0] + nodes[0], *nodes[1:]]))

    @tf.function
    def without_xla(*nodes: tf.Tensor) -> tf.Tensor:
        while len(nodes) > 1:
            nodes = tuple(left + right for left, right in zip(nodes[::2], nodes[1::2], strict=True))
        return nodes[0]

    expected = first + (second + reference(np.stack([rows[0] + rows[0], *rows[1:]])))
    np.testing.assert_array_equal(in_a_larger_sum(*arguments).numpy(), expected)
    assert np.any(without_xla(*arguments[2:]).numpy() != reference(rows)), "XLA is needed no more"


@pytest.mark.parametrize("num_terms", [1, 2, 3, 4, 6, 8, 12, 16, 24])
def test_owners_of_whole_subtrees_give_the_bits_of_one(num_terms: int) -> None:
    rows = terms(num_terms)
    for owners in possible_owners(num_terms):
        parts = [tf.constant(summed(part)) for part in np.split(rows, owners)]
        np.testing.assert_array_equal(sum_in_tree(parts).numpy(), reference(rows), err_msg=str(owners))


def test_who_owns_whole_subtrees() -> None:
    assert possible_owners(4) == [1, 2, 4]
    assert possible_owners(12) == [1, 3, 6, 12]
    assert possible_owners(1) == [1]
    assert owns_nodes(48, 3)
    assert not owns_nodes(12, 2)  # six terms each are no node
    assert not owns_nodes(12, 5)
    assert not owns_nodes(2, 4)


@pytest.mark.parametrize("size", [1, 2, 255, 256, 257, 65_536, 100_003])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_fixed_sum_is_the_sum(size: int, dtype: type) -> None:
    values = np.random.default_rng(size).normal(1.0, 3.0, size).astype(dtype)
    found = fixed_sum(tf.constant(values))
    assert found.shape == ()
    assert found.dtype.as_numpy_dtype is dtype
    np.testing.assert_allclose(
        found.numpy(), values.astype(np.float64).sum(), rtol=2e-6 if dtype is np.float32 else 1e-12
    )
    assert fixed_sum(tf.constant(values)).numpy() == found.numpy()
