"""Where KerasHub's file of weights (`model.weights.h5`) keeps each weight of a GPT.

Keras names a layer in it by its class and its number among the layers of that class, and a variable by its number.

Qwen3 of KerasHub 0.32 normalises queries and keys with an epsilon of 1e-5, whatever its configuration says, and we with
that of all norms, e. What is normalised may be scaled, so the difference goes into the kernel that makes it: s * x with
e is x with e / s**2.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from tfdp.config.sections import ModelConfig
from tfdp.interop.keras_hub_backbones import BACKBONES, Backbone

_QK_EPSILON = 1e-5


@dataclass(frozen=True)
class Place:
    """The tensors of a file that make a weight: side by side along its last axis, each in a shape of its own.

    Attributes:
      addresses: of the tensors.
      shapes: of each; a share of the weight has the same numbers in the same order.
      widths: of each along the last axis of the weight.
      factors: by which each tensor is multiplied to be its share.
      is_vector: whether the weight has one axis.
      transposed: whether the tensor is the transpose of the weight.
    """

    addresses: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    widths: tuple[int, ...]
    factors: tuple[float, ...] = (1.0, 1.0, 1.0)
    is_vector: bool = False
    transposed: bool = False

    def split(self, weight: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """The tensors of a weight, by address."""
        shares = np.split(weight, np.cumsum(self.widths)[:-1], axis=-1)
        for address, shape, share, factor in zip(self.addresses, self.shapes, shares, self.factors, strict=False):
            scaled = share if factor == 1 else share / np.float32(factor)
            yield address, (scaled.T if self.transposed else scaled).reshape(shape)

    def join(self, tensors: list[np.ndarray]) -> np.ndarray:
        """The weight that the tensors make."""
        if self.transposed:
            return tensors[0].T
        rows = () if self.is_vector else (-1,)
        shares = [
            tensor.reshape(*rows, width) if factor == 1 else tensor.reshape(*rows, width) * np.float32(factor)
            for tensor, width, factor in zip(tensors, self.widths, self.factors, strict=False)
        ]
        return shares[0] if len(shares) == 1 else np.concatenate(shares, axis=-1)


def places(backbone: Backbone, model: ModelConfig, vocab_size: int) -> dict[str, Place]:
    """Where a file of weights keeps each weight of a GPT, by its name."""
    dim, table = model.model_dim, (vocab_size, model.model_dim)
    found = {"token_embedding": _place("layers/reversible_embedding/vars/0", table)}
    if backbone.is_gpt2:
        found["position_embedding"] = _place("layers/position_embedding/vars/0", (model.context_length, dim))
    if not model.tie_embeddings:
        found["output_embedding"] = Place(
            ("layers/reversible_embedding/vars/1",), (table[::-1],), (dim,), transposed=True
        )
    for index in range(model.num_layers):
        theirs = f"layers/{backbone.layers}" + (f"_{index}" if index else "")
        block = _gpt2_block(model, theirs) if backbone.is_gpt2 else _rotary_block(backbone, model, theirs)
        found |= {f"block_{index}/{name}": place for name, place in block}
    return found | {
        f"output_norm/{name}": place for name, place in _norm(f"layers/{backbone.final_norm}", backbone, dim)
    }


def _place(address: str, shape: tuple[int, ...]) -> Place:
    return Place((address,), (shape,), (shape[-1],), is_vector=len(shape) == 1)


def _norm(address: str, backbone: Backbone, dim: int) -> Iterator[tuple[str, Place]]:
    yield "gain", _place(f"{address}/vars/0", (dim,))
    if backbone.is_gpt2:
        yield "bias", _place(f"{address}/vars/1", (dim,))


def _attention(model: ModelConfig, theirs: str, prefix: str, bias: bool) -> Iterator[tuple[str, Place]]:
    """The projections: theirs keep heads on an axis of their own."""
    width = model.dim_per_head
    heads = (model.num_heads, model.kv_heads, model.kv_heads)
    widths = tuple(number * width for number in heads)
    joint = [f"{theirs}/{prefix}{each}_dense/vars" for each in ("query", "key", "value")]
    shapes = tuple((model.model_dim, number, width) for number in heads)
    scale = math.sqrt(model.norm_epsilon / _QK_EPSILON) if model.qk_norm else 1.0
    yield "query_key_value/kernel", Place(tuple(f"{each}/0" for each in joint), shapes, widths, (scale, scale, 1.0))
    if bias:
        shapes_of_bias = tuple((number, width) for number in heads)
        yield (
            "query_key_value/bias",
            Place(tuple(f"{each}/1" for each in joint), shapes_of_bias, widths, is_vector=True),
        )
    shape = (model.num_heads, width, model.model_dim)
    yield "output_projection/kernel", _place(f"{theirs}/{prefix}output_dense/vars/0", shape)


def _gpt2_block(model: ModelConfig, theirs: str) -> Iterator[tuple[str, Place]]:
    dim, hidden, backbone = model.model_dim, model.hidden_dim, BACKBONES["GPT2"]
    attention = f"{theirs}/_self_attention_layer"
    for name, place in _attention(model, attention, "", bias=True):
        yield f"attention/{name}", place
    yield "attention/output_projection/bias", _place(f"{attention}/output_dense/vars/1", (dim,))
    for own, norm in (("attention_norm", "_self_attention_layer_norm"), ("mlp_norm", "_feedforward_layer_norm")):
        for name, place in _norm(f"{theirs}/{norm}", backbone, dim):
            yield f"{own}/{name}", place
    for own, layer, shape in (
        ("expand", "_feedforward_intermediate_dense", (dim, hidden)),
        ("contract", "_feedforward_output_dense", (hidden, dim)),
    ):
        yield f"mlp/{own}/kernel", _place(f"{theirs}/{layer}/vars/0", shape)
        yield f"mlp/{own}/bias", _place(f"{theirs}/{layer}/vars/1", shape[1:])


def _rotary_block(backbone: Backbone, model: ModelConfig, theirs: str) -> Iterator[tuple[str, Place]]:
    dim, hidden = model.model_dim, model.hidden_dim
    attention = f"{theirs}/_self_attention_layer"
    for name, place in _attention(model, attention, "_", model.has_qkv_bias):
        yield f"attention/{name}", place
    if model.qk_norm:
        for each in ("query", "key"):
            address = f"{attention}/_{each}_dense_layer_norm/vars/0"
            yield f"attention/{each}_norm/gain", _place(address, (model.dim_per_head,))
    yield "attention_norm/gain", _place(f"{theirs}/_self_attention_layernorm/vars/0", (dim,))
    yield "mlp_norm/gain", _place(f"{theirs}/_feedforward_layernorm/vars/0", (dim,))
    gates = tuple(f"{theirs}/_feedforward_{each}_dense/vars/0" for each in ("gate", "intermediate"))
    yield "mlp/expand/kernel", Place(gates, ((dim, hidden),) * 2, (hidden, hidden))
    yield "mlp/contract/kernel", _place(f"{theirs}/_feedforward_output_dense/vars/0", (hidden, dim))
