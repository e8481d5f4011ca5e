"""Positions of tokens, and how far rotary embedding turns queries and keys there (Su et al. 2021)."""

import functools
import math
from dataclasses import dataclass

import numpy as np
import tensorflow as tf

from tfdp.config.sections import ModelConfig


@dataclass(frozen=True)
class Rotation:
    """Cosines and sines of positions, float32 (..., time, head_dim / 2) each.

    No tuple, and given by its name: of those Keras would cast the tensors to the type of the products.
    """

    cosines: tf.Tensor
    sines: tf.Tensor


def positions_of(slots: tf.Tensor, padding: tf.Tensor | None, context_length: int) -> tf.Tensor:
    """Positions of the tokens in slots of a cache: (time,), or (batch, time) behind padding (batch,).

    What is no token, padding or what follows the end of a text, gets some position that the tables have.
    """
    return slots if padding is None else tf.clip_by_value(slots - padding[:, tf.newaxis], 0, context_length - 1)


def rotary_tables(length: int, head_dim: int, frequencies: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines of rotary positions (Su et al. 2021): float32, (length, head_dim / 2) each.

    Args:
      frequencies: radians per token, (head_dim / 2,); None: those of the base 10,000.
    """
    if frequencies is None:
        frequencies = 10_000.0 ** (-np.arange(0, head_dim, 2) / head_dim)
    angles = np.arange(length)[:, None] * frequencies[None, :]
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def rotary_frequencies(config: ModelConfig) -> np.ndarray:
    """Radians per token of each pair of numbers of a head, stretched as `rope_scaling` says, (head_dim / 2,).

    linear: Chen et al. 2023, "Extending context window of large language models via positional interpolation"; llama3:
    the Llama 3.1 models (Grattafiori et al. 2024), between whose two wavelengths the stretch grows smoothly.
    """
    frequencies = config.rope_theta ** (-np.arange(0, config.dim_per_head, 2) / config.dim_per_head)
    if config.rope_scaling == "none":
        return frequencies
    stretched = frequencies / config.rope_scaling_factor
    if config.rope_scaling == "linear":
        return stretched
    low, high = config.rope_low_frequency_factor, config.rope_high_frequency_factor
    periods = config.rope_original_context_length * frequencies / (2 * math.pi)  # in the context of pretraining
    kept = np.clip((periods - low) / (high - low), 0.0, 1.0)
    return (1 - kept) * stretched + kept * frequencies


@functools.lru_cache(maxsize=2)
def _tables_of(config: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """The rotary tables that all layers of a model share: 2 MiB each layer with 8,192 tokens and heads of 64."""
    return rotary_tables(config.context_length, config.dim_per_head, rotary_frequencies(config))


def rotation_at(config: ModelConfig, positions: tf.Tensor) -> Rotation | None:
    """How far queries and keys at some positions are turned, (time,) or (batch, time); None without rotary positions.

    All layers share it: looked up by each, the tables would stand in a graph once for each look-up.
    """
    if config.position != "rope":
        return None
    cosines, sines = (tf.gather(table, positions) for table in _tables_of(config))
    if positions.shape.rank == 2:  # all heads of a row share its positions
        return Rotation(cosines[:, tf.newaxis], sines[:, tf.newaxis])
    return Rotation(cosines, sines)
