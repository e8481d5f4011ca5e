"""Losses as (sum, count) over valid tokens: sums add up over any split of the rows, means do not."""

from collections.abc import Callable

import tensorflow as tf

from tfdp.dropout import sequence_keys
from tfdp.sums import fixed_sum

Sums = tuple[tf.Tensor, tf.Tensor]  # sum of token losses in nats, number of valid tokens
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
    return _over_rows(*row_cross_entropy(logits, targets))


def _over_rows(loss_sums: tf.Tensor, counts: tf.Tensor) -> Sums:
    return tf.cast(fixed_sum(loss_sums), tf.float32), tf.reduce_sum(counts)


def next_token_losses(
    model: Callable[[tf.Tensor, tf.Tensor | None], tf.Tensor], dropout_seed: int | None = None
) -> LossFunction:
    """The task of a causal language model: the losses and counts of each row, as a function of (rows, step).

    Args:
      model: (token ids, dropout keys or None) -> logits.
      dropout_seed: of the masks; None drops nothing, for evaluation.
    """

    def loss_function(rows: dict[str, tf.Tensor], step: tf.Tensor) -> Sums:
        inputs, targets = inputs_and_targets(rows["tokens"])
        keys = None if dropout_seed is None else sequence_keys(dropout_seed, step, rows["position"])
        return row_cross_entropy(model(inputs, keys), targets)

    return loss_function


def next_token_loss(
    model: Callable[[tf.Tensor, tf.Tensor | None], tf.Tensor], dropout_seed: int | None = None
) -> LossFunction:
    """The same, summed over the rows: what a step and an evaluation add up."""
    row_losses = next_token_losses(model, dropout_seed)
    return lambda rows, step: _over_rows(*row_losses(rows, step))
