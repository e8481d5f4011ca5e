"""The weights of a model by their configuration alone: shapes and numbers, before there is a model."""

import math
import sys
from collections.abc import Mapping

from tfdp.config.sections import ModelConfig
from tfdp.models.lora import is_adapter

Shapes = Mapping[str, tuple[int, ...]]

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def weight_shapes(config: ModelConfig, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """The shape of each variable of a `gpt.GPT` but those of adapters (`lora.adapter_shapes`), by its name."""
    dim, hidden, table = config.model_dim, config.hidden_dim, (config.vocab_size or vocab_size, config.model_dim)
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

    def linear(name: str, num_inputs: int, num_outputs: int, bias: bool = config.use_bias) -> None:
        shapes[f"{name}/kernel"] = (num_inputs, num_outputs)
        if bias:
            shapes[f"{name}/bias"] = (num_outputs,)

    for index in range(config.num_layers):
        block = f"block_{index}"
        norm(f"{block}/attention_norm")
        linear(f"{block}/attention/query_key_value", dim, fused_width(config), config.has_qkv_bias)
        if config.qk_norm_gain:
            for each in ("query", "key"):
                shapes[f"{block}/attention/{each}_norm/gain"] = (config.dim_per_head,)
        linear(f"{block}/attention/output_projection", config.attention_dim, dim)
        norm(f"{block}/mlp_norm")
        linear(f"{block}/mlp/expand", dim, wide_dim(config))
        linear(f"{block}/mlp/contract", hidden, dim)
    norm("output_norm")
    return shapes


def largest_matrix(shapes: Shapes) -> int:
    """Numbers of the largest matrix that features are multiplied with; 0 where no shape is known."""
    return max((math.prod(shape) for shape in shapes.values()), default=0)


def trained(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """The shapes of the weights that are trained: of adapters alone, where there are any."""
    adapters = {name: shape for name, shape in shapes.items() if is_adapter(name)}
    return adapters or dict(shapes)


def gradient_size(shapes: Shapes) -> int:
    """Numbers of a gradient; where no shape is known, so many that two at a time need a reason."""
    return num_params(trained(shapes)) if shapes else sys.maxsize


def num_params(shapes: Shapes) -> int:
    """How many numbers the shapes hold."""
    return sum(math.prod(shape) for shape in shapes.values())


def fused_width(config: ModelConfig) -> int:
    return (config.num_heads + 2 * config.kv_heads) * config.dim_per_head


def wide_dim(config: ModelConfig) -> int:
    return config.hidden_dim * (2 if config.activation == "swiglu" else 1)
