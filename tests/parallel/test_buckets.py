"""Tensors laid into packs and taken out again."""

import numpy as np
import pytest
import tensorflow as tf

from tfdp.parallel.buckets import Buckets

SHAPES = [(3, 5), (2,), (), (7, 4), (1,)]


@pytest.mark.parametrize(("bytes_per_pack", "sizes"), [(0, [1, 28, 1, 2, 15]), (40, [10, 10, 10, 10, 7]), (4000, [47])])
def test_packs_hold_the_last_tensors_first_and_give_them_back(bytes_per_pack: int, sizes: list[int]) -> None:
    numbers = iter(range(100))
    tensors = [tf.constant(np.array([next(numbers) for _ in range(int(np.prod(s)))]).reshape(s)) for s in SHAPES]
    buckets = Buckets(SHAPES, bytes_per_pack)
    packs = buckets.pack(tensors)
    assert [int(tf.size(pack)) for pack in packs] == sizes
    assert buckets.num_packs == len(sizes)
    assert int(packs[0][0]) == 46  # the last tensor
    for tensor, found in zip(tensors, buckets.unpack(packs), strict=True):
        np.testing.assert_array_equal(found, tensor)
        assert found.shape == tensor.shape


def test_smaller_numbers_fill_a_pack_with_more_of_them() -> None:
    assert [Buckets([(100,)], 120, size).num_packs for size in (4, 2)] == [4, 2]


def test_a_tensor_larger_than_a_pack_is_cut() -> None:
    buckets = Buckets([(100,)], 120)
    packs = buckets.pack([tf.range(100)])
    assert [int(pack[0]) for pack in packs] == [0, 30, 60, 90]
    np.testing.assert_array_equal(buckets.unpack(packs)[0], np.arange(100))
