"""What lies between the matrix products of a block: each as one pass over memory, compiled by XLA on its own.

Outside a whole XLA program TensorFlow runs every addition and multiplication as a kernel of its own, which reads and
writes all of its tensor; on a CPU that costs about as much as the products. XLA, on the other hand, has slower products
there in bfloat16 than oneDNN. So the products are left to TensorFlow, and XLA gets the rest. The backward pass computes
what it needs again from the inputs, which are all that is kept.
"""

import math
from collections.abc import Callable
from typing import Any

import tensorflow as tf

Function = Callable[..., tf.Tensor]


class Kernels:
    """The functions of a block.

    Args:
      compiled: whether each is an XLA program of its own; else they are TensorFlow's operations, one after the other,
        or part of whatever program they are called in.
    """

    def __init__(self, compiled: bool) -> None:
        self._compiled = compiled
        self.gelu = self._kernel(_gelu)
        self.swiglu = self._kernel(_swiglu)

    def norm(self, center: bool, epsilon: float) -> Function:
        """Layer norm, or RMS norm where nothing is centered, over the last axis, computed in float32.

        The function takes x, the gain, and the bias if there is one.
        """

        def normalise(x: tf.Tensor, gain: tf.Tensor, *bias: tf.Tensor) -> tf.Tensor:
            y = tf.cast(x, tf.float32)
            if center:
                y = y - tf.reduce_mean(y, axis=-1, keepdims=True)
            y = y * tf.math.rsqrt(tf.reduce_mean(tf.square(y), axis=-1, keepdims=True) + epsilon)
            y = y * gain
            if bias:
                y = y + bias[0]
            return tf.cast(y, x.dtype)

        return self._kernel(normalise)

    def masked_softmax(self, scores: tf.Tensor, visible: tf.Tensor, scale: float) -> tf.Tensor:
        """softmax(scores * scale) over what is visible of the last axis, computed in float32."""
        if not self._compiled:
            scores = tf.where(visible, tf.cast(scores * scale, tf.float32), -math.inf)
            return tf.nn.softmax(scores)

        @tf.custom_gradient
        def softmax(scores: tf.Tensor) -> tuple[tf.Tensor, Callable[[tf.Tensor], tf.Tensor]]:
            weights = _softmax(scores, visible, scale)
            return weights, lambda upstream: _softmax_gradient(weights, upstream, scale)

        return softmax(scores)

    def _kernel(self, function: Function) -> Function:
        """The function as two compiled programs: the value, and the gradients of all its arguments.

        Both compute in float32: in bfloat16, XLA's CPU backend would round after every operation.
        """
        if not self._compiled:
            return function

        def value(*inputs: tf.Tensor) -> tf.Tensor:
            return tf.cast(function(*[tf.cast(each, tf.float32) for each in inputs]), inputs[0].dtype)

        def gradients(inputs: tuple[tf.Tensor, ...], upstream: tf.Tensor) -> list[tf.Tensor]:
            with tf.GradientTape() as tape:
                tape.watch(inputs)
                found = value(*inputs)
            return tape.gradient(found, inputs, output_gradients=upstream)

        forward = tf.function(value, jit_compile=True, autograph=False)
        backward = tf.function(gradients, jit_compile=True, autograph=False)

        @tf.custom_gradient
        def call(*inputs: tf.Tensor) -> tuple[tf.Tensor, Any]:
            return forward(*inputs), lambda upstream: backward(inputs, upstream)

        return call


def _gelu(x: tf.Tensor) -> tf.Tensor:
    return tf.nn.gelu(x, approximate=True)


def _swiglu(gate: tf.Tensor, value: tf.Tensor) -> tf.Tensor:
    return gate * tf.sigmoid(gate) * value


@tf.function(jit_compile=True, autograph=False)
def _softmax(scores: tf.Tensor, visible: tf.Tensor, scale: float) -> tf.Tensor:
    wide = tf.where(visible, tf.cast(scores, tf.float32) * scale, -math.inf)
    return tf.cast(tf.nn.softmax(wide), scores.dtype)


@tf.function(jit_compile=True, autograph=False)
def _softmax_gradient(weights: tf.Tensor, upstream: tf.Tensor, scale: float) -> tf.Tensor:
    wide = tf.cast(weights, tf.float32)
    product = wide * tf.cast(upstream, tf.float32)
    return tf.cast((product - wide * tf.reduce_sum(product, axis=-1, keepdims=True)) * scale, weights.dtype)
