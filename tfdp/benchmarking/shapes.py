"""The models that are measured, and the tokens they are trained on: the same for every system."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from tfdp.data import corpus

_TEXT_BYTES = 2 << 20


@dataclass(frozen=True)
class Shape:
    """A GPT-2: learned positions, layer norm, GELU, biases, one table for input and output, no dropout."""

    name: str
    num_layers: int
    num_heads: int
    model_dim: int
    context_length: int
    num_rows: int  # sequences of a step, over all replicas
    vocab_size: int

    @property
    def num_tokens(self) -> int:
        """Targets of one step."""
        return self.num_rows * self.context_length

    @property
    def flops_per_token(self) -> int:
        """Of forward and backward, as `gpt.GPT.flops_per_token` counts them."""
        matrices = self.num_layers * 12 * self.model_dim**2 + self.vocab_size * self.model_dim
        return 6 * matrices + 6 * self.num_layers * (self.context_length + 1) * self.model_dim


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("tiny", 4, 4, 128, 64, 12, 65),
        Shape("baby", 6, 6, 384, 256, 8, 65),
        Shape("gpt2", 12, 12, 768, 256, 2, 50304),
        Shape("vocabulary", 4, 4, 128, 512, 8, 50304),  # whose logits would take 824 MB
    )
}


def token_ids(shape: Shape) -> np.ndarray:
    """Two MB of Python's standard library as ids below `vocab_size`: bytes or pairs of bytes, by how common they are.

    The rarest ones share the last id. Returns int32, flat.
    """
    text = b""
    for document in corpus.documents("python-stdlib"):
        text += document.text.encode()
        if len(text) >= _TEXT_BYTES:
            break
    units = np.frombuffer(text[:_TEXT_BYTES], np.uint8 if shape.vocab_size <= 256 else np.uint16)
    counts = np.bincount(units)
    ranks = np.empty(len(counts), np.int32)
    ranks[np.argsort(-counts, kind="stable")] = np.arange(len(counts))
    return np.minimum(ranks[units], shape.vocab_size - 1).astype(np.int32)


def windows(shape: Shape) -> np.ndarray:
    """The windows of `context_length + 1` tokens that training draws from, (windows, context_length + 1), int32."""
    ids, length = token_ids(shape), shape.context_length
    return np.lib.stride_tricks.sliding_window_view(ids, length + 1)[::length]


def shuffled_batches(shape: Shape, num_rows: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Endless batches of windows in random order, for systems without a pipeline of their own."""
    rows, generator = windows(shape), np.random.default_rng(seed)
    while True:
        order = generator.permutation(len(rows))
        for start in range(0, len(order) - num_rows + 1, num_rows):
            yield rows[order[start : start + num_rows]]
