"""What lies between the matrix products of a block: each as few passes over memory, compiled by XLA on its own.

Outside a whole XLA program TensorFlow runs every addition and multiplication as a kernel of its own, which reads and
writes all of its tensor; on a CPU that costs about as much as the products. XLA, on the other hand, has slower products
there than oneDNN, in bfloat16 by half. So the products are left to TensorFlow, and XLA gets the rest.

Attention is here too, because what it multiplies depends on the mask: it takes the queries block by block, each
against the keys up to its last, so that most of what the mask would throw away is never computed.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from tfdp.ops.chunking import query_blocks

Function = Callable[..., tf.Tensor]

_program = functools.partial(tf.function, jit_compile=True, autograph=False)  # compiled once for each shape


class Kernels:
    """The functions of a block.

    Args:
      compiled: whether each is an XLA program of its own; else they are TensorFlow's operations, one after the other,
        or part of whatever program they are called in.
    """

    def __init__(self, compiled: bool) -> None:
        self._compiled = compiled

    def gelu(self, x: tf.Tensor) -> tf.Tensor:
        """GELU by its tanh formula (Hendrycks and Gimpel 2016). Compiled, it keeps its slope for backward, not x.

        That takes the same memory, and tanh is computed once. In bfloat16 the slope is rounded like all else.
        """
        if not self._compiled:
            return tf.nn.gelu(x, approximate=True)

        @tf.custom_gradient
        def call(x: tf.Tensor) -> tuple[tf.Tensor, Function]:
            y, slope = _gelu_and_slope(x)
            return y, lambda upstream: _multiply(upstream, slope)

        return call(x)

    def swiglu(self, gate: tf.Tensor, value: tf.Tensor) -> tf.Tensor:
        """silu(gate) * value (Shazeer 2020), computed in float32."""
        if not self._compiled:
            return _swiglu(gate, value)

        @tf.custom_gradient
        def call(gate: tf.Tensor, value: tf.Tensor) -> tuple[tf.Tensor, Callable[[tf.Tensor], list[tf.Tensor]]]:
            return _swiglu_program(gate, value), lambda upstream: _swiglu_gradients(gate, value, upstream)

        return call(gate, value)

    def norm(self, x: tf.Tensor, weights: Sequence[tf.Tensor], center: bool, epsilon: float) -> tf.Tensor:
        """Layer norm, or RMS norm where nothing is centered, over the last axis, computed in float32.

        Args:
          x: (batch, time, dim).
          weights: the gain (dim,), and the bias if there is one.
          center: whether the mean is taken off.
          epsilon: added to the variance.
        """
        if not self._compiled:
            return _normalise(x, weights, center, epsilon, tf.reduce_mean)[0]

        @tf.custom_gradient
        def call(x: tf.Tensor, *weights: tf.Tensor) -> tuple[tf.Tensor, Callable[[tf.Tensor], list[tf.Tensor]]]:
            y, mean, scale = _norm_program(x, weights, center, epsilon)

            def gradients(upstream: tf.Tensor) -> list[tf.Tensor]:
                return _norm_gradients(x, mean, scale, weights[0], upstream, center, has_bias=len(weights) > 1)

            return y, gradients

        return call(x, *weights)

    def apply(self, function: Function, x: tf.Tensor, *constants: Any) -> tf.Tensor:
        """function(x, *constants), of which x alone has a gradient; compiled, it is computed in float32.

        Args:
          function: of a module, not made anew at each call: its programs are kept by it.
          x: a tensor.
          constants: tensors, numbers or None.
        """
        if not self._compiled:
            return function(x, *constants)

        @tf.custom_gradient
        def call(x: tf.Tensor) -> tuple[tf.Tensor, Function]:
            value = _value_program(function, x, constants)
            return value, lambda upstream: _gradient_program(function, x, constants, upstream)

        return call(x)

    def attention(
        self, queries: tf.Tensor, keys: tf.Tensor, values: tf.Tensor, visible: tf.Tensor, scale: float, causal: bool
    ) -> tf.Tensor:
        """softmax(queries @ keys.T * scale) @ values over what is visible; the softmax in float32.

        Args:
          queries, keys, values: (batch, heads, queries or keys, head_dim).
          visible: bool (..., queries, keys), who sees whom.
          scale: of the products.
          causal: whether query i sees key i and earlier ones at most.

        Returns:
          (batch, heads, queries, head_dim).
        """
        blocks = query_blocks(queries.shape[2]) if causal else None
        if self._compiled:
            return _attention_in_parts(queries, keys, values, visible, scale, blocks)
        if blocks is None:
            return _attend(queries, keys, values, visible, scale)
        mixed = []
        for begin, end in reversed(blocks):
            # cut from what is longer by one block: backward then adds two gradients at a time, in one order
            keys, values, visible = keys[:, :, :end], values[:, :, :end], visible[..., :end, :end]
            mixed.append(_attend(queries[:, :, begin:end], keys, values, visible[..., begin:end, :], scale))
        return _joined(mixed[::-1])


@_program
def _value_program(function: Function, x: tf.Tensor, constants: tuple[Any, ...]) -> tf.Tensor:
    return tf.cast(function(tf.cast(x, tf.float32), *constants), x.dtype)


@_program
def _gradient_program(function: Function, x: tf.Tensor, constants: tuple[Any, ...], upstream: tf.Tensor) -> tf.Tensor:
    wide = tf.cast(x, tf.float32)
    with tf.GradientTape() as tape:
        tape.watch(wide)
        value = function(wide, *constants)
    return tf.cast(tape.gradient(value, wide, tf.cast(upstream, tf.float32)), x.dtype)


# ---------------------------------------------------------------------------------------------------
# GELU and SwiGLU
# ---------------------------------------------------------------------------------------------------


@_program
def _gelu_and_slope(x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """0.5 x (1 + tanh(u)) with u = c (x + k x^3), and its derivative."""
    wide, c, k = tf.cast(x, tf.float32), math.sqrt(2 / math.pi), 0.044715
    square = wide * wide
    half = 0.5 * (1.0 + tf.tanh(c * wide * (1.0 + k * square)))  # between 0 and 1; 1 - tanh^2 = 4 half (1 - half)
    slope = half + 2.0 * c * wide * half * (1.0 - half) * (1.0 + 3.0 * k * square)
    return tf.cast(wide * half, x.dtype), tf.cast(slope, x.dtype)


@_program
def _multiply(left: tf.Tensor, right: tf.Tensor) -> tf.Tensor:
    return left * right


def _swiglu(gate: tf.Tensor, value: tf.Tensor) -> tf.Tensor:
    wide = tf.cast(gate, tf.float32)  # where TensorFlow may fuse the first two: no rounding lies in between
    return tf.cast(wide * tf.sigmoid(wide) * tf.cast(value, tf.float32), gate.dtype)


_swiglu_program = _program(_swiglu)


@_program
def _swiglu_gradients(gate: tf.Tensor, value: tf.Tensor, upstream: tf.Tensor) -> list[tf.Tensor]:
    wide, up = tf.cast(gate, tf.float32), tf.cast(upstream, tf.float32)
    sigmoid = tf.sigmoid(wide)
    slope = sigmoid * (1.0 + wide * (1.0 - sigmoid))
    d_gate = up * tf.cast(value, tf.float32) * slope
    return [tf.cast(d_gate, gate.dtype), tf.cast(up * wide * sigmoid, value.dtype)]


# ---------------------------------------------------------------------------------------------------
# Norms
# ---------------------------------------------------------------------------------------------------


def _normalise(
    x: tf.Tensor, weights: Sequence[tf.Tensor], center: bool, epsilon: float, row_mean: Callable[..., tf.Tensor]
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """The norm of x; the mean of each row, and what its deviations are multiplied by."""
    y = tf.cast(x, tf.float32)
    mean = row_mean(y, axis=-1, keepdims=True) if center else tf.zeros([])
    if center:
        y = y - mean
    scale = tf.math.rsqrt(row_mean(tf.square(y), axis=-1, keepdims=True) + epsilon)
    y = y * scale * weights[0]
    if len(weights) > 1:
        y = y + weights[1]
    return tf.cast(y, x.dtype), mean, scale


def _product_mean(x: tf.Tensor, axis: int, keepdims: bool) -> tf.Tensor:
    """The mean over the last axis as a product with ones, which XLA's CPU backend computes in half the time."""
    del axis, keepdims
    dim, shape = x.shape[-1], tf.concat([tf.shape(x)[:-1], [1]], axis=0)  # text is sampled in pieces of any length
    return tf.reshape(tf.matmul(tf.reshape(x, [-1, dim]), tf.fill([dim, 1], 1.0 / dim)), shape)


