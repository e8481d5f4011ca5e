"""What travels between islands in few bits comes out as near as its type allows."""

from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from tfdp.ops.packing import BLOCK
from tfdp.ops.quantization import Encoding

SHAPES = [(3, 5), (BLOCK + 7,), (1,), (64, 130)]


def tensors(seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.normal(size=shape).astype(np.float32) * 10.0**-index for index, shape in enumerate(SHAPES)]


def through(dtype: Any, values: list[np.ndarray], compiled: bool = True) -> tuple[tf.Tensor, list[np.ndarray]]:
    encoding = Encoding(SHAPES, dtype)
    words = tf.function(encoding.encode, jit_compile=compiled)([tf.constant(value) for value in values])
    assert words.dtype == tf.int32 and words.shape == (encoding.num_words,)
    return words, [each.numpy() for each in tf.function(encoding.decode, jit_compile=compiled)(words)]


@pytest.mark.parametrize(("dtype", "bytes_per_number"), [("float32", 4), ("bfloat16", 2), ("int8", 1), ("int4", 0.5)])
def test_the_size_is_that_of_the_type_and_a_scale_per_block(dtype: Any, bytes_per_number: float) -> None:
    size, blocks = 1 << 20, (1 << 20) // BLOCK if dtype.startswith("int") else 0
    assert 4 * Encoding([(1 << 10, 1 << 10)], dtype).num_words == size * bytes_per_number + 4 * blocks


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize(("dtype", "steps"), [("int8", 127), ("int4", 7)])
def test_an_integer_is_within_half_a_step_of_its_number(dtype: Any, steps: int, compiled: bool) -> None:
    given = tensors()
    for value, found in zip(given, through(dtype, given, compiled)[1], strict=True):
        for begin in range(0, value.size, BLOCK):
            block = value.reshape(-1)[begin : begin + BLOCK]
            step = np.abs(block).max() / steps
            errors = np.abs(found.reshape(-1)[begin : begin + BLOCK] - block)
            assert errors.max() <= 0.5001 * step
            assert errors.max() > 0.3 * step or block.size < 20, "the bound is that of this type, not of a finer one"


def test_float32_is_exact_and_bfloat16_is_a_cast() -> None:
    given = tensors()
    for value, found in zip(given, through("float32", given)[1], strict=True):
        np.testing.assert_array_equal(found, value)
    for value, found in zip(given, through("bfloat16", given)[1], strict=True):
        np.testing.assert_array_equal(found, tf.cast(tf.cast(value, tf.bfloat16), tf.float32))


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_zeros_and_extremes_survive(dtype: Any) -> None:
    given = [np.zeros(shape, np.float32) for shape in SHAPES]
    given[1][:3] = [-7.0, 7.0, 1.0]
    found = through(dtype, given)[1]
    np.testing.assert_array_equal(found[1][:3], [-7.0, 7.0, 1.0] if dtype == "int4" else found[1][:3])
    assert found[1][0] == -7.0 and found[1][1] == 7.0
    assert all(not each.any() for each in (found[0], found[2], found[3]))


def test_an_error_that_is_kept_is_made_good(seed: int = 3) -> None:
    """Sent again and again with what was lost before, a change arrives whole in the mean (error feedback)."""
    encoding, change = Encoding(SHAPES, "int4"), tensors(seed)
    send = tf.function(lambda values: encoding.decode(encoding.encode(values)), jit_compile=True)
    kept = [np.zeros_like(value) for value in change]
    arrived = [np.zeros_like(value) for value in change]
    for _ in range(50):
        wanted = [value + error for value, error in zip(change, kept, strict=True)]
        sent = [each.numpy() for each in send([tf.constant(value) for value in wanted])]
        kept = [value - each for value, each in zip(wanted, sent, strict=True)]
        arrived = [total + each for total, each in zip(arrived, sent, strict=True)]
    alone = [each.numpy() for each in send([tf.constant(value) for value in change])]
    for value, total, once in zip(change, arrived, alone, strict=True):
        error = np.abs(total / 50 - value).max()
        assert error < 0.02 * np.abs(value).max()
        assert value.size == 1 or error < 0.5 * np.abs(once - value).max()
