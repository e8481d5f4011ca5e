"""How the changes of islands come together: their sum over all islands, each weighted by the tokens it learned from.

`SummedChanges` adds them in float32: each replica those of its own islands, then one reduction over the replicas.
`GatheredChanges` hands them on in few bits (`ops/quantization.py`), and every replica adds all of them itself; what an
island's message lost is kept in its state and added to its next one. Both add in the tree over the islands of sums.py,
so who carries an island does not change the bits.
"""

from collections.abc import Sequence
from typing import Protocol

import keras
import tensorflow as tf

from tfdp.ops.packing import DeltaType
from tfdp.ops.quantization import Encoding
from tfdp.ops.sums import sum_in_tree
from tfdp.parallel import collectives
from tfdp.parallel.synchronizer import AllReduce

Tensors = list[tf.Tensor]


class Changes(Protocol):
    """What a round asks. `message` is a function of one island alone; `join` is called in replica context.

    Attributes:
      num_reductions: of a round, as the transport sends them.
      keeps_errors: whether messages lose something, which is to be given to the next one.
    """

    num_reductions: int
    keeps_errors: bool

    def reduction_bytes(self, num_facts: int) -> int:
        """Bytes that each replica hands over in a round with so many numbers of facts."""
        ...

    def message(self, before: Tensors, after: Tensors, errors: Tensors, tokens: tf.Tensor) -> tuple[Tensors, Tensors]:
        """What an island says of its change, and what it does not say.

        Args:
          before, after: the weights that all islands started from, and those of this one.
          errors: what its messages have not said so far.
          tokens: that it learned from, a scalar.
        """
        ...

    def join(self, messages: Sequence[Tensors], facts: tf.Tensor) -> tuple[Tensors, tf.Tensor]:
        """Sums over all islands.

        Args:
          messages: of the islands of this replica.
          facts: a float32 vector, to be summed over the replicas, which begins with the tokens of all islands, each in
            a slot of its own.

        Returns:
          The sum of the changes times their tokens, and the sums of the facts.
        """
        ...


class SummedChanges:
    """In float32.

    Args:
      sums: of tensors like the weights over the replicas, in the tree.
    """

    keeps_errors = False

    def __init__(self, sums: AllReduce) -> None:
        self._sums, self.num_reductions = sums, int(sums.num_reductions)
        self._weigh = tf.function(_weighted_change, jit_compile=True, autograph=False)

    def reduction_bytes(self, num_facts: int) -> int:
        return self._sums.reduction_bytes(num_facts)

    def message(self, before: Tensors, after: Tensors, errors: Tensors, tokens: tf.Tensor) -> tuple[Tensors, Tensors]:
        return self._weigh(before, after, tokens), errors

    def join(self, messages: Sequence[Tensors], facts: tf.Tensor) -> tuple[Tensors, tf.Tensor]:
        joined, facts = self._sums.reduce(_node(messages), facts)
        return list(joined), facts


class GatheredChanges:
    """In few bits.

    Args:
      strategy: of the replicas.
      weights: whose changes they are.
      num_islands: of all replicas.
      dtype: in which a change travels.
    """

    keeps_errors = True

    def __init__(
        self, strategy: tf.distribute.Strategy, weights: Sequence[keras.Variable], num_islands: int, dtype: DeltaType
    ) -> None:
        num_replicas = int(strategy.num_replicas_in_sync)
        self._num_islands, self._num_local = num_islands, num_islands // num_replicas
        self._encoding = Encoding([tuple(weight.shape) for weight in weights], dtype)
        self._encode = tf.function(self._encoded, jit_compile=True, autograph=False)
        self._decode = tf.function(self._weighted, jit_compile=True, autograph=False)
        self.num_reductions = 2 * (num_replicas > 1)

    def reduction_bytes(self, num_facts: int) -> int:
        return 4 * (self._num_local * self._encoding.num_words + num_facts) * (self.num_reductions > 0)

    def message(self, before: Tensors, after: Tensors, errors: Tensors, tokens: tf.Tensor) -> tuple[Tensors, Tensors]:
        words, errors = self._encode(before, after, errors)
        return [words], errors

    def join(self, messages: Sequence[Tensors], facts: tf.Tensor) -> tuple[Tensors, tf.Tensor]:
        facts = collectives.sum_facts(facts)
        words = collectives.gather_words(tf.stack([message for (message,) in messages]), facts)
        return _node([self._decode(words[island], facts[island]) for island in range(self._num_islands)]), facts

    def _encoded(self, before: Tensors, after: Tensors, errors: Tensors) -> tuple[tf.Tensor, Tensors]:
        wanted = [new - old + error for old, new, error in zip(before, after, errors, strict=True)]
        words = self._encoding.encode(wanted)
        sent = self._encoding.decode(words)
        return words, [value - each for value, each in zip(wanted, sent, strict=True)]

    def _weighted(self, words: tf.Tensor, tokens: tf.Tensor) -> Tensors:
        return [change * tokens for change in self._encoding.decode(words)]


def _weighted_change(before: Tensors, after: Tensors, tokens: tf.Tensor) -> Tensors:
    return [(new - old) * tokens for old, new in zip(before, after, strict=True)]


def _node(terms: Sequence[Tensors]) -> Tensors:
    """The sum over islands that follow one another: a node of the tree over all of them."""
    return list(terms[0]) if len(terms) == 1 else [sum_in_tree(each) for each in zip(*terms, strict=True)]
