"""Text from a model: one token at a time, with the keys and values of the past cached.

A new token costs one forward pass over that token alone. When the cache is full, the newer half of the
context is read again and generation goes on, so the cost per token stays bounded at any length.
"""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import tensorflow as tf

from tfdp.config.sections import SamplingConfig
from tfdp.data.tokenizers.tokenizer import Tokenizer, prompt_ids

Cache = list[tuple[tf.Tensor, tf.Tensor]]  # keys and values of each block


class CachedModel(Protocol):
    """What is sampled, such as `gpt.GPT`, which says what the methods take and give."""

    config: Any  # has context_length
    empty_cache: Callable[[int, int], Cache]  # (batch size, tokens)
    extend: Callable[[tf.Tensor, Cache, tf.Tensor], tuple[tf.Tensor, Cache]]


class Sampler:
    """Generates text from a model; keeps its traced functions from call to call."""

    def __init__(self, model: CachedModel, tokenizer: Tokenizer) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._extend = tf.function(self._last_logits, reduce_retracing=True, autograph=False)

    def text(self, prompt: str, config: SamplingConfig) -> str:
        """The continuation of a prompt; an empty prompt begins a document."""
        return self._tokenizer.decode(np.array(list(self.tokens(prompt, config)), dtype=np.int64))

    def tokens(self, prompt: str, config: SamplingConfig) -> Iterator[int]:
        """Yields the ids that continue a prompt, of which the last context_length tokens are seen."""
        generator = np.random.Generator(np.random.Philox(config.seed))
        history = prompt_ids(self._tokenizer, prompt).tolist()
        # No longer than the text will be: an attention over 8,192 empty places costs as much as over full ones.
        context_length = min(self._model.config.context_length, len(history) + config.num_tokens)
        logits, cache, filled = self._read(history[-context_length:], context_length)
        for _ in range(config.num_tokens):
            token = draw(logits, config, generator)
            if token == self._tokenizer.end_of_text:
                return
            yield token
            history.append(token)
            if filled == context_length:
                logits, cache, filled = self._read(history[-max(1, context_length // 2) :], context_length)
            else:
                logits, cache = self._extend(tf.constant([[token]]), cache, tf.constant(filled))
                filled += 1

    def _read(self, tokens: list[int], length: int) -> tuple[tf.Tensor, Cache, int]:
        """Fills an empty cache of a length with tokens."""
        cache = self._model.empty_cache(1, length)
        logits, cache = self._extend(tf.constant([tokens]), cache, tf.constant(0))
        return logits, cache, len(tokens)

    def _last_logits(self, tokens: tf.Tensor, cache: Cache, start: tf.Tensor) -> tuple[tf.Tensor, Cache]:
        logits, cache = self._model.extend(tokens, cache, start)
        return logits[0, -1], cache


def draw(logits: tf.Tensor, config: SamplingConfig, generator: np.random.Generator) -> int:
    """Draws a token id from logits of shape (vocab_size,): temperature, then top-k, then top-p (nucleus)."""
    scores = np.asarray(logits, dtype=np.float64)
    if config.temperature == 0:
        return int(np.argmax(scores))
    order = np.argsort(-scores, kind="stable")
    if config.top_k is not None:
        order = order[: config.top_k]
    weights = np.exp((scores[order] - scores[order[0]]) / config.temperature)
    weights /= weights.sum()
    if config.top_p is not None:
        num_kept = int(np.searchsorted(np.cumsum(weights), config.top_p)) + 1
        order, weights = order[:num_kept], weights[:num_kept] / weights[:num_kept].sum()
    return int(generator.choice(order, p=weights))
