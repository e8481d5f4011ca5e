"""Classes of texts, by a model that was trained on the recipe `classification`."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfdp.inference.scoring import padded
from tfdp.ops.visibility import CAUSAL


class ClassScorer:
    """Probabilities of the classes of texts.

    Args:
      model: of the recipe.
      task: `tasks.classification.Classification`.
      rows: texts in one forward pass.
    """

    def __init__(self, model: Any, task: Any, rows: int) -> None:
        self._model, self._task, self._rows = model, task, rows
        self._context_length: int = model.config.context_length
        self._forward = tf.function(self._probabilities, autograph=False)

    def probabilities(self, texts: Sequence[Sequence[int]]) -> Iterator[np.ndarray]:
        """Yields the probabilities of the classes of each text, (classes,), in order.

        Args:
          texts: the ids before the label, one at least each; of longer ones the last context_length are seen.
        """
        for start in range(0, len(texts), self._rows):
            share = [list(ids)[-self._context_length :] for ids in texts[start : start + self._rows]]
            tokens = padded(share, self._context_length)
            last = np.array([len(ids) - 1 for ids in share], np.int32)
            yield from self._forward(tf.constant(tokens), tf.constant(last)).numpy()

    def _probabilities(self, tokens: tf.Tensor, last: tf.Tensor) -> tf.Tensor:
        features = tf.gather(self._model.features(tokens, None, CAUSAL), last[:, tf.newaxis], batch_dims=1)
        return tf.nn.softmax(self._task.scores(features, self._model.output_table))[:, 0]
