"""Losses as (sum, count) over valid tokens: sums add up over any split of the rows, means do not."""

from collections.abc import Callable

import tensorflow as tf

from tfdp.dropout import sequence_keys

Sums = tuple[tf.Tensor, tf.Tensor]  # float32 scalars: sum of token losses in nats, number of valid tokens


def inputs_and_targets(tokens: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Splits windows (rows, time + 1) into inputs and next-token targets, (rows, time) each.

    Absent tokens (negative) become input 0, and stay negative as targets: they are not valid.
    """
    return tf.maximum(tokens[:, :-1], 0), tokens[:, 1:]


def cross_entropy(logits: tf.Tensor, targets: tf.Tensor) -> Sums:
    """Cross-entropy in nats, summed over valid targets, and their number.

    Args:
      logits: float32 (rows, time, vocab_size).
      targets: int32 (rows, time); negative where there is nothing to predict.
    """
    valid = targets >= 0
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(tf.maximum(targets, 0), logits)
    return tf.reduce_sum(tf.where(valid, losses, 0.0)), tf.reduce_sum(tf.cast(valid, tf.float32))


def next_token_loss(
    model: Callable[[tf.Tensor, tf.Tensor | None], tf.Tensor], dropout_seed: int | None = None
) -> Callable[[dict[str, tf.Tensor], tf.Tensor], Sums]:
    """The task of a causal language model, as a function of (rows, step).

    Args:
      model: (token ids, dropout keys or None) -> logits.
      dropout_seed: of the masks; None drops nothing, for evaluation.
    """

    def loss_function(rows: dict[str, tf.Tensor], step: tf.Tensor) -> Sums:
        inputs, targets = inputs_and_targets(rows["tokens"])
        keys = None if dropout_seed is None else sequence_keys(dropout_seed, step, rows["position"])
        return cross_entropy(model(inputs, keys), targets)

    return loss_function
