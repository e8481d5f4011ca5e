"""Low-rank adapters on paper: which matrix products have them, their shapes, and how they merge into the weights.

LoRA (Hu et al. 2021): a product x W becomes x W + s (x A) B, where A (inputs, rank) and B (rank, outputs) are trained
and W is frozen. B starts at zero, so training starts from the model as it was. This module needs no TensorFlow.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from tfdp.config.sections import ModelConfig
from tfdp.system.lazy import Lazy

FOLDER = "lora"  # in the paths of adapters: block_0/mlp/contract/lora/down_a


@dataclass(frozen=True)
class AdaptedLayer:
    """A matrix product of a block, some of whose outputs have adapters.

    Attributes:
      name: of the layer within its block.
      num_inputs: rows of its kernel.
      widths: of all shares of its outputs, in order: those of queries, keys and values, say.
      targets: the shares that have an adapter.
    """

    name: str
    num_inputs: int
    widths: Mapping[str, int]
    targets: tuple[str, ...]


def adapted_layers(config: ModelConfig) -> dict[str, AdaptedLayer]:
    """The layers of each block that have adapters, by name; none without `lora_rank`."""
    width, hidden = config.dim_per_head, config.hidden_dim
    query, key = config.num_heads * width, config.kv_heads * width
    gated = {"gate": hidden} if config.activation == "swiglu" else {}
    shares = {
        "attention/query_key_value": (config.model_dim, {"query": query, "key": key, "value": key}),
        "attention/output_projection": (config.attention_dim, {"output": config.model_dim}),
        "mlp/expand": (config.model_dim, {**gated, "up": hidden}),
        "mlp/contract": (hidden, {"down": config.model_dim}),
    }
    layers = (
        AdaptedLayer(name, num_inputs, widths, tuple(each for each in widths if each in config.adapted_targets))
        for name, (num_inputs, widths) in shares.items()
    )
    return {layer.name: layer for layer in layers if layer.targets}


def scale(config: ModelConfig) -> float:
    """What the product with A and B is multiplied by; with `lora_rank_stabilised` as rsLoRA (Kalajdzievski 2023)."""
    rank = config.lora_rank or 1
    return config.adapter_alpha / (math.sqrt(rank) if config.lora_rank_stabilised else rank)


def adapter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of each A and B of a model, by the name of its variable."""
    rank = config.lora_rank or 0
    shapes: dict[str, tuple[int, ...]] = {}
    for path, layer in _layers(config):
        for target in layer.targets:
            shapes[f"{path}/{FOLDER}/{target}_a"] = (layer.num_inputs, rank)
            shapes[f"{path}/{FOLDER}/{target}_b"] = (rank, layer.widths[target])
    return shapes


def is_adapter(name: str) -> bool:
    """Whether a weight is an A or a B, by its name."""
    return f"/{FOLDER}/" in name


def merged_model(config: ModelConfig) -> ModelConfig:
    """The same model without adapters."""
    none: dict[str, Any] = {field.name: field.default for field in fields(config) if field.name.startswith("lora_")}
    return replace(config, **none)


def merged(config: ModelConfig, weights: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """The weights of the model without adapters that computes the same, W + s A B; each made when it is asked for."""
    layers = {f"{path}/kernel": (path, layer) for path, layer in _layers(config)}

    def read(name: str) -> np.ndarray:
        if name not in layers:
            return weights[name]
        path, layer = layers[name]
        kernel = np.array(weights[name], np.float64)
        ends = np.cumsum(list(layer.widths.values()))
        for (target, width), end in zip(layer.widths.items(), ends, strict=True):
            if target in layer.targets:
                a, b = (weights[f"{path}/{FOLDER}/{target}_{each}"].astype(np.float64) for each in "ab")
                kernel[:, end - width : end] += scale(config) * (a @ b)
        return kernel.astype(np.float32)

    return Lazy((name for name in weights if not is_adapter(name)), read)


def _layers(config: ModelConfig) -> Iterator[tuple[str, AdaptedLayer]]:
    """Each adapted layer of each block, with its path in the model."""
    layers = adapted_layers(config)
    return ((f"block_{index}/{name}", layer) for index in range(config.num_layers) for name, layer in layers.items())
