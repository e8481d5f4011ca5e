"""Kinds of attention: which tokens of a row see which, and what their positions are."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import tensorflow as tf


@dataclass(frozen=True)
class Causal:
    """Each token sees itself and those before it."""


@dataclass(frozen=True)
class ByDocument:
    """Causal within each document of a row; positions begin anew with each.

    Attributes:
      starts: bool (rows, time), true where a document starts.
      in_prefix: bool (rows, time), the first tokens of each document, which all see one another; None: there are none.
    """

    starts: tf.Tensor
    in_prefix: tf.Tensor | None = None


@dataclass(frozen=True)
class Prefix:
    """The first tokens of a row all see one another; those after them see what is before (Raffel et al. 2020, T5).

    Attributes:
      lengths: int32 (rows,), tokens of the prefix of each row.
    """

    lengths: tf.Tensor


AttentionKind = Causal | ByDocument | Prefix
CAUSAL = Causal()


class Visibility(NamedTuple):
    """A kind of attention in rows of so many tokens."""

    positions: tf.Tensor  # int32 (time,), or (rows, time) where rows differ
    visible: tf.Tensor  # bool (time, time), or (rows, 1, time, time): who (rows) sees whom (columns)
    is_causal: bool  # whether no token sees a later one, which saves half of the products


def visibility(kind: AttentionKind, time: int, window: int | None = None) -> Visibility:
    """Who sees whom in rows of `time` tokens.

    Args:
      window: tokens that a token sees at most, itself included (Beltagy et al. 2020, Longformer); None: all.
    """
    if isinstance(kind, ByDocument):
        positions, visible = within_documents(kind.starts, kind.in_prefix)
        visible = visible if window is None else visible & _past(time, window)
        return Visibility(positions, visible, is_causal=kind.in_prefix is None)
    past = _past(time, window)
    if isinstance(kind, Prefix):
        in_prefix = tf.range(time) < kind.lengths[:, tf.newaxis]
        visible = past | in_prefix[:, tf.newaxis, :] & in_prefix[:, :, tf.newaxis]
        return Visibility(tf.range(time), visible[:, tf.newaxis], is_causal=False)
    return Visibility(tf.range(time), past, is_causal=True)


def within_documents(starts: tf.Tensor, in_prefix: tf.Tensor | None = None) -> tuple[tf.Tensor, tf.Tensor]:
    """Positions and visibility in rows of several documents, none of which sees another.

    Args:
      starts: bool (rows, time), true where a document starts.
      in_prefix: bool (rows, time), tokens of one document that see one another; None: each sees what is before.

    Returns:
      The position of each token in its document (in the row, before the first start), int32 (rows, time); and
      whether a token (rows) sees another (columns), bool (rows, 1, time, time).
    """
    time = starts.shape[1]
    past = _past(time)
    index = tf.range(time)
    begins = tf.where(starts, index, 0)[:, tf.newaxis, :]
    positions = index - tf.reduce_max(tf.where(past, begins, 0), axis=2)
    document = tf.reduce_sum(tf.cast(past & starts[:, tf.newaxis, :], tf.int32), axis=2)
    if in_prefix is not None:
        past |= in_prefix[:, tf.newaxis, :] & in_prefix[:, :, tf.newaxis]
    visible = past & (document[:, :, tf.newaxis] == document[:, tf.newaxis, :])
    return positions, visible[:, tf.newaxis]


def _past(time: int, window: int | None = None) -> tf.Tensor:
    """Each token, and the window before it: bool (time, time)."""
    past = np.tril(np.ones((time, time), dtype=bool))
    return tf.constant(past if window is None else np.triu(past, 1 - window))