@_program
def _norm_program(
    x: tf.Tensor, weights: Sequence[tf.Tensor], center: bool, epsilon: float
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    return _normalise(x, weights, center, epsilon, _product_mean)


@_program
def _norm_gradients(
    x: tf.Tensor, mean: tf.Tensor, scale: tf.Tensor, gain: tf.Tensor, upstream: tf.Tensor, center: bool, has_bias: bool
) -> list[tf.Tensor]:
    """Of x, of the gain, and of the bias if there is one."""
    up = tf.cast(upstream, tf.float32)
    normal = (tf.cast(x, tf.float32) - mean) * scale
    inner = up * gain
    d_x = inner - normal * _product_mean(inner * normal, axis=-1, keepdims=True)
    if center:
        d_x = d_x - _product_mean(inner, axis=-1, keepdims=True)
    others = tuple(range(len(x.shape) - 1))
    d_weights = [tf.reduce_sum(each, axis=others) for each in ([up * normal, up] if has_bias else [up * normal])]
    return [tf.cast(d_x * scale, x.dtype), *d_weights]


# ---------------------------------------------------------------------------------------------------
# Attention
# ---------------------------------------------------------------------------------------------------


def _attend(queries: tf.Tensor, keys: tf.Tensor, values: tf.Tensor, visible: tf.Tensor, scale: float) -> tf.Tensor:
    scores = tf.matmul(queries, keys, transpose_b=True)
    weights = tf.nn.softmax(tf.where(visible, tf.cast(scores * scale, tf.float32), -math.inf))
    return tf.matmul(tf.cast(weights, values.dtype), values)


def _attention_in_parts(
    queries: tf.Tensor,
    keys: tf.Tensor,
    values: tf.Tensor,
    visible: tf.Tensor,
    scale: float,
    blocks: Sequence[tuple[int, int]] | None,
) -> tf.Tensor:
    """The same, XLA between the products; None: one block that may see all keys.

    Backward needs the sum of weight * gradient over each row of the weights, which equals that of output * gradient
    over the far shorter row of the output (FlashAttention, Dao et al. 2022).
    """
    blocks = blocks or [(0, None)]  # type: ignore[list-item]

    def block_of(x: tf.Tensor, begin: int, end: int | None) -> tf.Tensor:
        return x if len(blocks) == 1 else x[:, :, begin:end]

    @tf.custom_gradient
    def attend(queries: tf.Tensor, keys: tf.Tensor, values: tf.Tensor) -> tuple[tf.Tensor, Any]:
        weights = [
            _softmax(
                tf.matmul(block_of(queries, begin, end), block_of(keys, 0, end), transpose_b=True),
                visible[..., begin:end, :end],
                scale,
            )
            for begin, end in blocks
        ]
        mixed = [tf.matmul(each, block_of(values, 0, end)) for each, (_, end) in zip(weights, blocks, strict=True)]
        output = _joined(mixed)

        def gradients(upstream: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            row_sums = _row_sums(output, upstream)
            d_queries, d_keys, d_values = [], [], []
            for each, (begin, end) in zip(weights, blocks, strict=True):
                own = block_of(upstream, begin, end)
                d_weights = tf.matmul(own, block_of(values, 0, end), transpose_b=True)
                d_scores = _softmax_gradient(each, d_weights, block_of(row_sums, begin, end), scale)
                d_queries.append(tf.matmul(d_scores, block_of(keys, 0, end)))
                d_keys.append(tf.matmul(d_scores, block_of(queries, begin, end), transpose_a=True))
                d_values.append(tf.matmul(each, own, transpose_a=True))
            return _joined(d_queries), _sum_of_beginnings(d_keys), _sum_of_beginnings(d_values)

        return output, gradients

    return attend(queries, keys, values)


def _joined(parts: Sequence[tf.Tensor]) -> tf.Tensor:
    return parts[0] if len(parts) == 1 else tf.concat(parts, axis=2)


def _sum_of_beginnings(parts: Sequence[tf.Tensor]) -> tf.Tensor:
    """The sum of tensors of which each holds the first positions, on axis 2, of the next one."""
    return parts[0] if len(parts) == 1 else _sum_program(parts)


@_program
def _sum_program(parts: Sequence[tf.Tensor]) -> tf.Tensor:
    total, length = tf.zeros([]), parts[-1].shape[2]
    for part in parts:
        padding = [[0, 0], [0, 0], [0, length - part.shape[2]], [0, 0]]
        total = total + tf.pad(tf.cast(part, tf.float32), padding)
    return tf.cast(total, parts[0].dtype)


@_program
def _softmax(scores: tf.Tensor, visible: tf.Tensor, scale: float) -> tf.Tensor:
    wide = tf.where(visible, tf.cast(scores, tf.float32) * scale, -math.inf)
    return tf.cast(tf.nn.softmax(wide), scores.dtype)


@_program
def _row_sums(left: tf.Tensor, right: tf.Tensor) -> tf.Tensor:
    product = tf.cast(left, tf.float32) * tf.cast(right, tf.float32)
    return _product_mean(product, axis=-1, keepdims=True) * product.shape[-1]


@_program
def _softmax_gradient(weights: tf.Tensor, upstream: tf.Tensor, row_sums: tf.Tensor, scale: float) -> tf.Tensor:
    wide = tf.cast(weights, tf.float32) * (tf.cast(upstream, tf.float32) - row_sums)
    return tf.cast(wide * scale, weights.dtype)
