"""Which tensors of a Hugging Face folder make which weight of a GPT.

A weight of ours is one tensor of theirs, or several side by side: queries, keys and values are one product here, and so
are gate and value of SwiGLU. `nn.Linear` keeps (outputs, inputs), the transpose of a kernel; GPT-2's layers do not.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from tfdp.config.sections import ModelConfig
from tfdp.interop.architectures import Architecture


@dataclass(frozen=True)
class Origin:
    """The tensors that make a weight: side by side along the last axis, in order.

    Attributes:
      names: of the tensors.
      widths: of each along the last axis of the weight.
      transposed: whether each is the transpose of its share.
    """

    names: tuple[str, ...]
    widths: tuple[int, ...]
    transposed: bool = False

    def split(self, weight: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """The tensors of a weight, by name."""
        ends = np.cumsum(self.widths)[:-1]
        for name, share in zip(self.names, np.split(weight, ends, axis=-1), strict=True):
            yield name, share.T if self.transposed else share

    def join(self, tensors: list[np.ndarray]) -> np.ndarray:
        """The weight that the tensors make; a single one is not copied."""
        shares = [tensor.T for tensor in tensors] if self.transposed else tensors
        return shares[0] if len(shares) == 1 else np.concatenate(shares, axis=-1)

    def shapes(self, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
        """The shape of each tensor of a weight of this shape."""
        shares = [(*shape[:-1], width) for width in self.widths]
        return [share[::-1] for share in shares] if self.transposed else shares


def origins(architecture: Architecture, model: ModelConfig) -> dict[str, Origin]:
    """The tensors of each weight of a GPT, by its name."""
    return dict(_gpt2(model) if architecture.model_type == "gpt2" else _llama(model))


def _gpt2(model: ModelConfig) -> Iterator[tuple[str, Origin]]:
    dim, hidden = model.model_dim, model.hidden_dim

    def layer(name: str, theirs: str, width: int, matrix: str) -> Iterator[tuple[str, Origin]]:
        yield f"{name}/{matrix}", Origin((f"transformer.{theirs}.weight",), (width,))
        yield f"{name}/bias", Origin((f"transformer.{theirs}.bias",), (width,))

    yield "token_embedding", Origin(("transformer.wte.weight",), (dim,))
    yield "position_embedding", Origin(("transformer.wpe.weight",), (dim,))
    if not model.tie_embeddings:
        yield "output_embedding", Origin(("lm_head.weight",), (dim,))
    for index in range(model.num_layers):
        own, theirs = f"block_{index}", f"h.{index}"
        yield from layer(f"{own}/attention_norm", f"{theirs}.ln_1", dim, "gain")
        yield from layer(f"{own}/attention/query_key_value", f"{theirs}.attn.c_attn", 3 * dim, "kernel")
        yield from layer(f"{own}/attention/output_projection", f"{theirs}.attn.c_proj", dim, "kernel")
        yield from layer(f"{own}/mlp_norm", f"{theirs}.ln_2", dim, "gain")
        yield from layer(f"{own}/mlp/expand", f"{theirs}.mlp.c_fc", hidden, "kernel")
        yield from layer(f"{own}/mlp/contract", f"{theirs}.mlp.c_proj", dim, "kernel")
    yield from layer("output_norm", "ln_f", dim, "gain")


def _llama(model: ModelConfig) -> Iterator[tuple[str, Origin]]:
    dim, hidden, width = model.model_dim, model.hidden_dim, model.dim_per_head
    heads = (model.num_heads * width, model.kv_heads * width, model.kv_heads * width)

    def linear(name: str, theirs: list[str], widths: tuple[int, ...], bias: bool) -> Iterator[tuple[str, Origin]]:
        yield f"{name}/kernel", Origin(tuple(f"{each}.weight" for each in theirs), widths, transposed=True)
        if bias:
            yield f"{name}/bias", Origin(tuple(f"{each}.bias" for each in theirs), widths)

    yield "token_embedding", Origin(("model.embed_tokens.weight",), (dim,))
    if not model.tie_embeddings:
        yield "output_embedding", Origin(("lm_head.weight",), (dim,))
    for index in range(model.num_layers):
        own, theirs = f"block_{index}", f"model.layers.{index}"
        attention, mlp = f"{theirs}.self_attn", f"{theirs}.mlp"
        yield f"{own}/attention_norm/gain", Origin((f"{theirs}.input_layernorm.weight",), (dim,))
        joint = [f"{attention}.{each}_proj" for each in "qkv"]
        yield from linear(f"{own}/attention/query_key_value", joint, heads, model.has_qkv_bias)
        if model.qk_norm:
            yield f"{own}/attention/query_norm/gain", Origin((f"{attention}.q_norm.weight",), (width,))
            yield f"{own}/attention/key_norm/gain", Origin((f"{attention}.k_norm.weight",), (width,))
        yield from linear(f"{own}/attention/output_projection", [f"{attention}.o_proj"], (dim,), model.use_bias)
        yield f"{own}/mlp_norm/gain", Origin((f"{theirs}.post_attention_layernorm.weight",), (dim,))
        gates = [f"{mlp}.gate_proj", f"{mlp}.up_proj"]
        yield from linear(f"{own}/mlp/expand", gates, (hidden, hidden), model.use_bias)
        yield from linear(f"{own}/mlp/contract", [f"{mlp}.down_proj"], (dim,), model.use_bias)
    yield "output_norm/gain", Origin(("model.norm.weight",), (dim,))


def without_aliases(names: Mapping[str, object]) -> dict[str, str]:
    """Names of a file by the names of today: GPT-2's first files have no "transformer." in front."""
    renamed = {}
    for name in names:
        old = name.startswith(("wte.", "wpe.", "h.", "ln_f."))
        renamed[f"transformer.{name}" if old else name] = name
    return renamed
