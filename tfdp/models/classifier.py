"""A GPT with a row of scores for each class, in place of its projection to the vocabulary."""

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfdp.config.sections import ModelConfig
from tfdp.models.gpt import GPT

CLASS_TABLE = "class_embedding"  # as the tables of tokens, which AdamW trains beside Muon


class Classifier(GPT):
    """Features as the GPT's, scored by a table (classes, dim) that starts at zero: all classes are equally likely.

    Args:
      num_classes: rows of the table.
      config, vocab_size, **options: those of `GPT`; given weights need not hold the table.
    """

    def __init__(
        self,
        num_classes: int,
        config: ModelConfig,
        vocab_size: int,
        given: Mapping[str, np.ndarray] | None = None,
        **options: Any,
    ) -> None:
        self._num_classes = num_classes
        super().__init__(config, vocab_size, given=given, **options)
        if config.lora_rank is not None:  # beside the adapters
            self.class_table.trainable = True

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        super().build(input_shape)
        shape = (self._num_classes, self.config.model_dim)
        self.class_table = self.add_weight(shape=shape, initializer=keras.initializers.Zeros(), name=CLASS_TABLE)

    def _assign_vectors(self, given: Mapping[str, np.ndarray]) -> None:
        if CLASS_TABLE in given:
            self.class_table.assign(given[CLASS_TABLE])
        super()._assign_vectors({**given, CLASS_TABLE: self.class_table.numpy()})

    @property
    def output_table(self) -> keras.Variable:
        """The scores of the classes."""
        return self.class_table

    def logits(self, features: tf.Tensor) -> tf.Tensor:
        """Those of the next token, which training leaves as they were: (batch, time, vocab_size)."""
        table = self.token_embedding if self.config.tie_embeddings else self.output_embedding
        flat = tf.reshape(features, [-1, self.config.model_dim])
        flat = tf.matmul(flat, tf.cast(tf.convert_to_tensor(table), flat.dtype), transpose_b=True)
        return tf.reshape(tf.cast(flat, tf.float32), [tf.shape(features)[0], tf.shape(features)[1], self.vocab_size])
