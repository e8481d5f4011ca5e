"""Searches for the outputs of many prompts in one graph: greedy, drawn, or by beams.

Prompts of several lengths are padded in front, so that they end together, and keys and values are cached. One graph of
TensorFlow serves rows, lengths and numbers of tokens of any size. (Kernels that XLA compiles are compiled for each
width: callers keep to a few.)
"""

from typing import Any, NamedTuple

import tensorflow as tf

from tfdp.config.sections import DecodingConfig
from tfdp.ops.hashing import sequence_keys, uint32

Cache = list[tuple[tf.Tensor, tf.Tensor]]  # keys and values of each block


class Prompts(NamedTuple):
    """The prompts of some rows."""

    tokens: tf.Tensor  # int32 (rows, width), each at the end of its row
    padding: tf.Tensor  # int32 (rows,), tokens before it
    numbers: tf.Tensor  # int64 (rows,), of the example: what is drawn for it depends on this and the seed alone
    num_tokens: tf.Tensor  # int32 (rows,), most tokens of its output; 0 where a row has no prompt


class Decoder:
    """Finds outputs.

    Args:
      model: has `empty_cache`, `extend_features` with padding, and `logits`: see `gpt.GPT`.
      vocab_size: of the tokenizer; later rows of the tables are never taken.
      end_of_text: the token that ends an output.
      config: how to search.
    """

    def __init__(self, model: Any, vocab_size: int, end_of_text: int, config: DecodingConfig) -> None:
        self._model, self._vocab_size, self._end, self._config = model, vocab_size, end_of_text, config

    def __call__(self, prompts: Prompts) -> tf.Tensor:
        """The ids of the outputs, int32 (rows, max_tokens); from its end on, a row holds ends of text."""
        return self._beams(prompts) if self._config.method == "beam" else self._one_by_one(prompts)

    def _read(self, prompts: Prompts) -> tuple[tf.Tensor, Cache]:
        rows, width = tf.shape(prompts.tokens)[0], tf.shape(prompts.tokens)[1]
        cache = self._model.empty_cache(rows, width + tf.reduce_max(prompts.num_tokens))
        return self._next(prompts.tokens, cache, tf.constant(0), prompts.padding)

    def _next(self, tokens: tf.Tensor, cache: Cache, start: tf.Tensor, padding: tf.Tensor) -> tuple[tf.Tensor, Cache]:
        """Logits after the last of new tokens, float32 (rows, vocab_size), and the longer cache."""
        features, cache = self._model.extend_features(tokens, cache, start, padding)
        return self._model.logits(features[:, -1:])[:, 0, : self._vocab_size], cache

    # One token at a time, the likeliest or a drawn one

    def _one_by_one(self, prompts: Prompts) -> tf.Tensor:
        width, places = tf.shape(prompts.tokens)[1], tf.range(self._config.max_tokens)

        def add(
            step: tf.Tensor, written: tf.Tensor, has_ended: tf.Tensor, logits: tf.Tensor
        ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            token = tf.where(has_ended, self._end, self._choose(logits, prompts.numbers, step))
            written = tf.where(places == step, token[:, tf.newaxis], written)
            return token, written, has_ended | (token == self._end) | (step + 1 >= prompts.num_tokens)

        def go_on(
            step: tf.Tensor, token: tf.Tensor, written: tf.Tensor, has_ended: tf.Tensor, cache: Cache
        ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor, Cache]:
            logits, cache = self._next(token[:, tf.newaxis], cache, width + step - 1, prompts.padding)
            return step + 1, *add(step, written, has_ended, logits), cache

        logits, cache = self._read(prompts)
        written = tf.fill([tf.shape(prompts.tokens)[0], self._config.max_tokens], self._end)
        first = add(tf.constant(0), written, prompts.num_tokens == 0, logits)
        found = tf.while_loop(
            lambda step, token, written, has_ended, cache: ~tf.reduce_all(has_ended),
            go_on,
            (tf.constant(1), *first, cache),
        )
        return found[2]

    def _choose(self, logits: tf.Tensor, numbers: tf.Tensor, step: tf.Tensor) -> tf.Tensor:
        """A token for each row: int32 (rows,)."""
        config = self._config
        if config.method == "greedy":
            return tf.argmax(logits, axis=-1, output_type=tf.int32)
        scaled = logits / config.temperature
        order = tf.argsort(scaled, direction="DESCENDING", stable=True)
        chances = tf.nn.softmax(tf.gather(scaled, order, batch_dims=1))
        places = tf.range(self._vocab_size)
        is_kept = places < (config.top_k or self._vocab_size)
        if config.top_p is not None:
            kept = tf.where(is_kept, chances, 0.0)
            kept /= tf.reduce_sum(kept, axis=-1, keepdims=True)
            is_kept &= tf.cumsum(kept, axis=-1, exclusive=True) < config.top_p
        chances = tf.where(is_kept, chances, 0.0)
        bounds = tf.cumsum(chances, axis=-1)
        keys = sequence_keys(config.seed, tf.cast(step, tf.int64), numbers)
        uniform = tf.cast(tf.bitwise.right_shift(keys, uint32(8)), tf.float32) / 2.0**24  # in [0, 1)
        drawn = uniform * bounds[:, -1]
        place = tf.reduce_sum(tf.cast(bounds <= drawn[:, tf.newaxis], tf.int32), axis=-1)
        return tf.gather(order, tf.minimum(place, self._vocab_size - 1), batch_dims=1)

    # Beams

    def _beams(self, prompts: Prompts) -> tf.Tensor:
        """Beam search with a length penalty (Wu et al. 2016, "Google's neural machine translation system").

        The likeliest `beam_size` beginnings are kept apart from as many outputs that have ended; a row is done when no
        beginning can become better than the worst of these. One that has reached its most tokens counts as it is.
        """
        size, most = self._config.beam_size, self._config.max_tokens
        rows, width = tf.shape(prompts.tokens)[0], tf.shape(prompts.tokens)[1]
        padding = tf.repeat(prompts.padding, size)

        def goes_on(step: tf.Tensor, begun: _Beams, ended: _Beams, *_: Any) -> tf.Tensor:
            could_be = begun.scores[:, 0] / self._penalty(prompts.num_tokens)
            return tf.reduce_any((step < prompts.num_tokens) & (could_be > ended.scores[:, -1]))

        def add(step: tf.Tensor, begun: _Beams, ended: _Beams, cache: Cache) -> tuple[tf.Tensor, _Beams, _Beams, Cache]:
            last = tf.reshape(begun.tokens[:, :, step - 1], [-1, 1])
            logits, cache = self._next(last, cache, width + step - 1, padding)
            begun, ended, chosen = self._step(step, begun, ended, logits, prompts.num_tokens)
            return step + 1, begun, ended, _of_beams(cache, chosen, rows, size)

        logits, cache = self._read(prompts)
        none = tf.fill([rows, size], -float("inf"))
        begun = _Beams(tf.where(tf.range(size) == 0, 0.0, none), tf.fill([rows, size, most], self._end))
        first, step = tf.repeat(logits, size, axis=0), tf.constant(0)
        begun, ended, chosen = self._step(step, begun, _Beams(none, begun.tokens), first, prompts.num_tokens)
        repeated = [(tf.repeat(keys, size, axis=0), tf.repeat(values, size, axis=0)) for keys, values in cache]
        state = (step + 1, begun, ended, _of_beams(repeated, chosen, rows, size))
        _, begun, ended, _ = tf.while_loop(goes_on, add, state)
        unfinished = begun.scores / self._penalty(prompts.num_tokens)[:, tf.newaxis]
        found, _ = _best(tf.concat([ended.scores, unfinished], 1), tf.concat([ended.tokens, begun.tokens], 1), 1)
        return found.tokens[:, 0]

    def _step(
        self, step: tf.Tensor, begun: "_Beams", ended: "_Beams", logits: tf.Tensor, num_tokens: tf.Tensor
    ) -> tuple["_Beams", "_Beams", tf.Tensor]:
        """Both kinds of beams with one token more, and from which beginning each one comes: int32 (rows, beams).

        Nothing changes in rows that have their most tokens (rows,).
        """
        size, vocab_size, goes_on = self._config.beam_size, self._vocab_size, (step < num_tokens)[:, tf.newaxis]
        likely = tf.reshape(tf.nn.log_softmax(logits), [-1, size, vocab_size]) + begun.scores[..., tf.newaxis]
        # twice as many: of these at most half end
        scores, index = tf.math.top_k(tf.reshape(likely, [-1, size * vocab_size]), min(2 * size, size * vocab_size))
        beam, token = index // vocab_size, index % vocab_size
        is_now = tf.range(self._config.max_tokens) == step
        tokens = tf.where(is_now, token[..., tf.newaxis], tf.gather(begun.tokens, beam, batch_dims=1))
        ends = token == self._end
        candidates = tf.where(ends & goes_on, scores / self._penalty(step + 1), -float("inf"))
        ended = _best(tf.concat([ended.scores, candidates], 1), tf.concat([ended.tokens, tokens], 1), size)[0]
        longer, places = _best(tf.where(ends, -float("inf"), scores), tokens, size)
        begun = _Beams(
            tf.where(goes_on, longer.scores, begun.scores),
            tf.where(goes_on[..., tf.newaxis], longer.tokens, begun.tokens),
        )
        return begun, ended, tf.gather(beam, places, batch_dims=1)

    def _penalty(self, num_tokens: tf.Tensor) -> tf.Tensor:
        return ((5.0 + tf.cast(num_tokens, tf.float32)) / 6.0) ** self._config.length_penalty


class _Beams(NamedTuple):
    """Outputs of each row, the best ones first."""

    scores: tf.Tensor  # float32 (rows, beams); -inf where there is none
    tokens: tf.Tensor  # int32 (rows, beams, max_tokens)


def _of_beams(cache: Cache, chosen: tf.Tensor, rows: tf.Tensor, size: int) -> Cache:
    """The cache of the chosen beams of each row, int32 (rows, beams)."""
    index = tf.reshape(chosen + tf.range(rows)[:, tf.newaxis] * size, [-1])
    return [(tf.gather(keys, index), tf.gather(values, index)) for keys, values in cache]


def _best(scores: tf.Tensor, tokens: tf.Tensor, number: int) -> tuple[_Beams, tf.Tensor]:
    """The best beams of each row, and their places among all, int32 (rows, number)."""
    scores, places = tf.math.top_k(scores, number)
    return _Beams(scores, tf.gather(tokens, places, batch_dims=1)), places
