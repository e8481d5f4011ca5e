"""Causal language modelling: each token of a row from those before it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import tensorflow as tf

from tfdp.ops.visibility import ByDocument
from tfdp.tasks.task import Batch, LanguageModel, LossFunction, Metric, Rows, row_losses, source_losses


@dataclass(frozen=True)
class CausalLM:
    """Next-token prediction.

    Attributes:
      document_start: the token id at which attention starts anew; None: nowhere in a row.
    """

    best: ClassVar[str] = "loss"
    best_is_lowest: ClassVar[bool] = True
    document_start: int | None = None

    def batch(self, rows: Rows) -> Batch:
        """All tokens but the last, and all but the first. An absent one is input 0, and no target."""
        tokens = rows["tokens"]
        inputs, targets = inputs_and_targets(tokens)
        if self.document_start is None:
            return Batch(inputs, targets)
        return Batch(inputs, targets, ByDocument(tokens[:, :-1] == self.document_start))

    def metrics(self, totals: Mapping[str, float]) -> dict[str, Metric]:
        loss = totals["loss"] / totals["targets"] if totals["targets"] else math.nan
        bits = totals["loss"] / math.log(2) / totals["bytes"]
        return {
            "loss": Metric(loss, f"loss {loss:.4f}"),
            "perplexity": Metric(perplexity(loss), f"perplexity {perplexity(loss):.2f}", is_recorded=False),
            "bits_per_byte": Metric(bits, f"{bits:.4f} bits per byte"),
        }


def perplexity(loss: float) -> float:
    """exp of a loss in nats per token; infinite where that is too large for a float."""
    return math.exp(loss) if loss < 700 else math.inf


def inputs_and_targets(tokens: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Splits windows (rows, time + 1) into inputs and next-token targets, (rows, time) each.

    Absent tokens (negative) become input 0, and stay negative as targets: they are not valid.
    """
    return tf.maximum(tokens[:, :-1], 0), tokens[:, 1:]


def next_token_losses(
    model: LanguageModel,
    dropout_seed: int | None = None,
    document_start: int | None = None,
    chunk_size: int | None = None,
    fuse: bool = False,
) -> LossFunction:
    """The losses and counts of each row; see `task.row_losses`."""
    return row_losses(CausalLM(document_start), model, dropout_seed, chunk_size, fuse)


def next_token_loss(
    model: LanguageModel,
    dropout_seed: int | None = None,
    document_start: int | None = None,
    num_sources: int = 1,
    chunk_size: int | None = None,
    fuse: bool = False,
) -> LossFunction:
    """The losses and counts of each source; see `task.source_losses`."""
    return source_losses(next_token_losses(model, dropout_seed, document_start, chunk_size, fuse), num_sources)
