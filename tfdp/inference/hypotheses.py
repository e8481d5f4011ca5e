"""The outputs of a model for many prompts, written by all replicas of a strategy: the hypotheses of a translation, say.

Prompts are sorted by length and cut into passes of as many rows, each padded to a width of its own. Neither depends on
the number of replicas and workers, so no output does: each replica takes passes of its own, and gathers all.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfdp.config.sections import DecodingConfig
from tfdp.data.sequences import Sequences
from tfdp.data.tokenizers.tokenizer import Tokenizer
from tfdp.inference.decoding import Decoder, Prompts
from tfdp.parallel import collectives
from tfdp.tasks.flags import ID_MASK, STARTS, UNSCORED
from tfdp.tasks.task import Output

_STEP = 16  # tokens; the width of a pass is a multiple
_ROWS = 1024  # of a split that are read at a time


class Hypotheses:
    """Writes outputs; keeps its traced function from call to call.

    Args:
      strategy: that the model was made under.
      model: a GPT.
      tokenizer: of its ids.
      config: how to search.
      parallel_passes: that a replica computes at the same time.
    """

    def __init__(
        self,
        strategy: tf.distribute.Strategy,
        model: Any,
        tokenizer: Tokenizer,
        config: DecodingConfig,
        parallel_passes: int = 1,
    ) -> None:
        self._strategy, self._tokenizer, self._config = strategy, tokenizer, config
        self._context_length: int = model.config.context_length
        self._decoder = Decoder(model, tokenizer.vocab_size, tokenizer.end_of_text, config)
        self._parallel = parallel_passes
        self._passes = parallel_passes * int(strategy.num_replicas_in_sync)
        signature = [tf.TensorSpec([self._passes, config.rows, None], tf.int32)]
        signature += [tf.TensorSpec([self._passes, config.rows], dtype) for dtype in (tf.int32, tf.int64, tf.int32)]
        signature += [tf.TensorSpec([self._passes], tf.int32)]
        self._pass = tf.function(self._one_pass, autograph=False)
        self._round = tf.function(self._run, signature, autograph=False)

    def __call__(self, prompts: Sequence[Sequence[int]]) -> list[str]:
        """The output of each prompt, in order.

        Args:
          prompts: ids; of one that leaves no place for an output, the last context_length - 1.
        """
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        passes = [order[start : start + self._config.rows] for start in range(0, len(order), self._config.rows)]
        found = [""] * len(prompts)
        for start in range(0, len(passes), self._passes):
            share = passes[start : start + self._passes]
            tokens = self._round(*self._padded(share, prompts)).numpy().astype(np.int64)
            for indices, outputs in zip(share, tokens, strict=False):  # passes of nothing follow the last one
                for index, ids in zip(indices, outputs, strict=False):
                    found[index] = self._text(ids)
        return found

    def writer(self, sequences: Sequences) -> Callable[[], list[Output]]:
        """A function that writes outputs for the examples that `config` takes, each beside what it should be."""

        @functools.cache
        def chosen() -> list[tuple[np.ndarray, np.ndarray]]:
            pairs = examples_in(sequences)
            num = len(pairs) if self._config.num_examples is None else min(len(pairs), self._config.num_examples)
            return [pairs[index * len(pairs) // num] for index in range(num)]

        def write() -> list[Output]:
            hypotheses, decode = self([prompt.tolist() for prompt, _ in chosen()]), self._tokenizer.decode
            return [
                Output(decode(prompt[1:]), decode(reference), hypothesis)
                for (prompt, reference), hypothesis in zip(chosen(), hypotheses, strict=True)
            ]

        return write

    def _text(self, ids: np.ndarray) -> str:
        (ends,) = np.nonzero(ids == self._tokenizer.end_of_text)
        return self._tokenizer.decode(ids[: ends[0]] if len(ends) else ids)

    def _padded(self, share: Sequence[Sequence[int]], prompts: Sequence[Sequence[int]]) -> list[tf.Tensor]:
        """Tokens, padding, numbers, most tokens of outputs, and widths of the passes of one round."""
        most, rows = self._context_length - 1, self._config.rows
        longest = [max((min(len(prompts[index]), most) for index in indices), default=1) for indices in share]
        widths = np.ones(self._passes, np.int32)
        widths[: len(share)] = [-(-length // _STEP) * _STEP for length in longest]
        tokens = np.zeros((self._passes, rows, int(widths.max())), np.int32)
        padding, num_tokens = (np.zeros((self._passes, rows), np.int32) for _ in range(2))
        numbers = np.zeros((self._passes, rows), np.int64)
        for place, indices in enumerate(share):
            for row, index in enumerate(indices):
                ids = prompts[index][-most:]
                tokens[place, row, -len(ids) :] = ids
                padding[place, row], numbers[place, row] = widths[place] - len(ids), index
                num_tokens[place, row] = min(self._config.max_tokens, self._context_length - len(ids))
        return [tf.constant(each) for each in (tokens, padding, numbers, num_tokens, widths)]

    def _run(self, *given: tf.Tensor) -> tf.Tensor:
        gathered = self._strategy.run(self._gathered, args=given)
        found = collectives.first_replica(self._strategy, gathered)
        return tf.reshape(found, [self._passes, self._config.rows, self._config.max_tokens])

    def _gathered(self, *given: tf.Tensor) -> tf.Tensor:
        first = tf.distribute.get_replica_context().replica_id_in_sync_group * self._parallel
        found = [self._pass(*(each[first + index] for each in given)) for index in range(self._parallel)]
        return collectives.replica_gather(tf.cast(tf.stack(found), tf.float32))  # which holds every id

    def _one_pass(
        self, tokens: tf.Tensor, padding: tf.Tensor, numbers: tf.Tensor, num_tokens: tf.Tensor, width: tf.Tensor
    ) -> tf.Tensor:
        own = tokens[:, tf.shape(tokens)[1] - width :]
        found = self._decoder(Prompts(own, padding, numbers, num_tokens))
        return tf.ensure_shape(found, [self._config.rows, self._config.max_tokens])


def examples_in(sequences: Sequences) -> list[tuple[np.ndarray, np.ndarray]]:
    """The prompts and the references of all examples in order, ids each; a prompt begins with an end of text."""
    found = []
    for start in range(0, sequences.num_sequences, _ROWS):
        for row in sequences.rows(np.arange(start, min(start + _ROWS, sequences.num_sequences))):
            tokens = row[row >= 0]
            (begins,) = np.nonzero(tokens & STARTS)
            for begin, end in zip(begins, [*begins[1:], len(tokens) - 1], strict=True):
                example = tokens[begin:end]
                (learned,) = np.nonzero((example[1:] & UNSCORED) == 0)
                if len(learned):
                    ids = example & ID_MASK
                    found.append((ids[: learned[0] + 1], ids[learned[0] + 1 :]))
    return found
