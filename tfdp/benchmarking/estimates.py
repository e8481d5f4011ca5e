"""Costs on paper: what a run will take, before it is run."""

import math
from dataclasses import dataclass

from tfdp.config.sections import DistributionConfig, ModelConfig, OptimizerConfig, TrainingConfig
from tfdp.models.dimensions import BYTES, Shapes, fused_width, num_params, weight_shapes, wide_dim
from tfdp.ops.chunking import loss_chunk_size, query_blocks
from tfdp.ops.packing import count_words


def num_state_numbers(config: OptimizerConfig, shapes: Shapes) -> int:
    """How many numbers the optimizer keeps besides the weights."""
    total = num_params(shapes)
    if config.name in ("adamw", "adam"):
        return 2 * total
    if config.name in ("momentum", "rmsprop", "lion"):
        return total
    if config.name == "muon":  # a momentum for all, and a second moment where Adam does the update
        return 2 * total - sum(math.prod(shape) for name, shape in shapes.items() if name.endswith("/kernel"))
    if config.name == "adafactor":  # sums of rows and of columns for each matrix, and a second moment for all
        return total + sum(sum(shape) if len(shape) > 1 else 2 for shape in shapes.values())
    return 0


def flops_per_token(config: ModelConfig, vocab_size: int) -> int:
    """Floating-point operations of forward and backward for one token, as `gpt.GPT.flops_per_token` counts them."""
    kernels = sum(
        math.prod(shape) for name, shape in weight_shapes(config, vocab_size).items() if name.endswith("/kernel")
    )
    attention = 6 * config.num_layers * (config.context_length + 1) * config.attention_dim
    return 6 * (kernels + (config.vocab_size or vocab_size) * config.model_dim) + attention


def activation_bytes(config: ModelConfig, training: TrainingConfig, vocab_size: int, num_rows: int) -> int:
    """What a forward pass over `num_rows` sequences keeps for its backward pass, and the logits of one chunk."""
    each, num_tokens = BYTES[training.precision], num_rows * config.context_length
    dim = config.model_dim
    num_weights = sum((end - begin) * end for begin, end in query_blocks(config.context_length))  # of attention
    block = 5 * dim + fused_width(config) + config.num_heads * num_weights // config.context_length
    block += wide_dim(config) + config.hidden_dim
    if config.qk_norm or config.position == "rope":  # queries and keys before and after
        block += (config.num_heads + config.kv_heads) * config.dim_per_head
    kept = config.num_layers * (dim if training.remat else block) + (block if training.remat else 0)
    chunk = loss_chunk_size(training.loss_chunk_size, num_tokens, vocab_size)
    return each * num_tokens * kept + chunk * vocab_size * (4 + 4 + each)


def reduction_bytes(config: DistributionConfig, shapes: Shapes, num_replicas: int) -> int:
    """What each replica hands to a reduction: its gradients, or the changes of its islands."""
    if num_replicas == 1:
        return 0
    if config.synchronization == "every_step":
        return num_params(shapes) * BYTES[config.wire_dtype]
    if config.delta_dtype == "float32":  # summed over the islands of a replica
        return num_params(shapes) * BYTES["float32"]
    message = sum(sum(count_words(math.prod(shape), config.delta_dtype)) for shape in shapes.values())
    return config.num_islands // num_replicas * 4 * message


def network_seconds(config: DistributionConfig, num_bytes: int, num_workers: int, gbits_per_second: float) -> float:
    """The least time of a reduction to which each replica hands so many bytes, for one replica on each worker.

    A sum is a ring all-reduce, from each worker to the next (Patarasu and Yuan 2009); messages in few bits go from each
    worker to all others.
    """
    is_sum = config.synchronization == "every_step" or config.delta_dtype == "float32"
    sent = (2 / num_workers if is_sum else 1) * (num_workers - 1) * num_bytes
    return sent * 8 / (gbits_per_second * 1e9)


def num_island_numbers(config: DistributionConfig, num_trained: int, num_state: int, num_replicas: int) -> int:
    """Numbers that a replica keeps for its islands besides the weights and one optimizer state: 0 without islands.

    Of each island but the first, its optimizer state; of all, a round's new weights and new state beside the old; the
    outer momentum; what messages have lost.
    """
    if config.synchronization == "every_step":
        return 0
    num_local, errors, momentum = config.num_islands // num_replicas, *_errors_and_momentum(config, num_trained)
    return (2 * num_local - 1) * num_state + num_local * (num_trained + 2 * errors) + momentum


def num_stored_island_numbers(config: DistributionConfig, num_trained: int, num_state: int) -> int:
    """Numbers of a checkpoint for all islands besides the weights and one optimizer state: 0 without islands."""
    if config.synchronization == "every_step":
        return 0
    errors, momentum = _errors_and_momentum(config, num_trained)
    return (config.num_islands - 1) * num_state + config.num_islands * errors + momentum


def _errors_and_momentum(config: DistributionConfig, num_trained: int) -> tuple[int, int]:
    """Numbers of what the messages of one island have lost, and of the outer momentum."""
    errors = 0 if config.delta_dtype == "float32" else num_trained
    return errors, num_trained if config.outer_optimizer == "nesterov" else 0


@dataclass(frozen=True)
class Measured:
    """Steps of a model with a number of layers."""

    num_layers: int
    step_seconds: float
    peak_memory_bytes: int
    first_step_seconds: float

    def extended(self, other: "Measured", num_layers: int) -> "Measured":
        """The same with so many layers, on the line through two measured models.

        Every layer costs the same; embedding, projection, the update of their tables and the libraries are the rest.
        """
        if other.num_layers == self.num_layers:
            return self
        part = (num_layers - self.num_layers) / (other.num_layers - self.num_layers)
        return Measured(
            num_layers,
            self.step_seconds + part * (other.step_seconds - self.step_seconds),
            round(self.peak_memory_bytes + part * (other.peak_memory_bytes - self.peak_memory_bytes)),
            self.first_step_seconds + part * (other.first_step_seconds - self.first_step_seconds),
        )
