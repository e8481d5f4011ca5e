"""The outputs of a model for many prompts, written by all replicas of a strategy: the hypotheses of a translation, say.

Prompts are sorted by length and cut into passes of so many rows, each padded to one of a few widths. Neither depends on
the number of replicas and workers, so no output does: each replica takes passes of its own, and gathers all.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tfdp.config.sections import DecodingConfig
from tfdp.data.cutting import cut_prompt
from tfdp.data.sequences import TooLong
from tfdp.data.shards import Split
from tfdp.data.tokenizers.tokenizer import Tokenizer
from tfdp.inference.decoding import Decoder, Prompts
from tfdp.parallel import collectives
from tfdp.tasks.flags import ID_MASK, UNSCORED
from tfdp.tasks.task import Output

_WIDTHS = sorted(size << power for power in range(20) for size in (16, 24))  # few: kernels are compiled for each


class Hypothesis(NamedTuple):
    """What a model wrote for a prompt."""

    text: str
    has_ended: bool  # or it has as many tokens as it may have
    is_cut: bool  # whether a part of the prompt was not seen


class Hypotheses:
    """Writes outputs; keeps its traced function from call to call.

    Args:
      strategy: that the model was made under.
      model: a GPT.
      tokenizer: of its ids.
      config: how to search.
      parallel_passes: that a replica computes at the same time.
      too_long: `data.too_long`. With cut_input, a prompt loses what is before its last tokens; else its start.
    """

    def __init__(
        self,
        strategy: tf.distribute.Strategy,
        model: Any,
        tokenizer: Tokenizer,
        config: DecodingConfig,
        parallel_passes: int = 1,
        too_long: TooLong = "cut_start",
    ) -> None:
        self._cuts_input = too_long == "cut_input"
        self._strategy, self._tokenizer, self._config = strategy, tokenizer, config
        self._context_length: int = model.config.context_length
        self._decoder = Decoder(model, tokenizer.vocab_size, tokenizer.end_of_text, config)
        self._parallel = parallel_passes
        self._rows = max(1, config.rows // (config.beam_size if config.method == "beam" else 1))
        self._passes = parallel_passes * int(strategy.num_replicas_in_sync)
        signature = [tf.TensorSpec([self._passes, self._rows, None], tf.int32)]
        signature += [tf.TensorSpec([self._passes, self._rows], dtype) for dtype in (tf.int32, tf.int64, tf.int32)]
        signature += [tf.TensorSpec([self._passes], tf.int32)]
        self._pass = tf.function(self._one_pass, autograph=False)
        self._round = tf.function(self._run, signature, autograph=False)

    def __call__(self, prompts: Sequence[Sequence[int]], numbers: Sequence[int]) -> list[Hypothesis]:
        """The output of each prompt, in order.

        Args:
          prompts: ids. One that leaves less than `reserved` tokens of the context is cut.
          numbers: of the examples: what is drawn for one depends on its number and the seed alone.
        """
        most = self._context_length - reserved(self._config, self._context_length)
        kept = [cut_prompt(prompt, most) if self._cuts_input else list(prompt[-most:]) for prompt in prompts]
        order = sorted(range(len(kept)), key=lambda index: len(kept[index]))
        passes = [order[start : start + self._rows] for start in range(0, len(order), self._rows)]
        found: list[Hypothesis] = [Hypothesis("", False, False)] * len(kept)
        for start in range(0, len(passes), self._passes):
            share = passes[start : start + self._passes]
            tokens = self._round(*self._padded(share, kept, numbers)).numpy().astype(np.int64)
            for indices, outputs in zip(share, tokens, strict=False):  # passes of nothing follow the last one
                for index, ids in zip(indices, outputs, strict=False):
                    room = min(self._config.max_tokens, self._context_length - len(kept[index]))
                    found[index] = self._read(ids[:room], is_cut=len(prompts[index]) > most)
        return found

    def writer(self, split: Split) -> Callable[[], list[Output]]:
        """A function that writes outputs for the examples of a split that `config` takes."""
        total = split.num_documents
        num = total if self._config.num_examples is None else min(total, self._config.num_examples)
        numbers = [index * total // num for index in range(num)]

        @functools.cache
        def chosen() -> list[tuple[np.ndarray, np.ndarray]]:
            return [example_of(split, number) for number in numbers]

        def write() -> list[Output]:
            hypotheses, decode = self([prompt.tolist() for prompt, _ in chosen()], numbers), self._tokenizer.decode
            return [
                Output(decode(prompt[1:]), decode(reference), made.text, made.has_ended)
                for (prompt, reference), made in zip(chosen(), hypotheses, strict=True)
            ]

        return write

    def _read(self, ids: np.ndarray, is_cut: bool) -> "Hypothesis":
        (ends,) = np.nonzero(ids == self._tokenizer.end_of_text)
        return Hypothesis(self._tokenizer.decode(ids[: ends[0]] if len(ends) else ids), len(ends) > 0, is_cut)

    def _padded(
        self, share: Sequence[Sequence[int]], prompts: Sequence[Sequence[int]], numbers: Sequence[int]
    ) -> list[tf.Tensor]:
        """Tokens, padding, numbers, most tokens of outputs, and widths of the passes of one round."""
        longest = [max(len(prompts[index]) for index in indices) for indices in share]
        widths = np.full(self._passes, _WIDTHS[0], np.int32)
        widths[: len(share)] = [next(width for width in _WIDTHS if width >= length) for length in longest]
        tokens = np.zeros((self._passes, self._rows, int(widths.max())), np.int32)
        padding, num_tokens = (np.zeros((self._passes, self._rows), np.int32) for _ in range(2))
        own = np.zeros((self._passes, self._rows), np.int64)
        for place, indices in enumerate(share):
            for row, index in enumerate(indices):
                ids = prompts[index]
                tokens[place, row, -len(ids) :] = ids
                padding[place, row], own[place, row] = widths[place] - len(ids), numbers[index]
                num_tokens[place, row] = min(self._config.max_tokens, self._context_length - len(ids))
        return [tf.constant(each) for each in (tokens, padding, own, num_tokens, widths)]

    def _run(self, *given: tf.Tensor) -> tf.Tensor:
        gathered = self._strategy.run(self._gathered, args=given)
        found = collectives.first_replica(self._strategy, gathered)
        return tf.reshape(found, [self._passes, self._rows, self._config.max_tokens])

    def _gathered(self, *given: tf.Tensor) -> tf.Tensor:
        first = tf.distribute.get_replica_context().replica_id_in_sync_group * self._parallel
        found = [self._pass(*(each[first + index] for each in given)) for index in range(self._parallel)]
        return collectives.replica_gather(tf.cast(tf.stack(found), tf.float32))  # which holds every id

    def _one_pass(
        self, tokens: tf.Tensor, padding: tf.Tensor, numbers: tf.Tensor, num_tokens: tf.Tensor, width: tf.Tensor
    ) -> tf.Tensor:
        own = tokens[:, tf.shape(tokens)[1] - width :]
        found = self._decoder(Prompts(own, padding, numbers, num_tokens))
        return tf.ensure_shape(found, [self._rows, self._config.max_tokens])


def reserved(config: DecodingConfig, context_length: int) -> int:
    """Tokens of the context that a prompt leaves to its output: a quarter, or all of an output if that is less."""
    return min(config.max_tokens, max(1, context_length // 4))


def example_of(split: Split, number: int) -> tuple[np.ndarray, np.ndarray]:
    """The prompt of an example, from the end of text before it, and what is learned first of it; ids each."""
    starts = split.document_starts
    start = int(starts[number]) - 1
    stop = int(starts[number + 1]) - 1 if number + 1 < len(starts) else split.num_tokens - 1
    tokens = split.read(np.array([start]), np.array([stop - start]), stop - start, with_flags=True)[0]
    is_seen = np.append((tokens[1:] & UNSCORED) != 0, True)
    begin = int(np.argmin(is_seen)) + 1  # of what is learned
    end = begin + int(np.argmax(is_seen[begin - 1 :]))
    ids = tokens & ID_MASK
    return ids[:begin], ids[begin:end]
