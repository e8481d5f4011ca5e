"""Log-likelihoods of texts under a model, and logits: rows of any lengths, padded at their ends."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tfdp.system.exits import require

_STEP = 64  # tokens; rows are padded to multiples, so that few lengths are traced


class Likelihood(NamedTuple):
    """How likely a model finds some tokens."""

    log_likelihood: float  # nats, summed over the tokens
    num_tokens: int
    is_greedy: bool  # whether each token is the most likely one at its place


def padded(rows: Sequence[Sequence[int]], context_length: int, fill: int = 0) -> np.ndarray:
    """Rows of one length, int32: a multiple of `_STEP`, but at most the context length unless a row is longer."""
    longest = max(len(row) for row in rows)
    length = max(longest, min(-(-longest // _STEP) * _STEP, context_length))
    made = np.full((len(rows), length), fill, np.int32)
    for row, tokens in zip(made, rows, strict=True):
        row[: len(tokens)] = tokens
    return made


class Scorer:
    """Scores tokens; keeps its traced functions from call to call.

    Args:
      model: a recipe's model, see `recipe.Model`.
      vocab_size: of the tokenizer.
      rows: sequences in one forward pass.
    """

    def __init__(self, model: Any, vocab_size: int, rows: int = 16) -> None:
        self._model, self._vocab_size, self._rows = model, vocab_size, rows
        self._context_length: int = model.config.context_length
        self._logits = tf.function(self._forward, autograph=False)
        self._score = tf.function(self._scores, autograph=False)

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """Logits of the token after each one: ids (rows, time) -> float32 (rows, time, vocab_size)."""
        time = tokens.shape[1]
        return self._logits(tf.constant(padded(list(tokens), self._context_length))).numpy()[:, :time]

    def likelihoods(self, requests: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Likelihood]:
        """How likely each continuation is after its context, which holds one token at least.

        Of what is longer than the context length, the last tokens are seen; a continuation that is longer itself is
        scored in pieces that follow each other, each after the last token before it.

        Raises:
          ConfigError: a context without tokens.
        """
        for context, _ in requests:
            require(len(context) > 0, "context", list(context), "must hold one token at least: try the end of text")
        pieces = [
            (index, *piece) for index, request in enumerate(requests) for piece in self._pieces(*map(list, request))
        ]
        pieces.sort(key=lambda piece: len(piece[1]))  # rows of about one length are scored together
        totals = [Likelihood(0.0, 0, True) for _ in requests]
        for start in range(0, len(pieces), self._rows):
            share = pieces[start : start + self._rows]
            found = self._score(
                tf.constant(padded([piece[1] for piece in share], self._context_length)),
                tf.constant(padded([piece[2] for piece in share], self._context_length, -1)),
            )
            for (index, *_), log_likelihood, count, all_greedy in zip(share, *(x.numpy() for x in found), strict=True):
                before = totals[index]
                totals[index] = Likelihood(
                    before.log_likelihood + float(log_likelihood),
                    before.num_tokens + int(count),
                    before.is_greedy and bool(all_greedy),
                )
        return totals

    def _pieces(self, context: list[int], continuation: list[int]) -> Iterator[tuple[list[int], list[int]]]:
        """Inputs and targets (negative where nothing is scored) of forward passes that score a continuation once."""
        longest = self._context_length
        if len(continuation) <= longest:
            tokens = (context + continuation)[-(longest + 1) :]
            yield tokens[:-1], [-1] * (len(tokens) - 1 - len(continuation)) + continuation
            return
        tokens = context[-1:] + continuation
        for start in range(0, len(continuation), longest):
            share = tokens[start : start + longest + 1]
            yield share[:-1], share[1:]

    def _forward(self, tokens: tf.Tensor) -> tf.Tensor:
        features = self._model.features(tokens)
        logits = features if self._model.output_table is None else self._model.logits(features)
        return tf.cast(logits, tf.float32)[:, :, : self._vocab_size]

    def _scores(self, tokens: tf.Tensor, targets: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        logits, valid, labels = self._forward(tokens), targets >= 0, tf.maximum(targets, 0)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits)
        log_likelihoods = -tf.reduce_sum(tf.where(valid, tf.cast(losses, tf.float64), 0), axis=1)
        is_likeliest = tf.argmax(logits, axis=-1, output_type=tf.int32) == labels
        greedy = tf.reduce_all(is_likeliest | ~valid, axis=1)
        return log_likelihoods, tf.reduce_sum(tf.cast(valid, tf.int32), axis=1), greedy
