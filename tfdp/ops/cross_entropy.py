"""The loss of each token, from the projection to the vocabulary on."""

import math
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tfdp.ops.chunking import loss_chunk_size

_ROOM = 64  # a power of two, by which sums in float16 may be larger than float16 can hold


def projected_cross_entropy(
    features: tf.Tensor,
    table: tf.Tensor,
    targets: tf.Tensor,
    chunk_size: int | None = None,
    fuse: bool = False,
    weights: tf.Tensor | None = None,
) -> tf.Tensor:
    """The cross-entropy of `features @ table.T`, projected and scored a chunk of tokens at a time.

    The logits never stand in memory whole, and are computed once: the gradient of a chunk is taken while its logits
    are there (as in Liger's fused linear cross-entropy, Hsu et al. 2024). So only the gradient of the plain sum over
    all tokens exists; that of anything else is NaN instead of wrong.

    Args:
      features: (rows, time, dim) in the dtype of the products.
      table: float32 (vocab_size, dim).
      targets: int32 (rows, time); negative where there is nothing to predict.
      chunk_size: tokens whose logits stand in memory at once; None, 0: see `loss_chunk_size`.
      fuse: whether XLA compiles what lies between the products, where it does not compile the whole.
      weights: float32 (rows, time), which the losses are multiplied with; None: 1.

    Returns:
      float32 (rows, time), in nats; 0 where there is nothing to predict.
    """
    num_tokens = targets.shape[0] * targets.shape[1]
    size = loss_chunk_size(chunk_size, num_tokens, table.shape[0])

    @tf.custom_gradient
    def score(features: tf.Tensor, table: tf.Tensor) -> tuple[tf.Tensor, Callable[[tf.Tensor], Any]]:
        flat, flat_targets = tf.reshape(features, [num_tokens, -1]), tf.reshape(targets, [num_tokens])
        projection = tf.cast(table, features.dtype)
        flat_weights = None if weights is None else tf.reshape(weights, [num_tokens])
        losses, d_flat, d_table = _score_chunks(flat, projection, flat_targets, flat_weights, size, fuse)

        def gradient(upstream: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            first = tf.reshape(upstream, [-1])[0]
            scale = tf.where(tf.reduce_all(upstream == first), first, math.nan)
            d_features = _scaled(tf.reshape(d_flat, features.shape), scale)
            return d_features, tf.cast(d_table, tf.float32) * scale

        return tf.reshape(losses, targets.shape), gradient

    return score(features, tf.convert_to_tensor(table))


def cross_entropy(logits: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
    """The cross-entropy of logits (rows, time, vocab_size) that a model gives itself, as `projected_cross_entropy`."""
    labels = tf.maximum(targets, 0)
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=tf.cast(logits, tf.float32))
    return tf.where(targets >= 0, losses, 0.0)


def _scaled(values: tf.Tensor, scale: tf.Tensor) -> tf.Tensor:
    """A loss scale need not fit into float16: what it multiplies may."""
    if values.dtype == tf.float16:
        return tf.cast(tf.cast(values, tf.float32) * scale, values.dtype)
    return values * tf.cast(scale, values.dtype)


def _score_chunks(
    features: tf.Tensor,
    table: tf.Tensor,
    targets: tf.Tensor,
    weights: tf.Tensor | None,
    chunk_size: int,
    fuse: bool,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Losses (tokens,), and the gradients of their sum by features and by table."""
    num_tokens, dim = features.shape
    if chunk_size == num_tokens:
        return _score(features, table, targets, weights, fuse)
    num_chunks = -(-num_tokens // chunk_size)
    missing = num_chunks * chunk_size - num_tokens
    features = tf.reshape(tf.pad(features, [[0, missing], [0, 0]]), [num_chunks, chunk_size, dim])
    targets = tf.reshape(tf.pad(targets, [[0, missing]], constant_values=-1), [num_chunks, chunk_size])
    if weights is not None:
        weights = tf.reshape(tf.pad(weights, [[0, missing]]), [num_chunks, chunk_size])

    def add(index: tf.Tensor, losses: Any, d_features: Any, d_table: tf.Tensor) -> tuple[Any, ...]:
        of_chunk = None if weights is None else weights[index]
        loss, d_chunk, d_part = _score(features[index], table, targets[index], of_chunk, fuse)
        written = losses.write(index, loss), d_features.write(index, d_chunk)
        return index + 1, *written, d_table + tf.cast(d_part, tf.float32)

    start = (
        tf.constant(0),
        tf.TensorArray(tf.float32, num_chunks, element_shape=[chunk_size]),
        tf.TensorArray(features.dtype, num_chunks, element_shape=[chunk_size, dim]),
        tf.zeros(table.shape),
    )
    _, losses, d_features, d_table = tf.while_loop(
        lambda index, *_: index < num_chunks, add, start, parallel_iterations=1
    )
    d_features = tf.reshape(d_features.stack(), [num_chunks * chunk_size, dim])
    return tf.reshape(losses.stack(), [-1])[:num_tokens], d_features[:num_tokens], d_table


def _score(
    features: tf.Tensor, table: tf.Tensor, targets: tf.Tensor, weights: tf.Tensor | None, fuse: bool
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    valid = targets >= 0
    logits, labels = tf.matmul(features, table, transpose_b=True), tf.maximum(targets, 0)
    if fuse:
        losses, d_logits = _losses_and_slopes(logits, labels)
    else:
        wide = tf.cast(logits, tf.float32)
        losses, d_logits = tf.raw_ops.SparseSoftmaxCrossEntropyWithLogits(features=wide, labels=labels)
        d_logits = tf.cast(d_logits, features.dtype)
    if weights is not None:
        losses, d_logits = losses * weights, d_logits * tf.cast(weights, d_logits.dtype)[:, tf.newaxis]
    d_features = tf.where(valid[:, tf.newaxis], tf.matmul(d_logits, table), 0)
    features = tf.where(valid[:, tf.newaxis], features, 0)
    if features.dtype == tf.float16:  # a sum over many tokens, which no loss scale has made smaller yet
        d_table = tf.cast(tf.matmul(d_logits, features / _ROOM, transpose_a=True), tf.float32) * _ROOM
    else:
        d_table = tf.matmul(d_logits, features, transpose_a=True)
    return tf.where(valid, losses, 0.0), d_features, d_table


@tf.function(jit_compile=True, autograph=False)
def _losses_and_slopes(logits: tf.Tensor, labels: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Cross-entropies (tokens,), and their gradients by the logits, in float32 without writing it to memory."""
    wide = tf.cast(logits, tf.float32)
    largest = tf.reduce_max(wide, axis=-1, keepdims=True)
    log_sum = largest + tf.math.log(tf.reduce_sum(tf.exp(wide - largest), axis=-1, keepdims=True))
    of_labels = tf.cast(tf.gather(logits, labels, axis=1, batch_dims=1), tf.float32)
    is_label = tf.range(logits.shape[1])[tf.newaxis] == labels[:, tf.newaxis]
    slopes = tf.exp(wide - log_sum) - tf.cast(is_label, tf.float32)
    return log_sum[:, 0] - of_labels, tf.cast(slopes, logits.dtype)
