"""Losses as (sum, count) over valid tokens: sums add up over any split of the rows, means do not."""

from collections.abc import Callable

import tensorflow as tf

from tfdp.dropout import sequence_keys
from tfdp.sums import fixed_sum

Sums = tuple[tf.Tensor, tf.Tensor]  # sums of token losses in nats, numbers of valid tokens
LossFunction = Callable[[dict[str, tf.Tensor], tf.Tensor], Sums]  # (rows of one micro-batch, step) -> sums


def inputs_and_targets(tokens: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Splits windows (rows, time + 1) into inputs and next-token targets, (rows, time) each.

    Absent tokens (negative) become input 0, and stay negative as targets: they are not valid.
    """
    return tf.maximum(tokens[:, :-1], 0), tokens[:, 1:]


def row_cross_entropy(logits: tf.Tensor, targets: tf.Tensor) -> Sums:
    """Cross-entropy in nats, summed over the valid targets of each row in float64, and their number.

    Args:
      logits: float32 (rows, time, vocab_size).
      targets: int32 (rows, time); negative where there is nothing to predict.

    Returns:
      float64 and float32, (rows,) each.
    """
    valid = targets >= 0
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(tf.maximum(targets, 0), logits)
    losses = tf.cast(tf.where(valid, losses, 0.0), tf.float64)
    return tf.reduce_sum(losses, axis=1), tf.reduce_sum(tf.cast(valid, tf.float32), axis=1)


def cross_entropy(logits: tf.Tensor, targets: tf.Tensor) -> Sums:
    """The same over all rows: float32 scalars, added in float64."""
    loss_sums, counts = row_cross_entropy(logits, targets)
    return tf.cast(fixed_sum(loss_sums), tf.float32), tf.reduce_sum(counts)


def next_token_losses(
    model: Callable[..., tf.Tensor], dropout_seed: int | None = None, document_start: int | None = None
) -> LossFunction:
    """The task of a causal language model: the losses and counts of each row, as a function of (rows, step).

    Args:
      model: (token ids, dropout keys or None[, starts of documents]) -> logits.
      dropout_seed: of the masks; None drops nothing, for evaluation.
      document_start: the token id at which attention starts anew; None: nowhere in a row.
    """

    def loss_function(rows: dict[str, tf.Tensor], step: tf.Tensor) -> Sums:
        inputs, targets = inputs_and_targets(rows["tokens"])
        keys = None if dropout_seed is None else sequence_keys(dropout_seed, step, rows["position"])
        starts = () if document_start is None else (rows["tokens"][:, :-1] == document_start,)
        return row_cross_entropy(model(inputs, keys, *starts), targets)

    return loss_function


def next_token_loss(
    model: Callable[..., tf.Tensor],
    dropout_seed: int | None = None,
    document_start: int | None = None,
    num_sources: int = 1,
) -> LossFunction:
    """The same, summed over the rows of each source, (num_sources,): what a step and an evaluation add up."""
    row_losses = next_token_losses(model, dropout_seed, document_start)

    def loss_function(rows: dict[str, tf.Tensor], step: tf.Tensor) -> Sums:
        loss_sums, counts = row_losses(rows, step)
        if num_sources == 1:
            sums = fixed_sum(loss_sums)[tf.newaxis]
            return tf.cast(sums, tf.float32), tf.reduce_sum(counts, keepdims=True)
        own = [rows["source"] == source for source in range(num_sources)]
        sums = tf.stack([fixed_sum(tf.where(mask, loss_sums, 0.0)) for mask in own])
        return tf.cast(sums, tf.float32), tf.stack([tf.reduce_sum(tf.where(mask, counts, 0.0)) for mask in own])

    return loss_function
