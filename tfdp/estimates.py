"""What a run will take, from its configuration alone: numbers of parameters, bytes and operations."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from tfdp.config import DistributionConfig, ModelConfig, OptimizerConfig, TrainingConfig

Shapes = Mapping[str, tuple[int, ...]]

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
LOGITS_BYTES = 128 << 20  # of float32 logits that stand in memory at once, unless the number of tokens is named


def weight_shapes(config: ModelConfig, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """The shape of each trainable variable of a `gpt.GPT`, by its name."""
    dim, hidden, table = config.model_dim, config.hidden_dim, (vocab_size, config.model_dim)
    has_norm_bias = config.norm == "layer_norm" and config.use_bias
    shapes: dict[str, tuple[int, ...]] = {"token_embedding": table}
    if config.position == "learned":
        shapes["position_embedding"] = (config.context_length, dim)
    if not config.tie_embeddings:
        shapes["output_embedding"] = table

    def norm(name: str) -> None:
        shapes[f"{name}/gain"] = (dim,)
        if has_norm_bias:
            shapes[f"{name}/bias"] = (dim,)

    def linear(name: str, num_inputs: int, num_outputs: int) -> None:
        shapes[f"{name}/kernel"] = (num_inputs, num_outputs)
        if config.use_bias:
            shapes[f"{name}/bias"] = (num_outputs,)

    for index in range(config.num_layers):
        block = f"block_{index}"
        norm(f"{block}/attention_norm")
        linear(f"{block}/attention/query_key_value", dim, _fused_width(config))
        linear(f"{block}/attention/output_projection", dim, dim)
        norm(f"{block}/mlp_norm")
        linear(f"{block}/mlp/expand", dim, _wide_dim(config))
        linear(f"{block}/mlp/contract", hidden, dim)
    norm("output_norm")
    return shapes


def largest_matrix(shapes: Shapes) -> int:
    """Numbers of the largest matrix that features are multiplied with."""
    return max(math.prod(shape) for shape in shapes.values())


def num_params(shapes: Shapes) -> int:
    """How many numbers are trained."""
    return sum(math.prod(shape) for shape in shapes.values())


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
    attention = 12 * config.num_layers * config.context_length * config.model_dim
    return 6 * (kernels + vocab_size * config.model_dim) + attention


def activation_bytes(config: ModelConfig, training: TrainingConfig, vocab_size: int, num_rows: int) -> int:
    """What a forward pass over `num_rows` sequences keeps for its backward pass, and the logits of one chunk."""
    each, num_tokens = BYTES[training.precision], num_rows * config.context_length
    dim = config.model_dim
    num_weights = sum((end - begin) * end for begin, end in query_blocks(config.context_length))  # of attention
    block = 5 * dim + _fused_width(config) + config.num_heads * num_weights // config.context_length
    block += _wide_dim(config) + config.hidden_dim
    if config.qk_norm or config.position == "rope":  # queries and keys before and after
        block += (config.num_heads + config.kv_heads) * config.head_dim
    kept = config.num_layers * (dim if training.remat else block) + (block if training.remat else 0)
    chunk = loss_chunk_size(training.loss_chunk_size, num_tokens, vocab_size)
    return each * num_tokens * kept + chunk * vocab_size * (4 + 4 + each)


def loss_chunk_size(wanted: int | None, num_tokens: int, vocab_size: int) -> int:
    """Tokens whose logits stand in memory at once, from `training.loss_chunk_size`: 0 wants all of them.

    None wants all if their logits in float32 fit into `LOGITS_BYTES`, else a power of two that takes half of that at
    most: each chunk adds to the gradient of the whole table, but its logits and their gradients are soon most of a
    step's memory, in each micro-batch that is computed side by side.
    """
    if wanted is not None:
        return min(num_tokens, wanted or num_tokens)
    most = LOGITS_BYTES // (4 * vocab_size)
    return num_tokens if num_tokens <= most else 1 << max(0, (most // 2).bit_length() - 1)


def query_blocks(num_queries: int) -> list[tuple[int, int]]:
    """How causal attention takes its queries, (begin, end) of each block: at most 4 of at least 128 each.

    A block is multiplied with the keys up to its end: 5/8 of all products with 4 blocks, 3/4 with 2. Smaller blocks
    would save more products, and cost it again where they are cut and put together.
    """
    count = max(1, min(4, num_queries // 128))
    bounds = [index * num_queries // count for index in range(count + 1)]
    return list(pairwise(bounds))


def reduction_bytes(config: DistributionConfig, shapes: Shapes, num_replicas: int) -> int:
    """What each replica hands to the reduction of a step: its gradients."""
    return num_params(shapes) * BYTES[config.wire_dtype] if num_replicas > 1 else 0


def network_seconds(num_bytes: int, num_workers: int, gbits_per_second: float) -> float:
    """The least time of a ring all-reduce of so many bytes, from each worker to the next (Patarasu and Yuan 2009)."""
    return 2 * (num_workers - 1) / num_workers * num_bytes * 8 / (gbits_per_second * 1e9)


def duration(seconds: float) -> str:
    """Seconds as people say them: 38s, 4m05s, 2h10m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def _fused_width(config: ModelConfig) -> int:
    return (config.num_heads + 2 * config.kv_heads) * config.head_dim


def _wide_dim(config: ModelConfig) -> int:
    return config.hidden_dim * (2 if config.activation == "swiglu" else 1)


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
