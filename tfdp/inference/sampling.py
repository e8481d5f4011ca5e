"""Text from a model: one token at a time, with the keys and values of the past cached.

A new token costs one forward pass over that token alone. When the cache is full, the newer half of the
context is read again and generation goes on, so the cost per token stays bounded at any length.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import tensorflow as tf

from tfdp.config.sections import SamplingConfig
from tfdp.data.tokenizers.tokenizer import Tokenizer, markup_ids, prompt_ids

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
        self._functions: dict[Any, Callable[..., tuple[tf.Tensor, Cache]]] = {}  # by the specs that they take

    def text(self, prompt: str, config: SamplingConfig) -> str:
        """The continuation of a prompt; an empty prompt begins a document."""
        return "".join(self.stream(prompt, config))

    def stream(self, prompt: str, config: SamplingConfig) -> Iterator[str]:
        """Yields the continuation of a prompt piece by piece, each as soon as later tokens cannot change it."""
        return self.stream_after(self._ids_of(prompt), config)

    def _ids_of(self, prompt: str) -> list[int]:
        if self._sees_whole:  # as the examples of its training
            return [self._tokenizer.end_of_text, *markup_ids(self._tokenizer, prompt).tolist()]
        found: list[int] = prompt_ids(self._tokenizer, prompt).tolist()
        return found

    @property
    def _sees_whole(self) -> bool:
        """Whether prompts see themselves whole: then each is read in one pass, and once."""
        return bool(getattr(self._model.config, "prompt_attention", "causal") == "whole")

    def stream_after(self, ids: Sequence[int], config: SamplingConfig, ends: Collection[int] = ()) -> Iterator[str]:
        """Yields what follows ids, as `stream` does; a token among `ends` ends it too, and is no part of it."""
        written = Continuation(self._tokenizer, config.stop)
        for (token,) in self.batches([ids], config):
            if token is None or token in ends:
                break
            yield written.add(token)
            if written.is_stopped:
                return
        yield written.end()

    def texts(self, prompts: Sequence[str], config: SamplingConfig) -> list[str]:
        """The continuations of several prompts, computed as one batch; each as if it were alone.

        A model that sees prompts whole reads each in one pass, so that these are computed one after the other.
        """
        if self._sees_whole:
            return [self.text(prompt, config) for prompt in prompts]
        written = [Continuation(self._tokenizer, config.stop) for _ in prompts]
        found = [""] * len(prompts)
        for tokens in self.batches([self._ids_of(prompt) for prompt in prompts], config):
            for row, token in enumerate(tokens):
                if token is not None and not written[row].is_stopped:
                    found[row] += written[row].add(token)
            if all(each.is_stopped for each in written):
                break
        return [text + each.end() for text, each in zip(found, written, strict=True)]

    def tokens(self, prompt: str, config: SamplingConfig) -> Iterator[int]:
        """Yields the ids that continue a prompt, of which the last context_length tokens are seen."""
        for (token,) in self.batches([self._ids_of(prompt)], config):
            if token is not None:
                yield token

    def batches(self, prompts: Sequence[Sequence[int]], config: SamplingConfig) -> Iterator[list[int | None]]:
        """Yields the next token of each prompt, step by step; None where a prompt is still read, or its text has ended.

        All rows stand at the same position: the shortest prompt is read in one pass, and the others go on with their
        own tokens until they end. Each row draws as if it were alone, with the same seed.

        Args:
          prompts: their ids, at least one each.
          config: how to draw.
        """
        # No longer than the text will be: an attention over 8,192 empty places costs as much as over full ones.
        longest = max(len(prompt) for prompt in prompts) + config.num_tokens
        context_length = min(self._model.config.context_length, longest)
        rows = [_Row(prompt[-context_length:], config) for prompt in prompts]
        position = min(len(row.ids) for row in rows)
        logits, cache, filled = self._read([row.ids[:position] for row in rows], context_length)
        while True:
            scores = np.asarray(logits, np.float64)[:, : self._tokenizer.vocab_size]
            yield [
                row.advance(position, each, self._tokenizer.end_of_text) for row, each in zip(rows, scores, strict=True)
            ]
            position += 1
            if all(row.has_ended for row in rows):
                return
            if filled == context_length:
                if self._sees_whole:  # what it wrote would become a prompt, which it was not trained on
                    return
                kept = max(1, context_length // 2)
                logits, cache, filled = self._read(
                    [row.ids[position - kept : position] for row in rows], context_length
                )
            else:
                newest = tf.constant([row.ids[position - 1 : position] for row in rows])
                logits, cache = self._extend(newest, cache, tf.constant(filled))
                filled += 1

    def _read(self, tokens: list[list[int]], length: int) -> tuple[tf.Tensor, Cache, int]:
        """Fills an empty cache of a length with tokens, as many in each row."""
        cache = self._model.empty_cache(len(tokens), length)
        logits, cache = self._extend(tf.constant(tokens), cache, tf.constant(0))
        return logits, cache, len(tokens[0])

    def _extend(self, tokens: tf.Tensor, cache: Cache, start: tf.Tensor) -> tuple[tf.Tensor, Cache]:
        """Logits after the last of new tokens. One graph serves any rows and tokens: tracing takes seconds."""
        specs = [[_any_length(each) for each in pair] for pair in cache]
        key = str(specs)
        if key not in self._functions:
            signature = [
                tf.TensorSpec([None, None], tf.int32),
                [tuple(pair) for pair in specs],
                tf.TensorSpec([], tf.int32),
            ]
            self._functions[key] = tf.function(self._last_logits, input_signature=signature, autograph=False)
        return self._functions[key](tokens, cache, start)

    def _last_logits(self, tokens: tf.Tensor, cache: Cache, start: tf.Tensor) -> tuple[tf.Tensor, Cache]:
        logits, cache = self._model.extend(tokens, cache, start)
        return logits[:, -1], cache


def _any_length(cached: tf.Tensor) -> tf.TensorSpec:
    """Keys or values (rows, heads, tokens, dim) of any rows and tokens; anything else in this shape alone."""
    shape = [None, cached.shape[1], None, cached.shape[3]] if cached.shape.rank == 4 else cached.shape
    return tf.TensorSpec(shape, cached.dtype)


class _Row:
    """A text of a batch: the ids so far, and whether more will come."""

    def __init__(self, prompt: Sequence[int], config: SamplingConfig) -> None:
        self.ids, self.has_ended = list(prompt), False
        self._config, self._num_left = config, config.num_tokens
        self._generator = np.random.Generator(np.random.Philox(config.seed))

    def advance(self, position: int, scores: np.ndarray, end_of_text: int) -> int | None:
        """Gives the row a token at a position, unless its prompt has one there; returns what was drawn."""
        if position < len(self.ids):
            return None
        token = end_of_text if self.has_ended else draw(scores, self._config, self._generator)
        self.has_ended |= token == end_of_text
        self.ids.append(token)
        if self.has_ended:
            return None
        self._num_left -= 1
        self.has_ended = self._num_left == 0
        return token


class Continuation:
    """The text of tokens as they come, cut before the first stop string.

    Args:
      tokenizer: of the tokens.
      stop: texts that end it, and are no part of it.

    Attributes:
      is_stopped: whether a stop string was met.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._ids: list[int] = []
        self._num_given = 0  # characters
        self.is_stopped = False

    def add(self, token: int) -> str:
        """What this token adds for certain: no part of a character, and no beginning of a stop string."""
        self._ids.append(token)
        text = self._text()
        found = [text.index(each) for each in self._stop if each in text]
        if found:
            self.is_stopped = True
            return self._give(text[: min(found)])
        certain = text.rstrip("\ufffd")
        unsure = (size for each in self._stop for size in range(1, len(each)) if certain.endswith(each[:size]))
        return self._give(certain[: len(certain) - max(unsure, default=0)])

    def end(self) -> str:
        """What was held back, once no more tokens come."""
        return "" if self.is_stopped else self._give(self._text())

    def _text(self) -> str:
        return self._tokenizer.decode(np.array(self._ids, np.int64))

    def _give(self, text: str) -> str:
        new = text[self._num_given :]
        self._num_given = max(self._num_given, len(text))
        return new


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
