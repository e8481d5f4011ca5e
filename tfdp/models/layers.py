"""The layers of the GPT. Shapes: (batch, time, dim)."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from tfdp.config.sections import ModelConfig
from tfdp.models.adapters import Adapter, make_adapter
from tfdp.models.dropout import KeyedDropout
from tfdp.models.initializers import Initializers
from tfdp.models.positions import Rotation
from tfdp.ops.kernels import Kernels

# ---------------------------------------------------------------------------------------------------
# Parts
# ---------------------------------------------------------------------------------------------------


class Linear(keras.layers.Layer):
    """x @ kernel (+ bias) over the last axis; one matrix product whatever the leading axes.

    Args:
      adapter: adds its own output; None: there is none.
    """

    def __init__(
        self, num_outputs: int, use_bias: bool, initializer: object, adapter: Adapter | None = None, **kwargs: object
    ) -> None:
        super().__init__(**kwargs)
        self.num_outputs, self.use_bias, self.initializer = num_outputs, use_bias, initializer
        self.adapter = adapter

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self.kernel = self.add_weight(
            shape=(input_shape[-1], self.num_outputs), initializer=self.initializer, name="kernel"
        )
        if self.use_bias:
            self.bias = self.add_weight(shape=(self.num_outputs,), initializer="zeros", name="bias")
        if self.adapter is not None:
            self.adapter.build(input_shape)

    def call(self, x: tf.Tensor, dropout_keys: tf.Tensor | None = None) -> tf.Tensor:
        y = tf.matmul(tf.reshape(x, [-1, x.shape[-1]]), tf.convert_to_tensor(self.kernel))
        if self.use_bias:
            y = y + self.bias
        if self.adapter is not None:
            y = y + self.adapter(x, dropout_keys)
        return tf.reshape(y, [tf.shape(x)[0], tf.shape(x)[1], self.num_outputs])


class Norm(keras.layers.Layer):
    """Layer norm or RMS norm over the last axis, computed in float32 under every precision."""

    def __init__(self, config: ModelConfig, kernels: Kernels, kind: str = "", **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.epsilon = config.norm_epsilon
        self.center = (kind or config.norm) == "layer_norm"
        self.use_bias = self.center and config.use_bias
        self._kernels = kernels

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        dim = input_shape[-1]
        self.gain = self.add_weight(shape=(dim,), initializer="ones", name="gain", autocast=False)
        if self.use_bias:
            self.bias = self.add_weight(shape=(dim,), initializer="zeros", name="bias", autocast=False)

    def call(self, x: tf.Tensor) -> tf.Tensor:
        weights = [tf.convert_to_tensor(weight) for weight in (self.gain, *([self.bias] if self.use_bias else []))]
        return self._kernels.norm(x, weights, self.center, self.epsilon)


def rms_normalise(x: tf.Tensor, epsilon: float) -> tf.Tensor:
    """Divides the last axis by its root mean square, in float32 (QK-norm: Henry et al. 2020, Dehghani et al. 2023)."""
    y = tf.cast(x, tf.float32)
    return tf.cast(y * tf.math.rsqrt(tf.reduce_mean(tf.square(y), axis=-1, keepdims=True) + epsilon), x.dtype)


def rotate(x: tf.Tensor, cosines: tf.Tensor, sines: tf.Tensor) -> tf.Tensor:
    """Rotates the two halves of (batch, heads, time, head_dim) by tables of shape (..., time, head_dim / 2)."""
    cosines, sines = tf.cast(cosines, x.dtype), tf.cast(sines, x.dtype)
    first, second = tf.split(x, 2, axis=-1)
    return tf.concat([first * cosines - second * sines, second * cosines + first * sines], axis=-1)


def prepare(x: tf.Tensor, epsilon: float | None, cosines: tf.Tensor | None, sines: tf.Tensor | None) -> tf.Tensor:
    """Queries or keys before they meet: normalised unless epsilon is None, rotated unless the tables are None."""
    if epsilon is not None:
        x = rms_normalise(x, epsilon)
    return x if cosines is None else rotate(x, cosines, sines)


class Attention(keras.layers.Layer):
    """Self-attention with one fused projection to queries, keys and values."""

    def __init__(
        self,
        config: ModelConfig,
        initializers: Initializers,
        kernels: Kernels,
        name: str,
        dtype: keras.DTypePolicy,
        has_rope: bool,
    ) -> None:
        super().__init__(name="attention", dtype=dtype)
        self.config, self._kernels, self._has_rope = config, kernels, has_rope
        width = (config.num_heads + 2 * config.kv_heads) * config.dim_per_head
        initial, path = initializers.normal(f"{name}/query_key_value"), f"{name}/query_key_value"
        adapter = make_adapter(config, initializers, path, dtype)
        self.query_key_value = Linear(width, config.has_qkv_bias, initial, adapter, name="query_key_value", dtype=dtype)
        initial, path = initializers.residual(f"{name}/output"), f"{name}/output_projection"
        adapter = make_adapter(config, initializers, path, dtype)
        self.output_projection = Linear(
            config.model_dim, config.use_bias, initial, adapter, name="output_projection", dtype=dtype
        )
        if config.qk_norm_gain:
            self.query_norm, self.key_norm = (
                Norm(config, kernels, "rms_norm", name=f"{each}_norm", dtype=dtype) for each in ("query", "key")
            )

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self.query_key_value.build(input_shape)
        if self.config.qk_norm_gain:
            for norm in (self.query_norm, self.key_norm):
                norm.build((*input_shape[:-1], self.config.dim_per_head))
        self.output_projection.build((*input_shape[:-1], self.config.attention_dim))

    def call(
        self,
        x: tf.Tensor,
        visible: tf.Tensor,
        dropout_keys: tf.Tensor | None = None,
        rotation: Rotation | None = None,
        is_causal: bool = True,
    ) -> tf.Tensor:
        """Every token attends to those that are visible to it.

        Args:
          x: (batch, time, dim).
          visible: bool (time, time), or (batch, 1, time, time): who (rows) sees whom.
          dropout_keys: of the adapters.
          rotation: of its positions, see `rotation_at`.
          is_causal: whether nobody sees what is later.
        """
        projected = self._project(x, rotation, dropout_keys)
        return self._attend(*projected, visible, is_causal, dropout_keys)

    def extend(
        self,
        x: tf.Tensor,
        rotation: Rotation | None,
        keys: tf.Tensor,
        values: tf.Tensor,
        start: tf.Tensor,
        padding: tf.Tensor | None = None,
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Attends from new tokens, in the slots start, start + 1, ... of the cache, to them and to those before.

        Args:
          x: the new tokens, (batch, time, dim).
          rotation: of their positions, see `rotation_at`.
          keys, values: the cache, (batch, kv_heads, slots, head_dim).
          start: int32 scalar, how many slots of the cache are filled.
          padding: int32 (batch,), how many of the first slots of a row hold no token; None: none.

        Returns:
          The output (batch, time, dim) and the cache with the new tokens in it.
        """
        own = start + tf.range(tf.shape(x)[1])  # slots of the new tokens
        queries, new_keys, new_values = self._project(x, rotation)
        slots = tf.range(tf.shape(keys)[2])
        keys = _write_slots(keys, new_keys, own)
        values = _write_slots(values, new_values, own)
        last = own
        if self.config.prompt_attention == "whole":
            last = tf.where(start == 0, own[-1], own)
        visible = slots <= last[:, tf.newaxis]
        if self.config.sliding_window is not None:
            visible &= slots > own[:, tf.newaxis] - self.config.sliding_window
        if padding is not None:
            visible &= (slots >= padding[:, tf.newaxis])[:, tf.newaxis, tf.newaxis, :]
            visible |= slots == own[:, tf.newaxis]  # what is no token sees itself: a softmax over nothing is no number
        return self._attend(queries, keys, values, visible, causal=False), keys, values

    def _project(
        self, x: tf.Tensor, rotation: Rotation | None, dropout_keys: tf.Tensor | None = None
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Queries (batch, heads, time, head_dim), keys and values (batch, kv_heads, time, head_dim)."""
        config = self.config
        fused = self.query_key_value(x, dropout_keys)
        shape = [tf.shape(x)[0], tf.shape(x)[1], config.num_heads + 2 * config.kv_heads, config.dim_per_head]
        heads = tf.transpose(tf.reshape(fused, shape), [0, 2, 1, 3])
        queries, keys, values = tf.split(heads, [config.num_heads, config.kv_heads, config.kv_heads], axis=1)
        if config.qk_norm_gain:
            queries, keys = self.query_norm(queries), self.key_norm(keys)
        cosines = sines = None
        if rotation is not None and self._has_rope:
            cosines, sines = rotation.cosines, rotation.sines
        normalises = config.qk_norm and not config.qk_norm_gain
        if normalises or self._has_rope:
            epsilon = config.norm_epsilon if normalises else None
            queries, keys = (self._kernels.apply(prepare, x, epsilon, cosines, sines) for x in (queries, keys))
        return queries, keys, values

    def _attend(
        self,
        queries: tf.Tensor,
        keys: tf.Tensor,
        values: tf.Tensor,
        visible: tf.Tensor,
        causal: bool,
        dropout_keys: tf.Tensor | None = None,
    ) -> tf.Tensor:
        """Softmax attention; `visible` (..., queries, keys) says who sees whom."""
        config = self.config
        if config.kv_heads != config.num_heads:
            keys = tf.repeat(keys, config.num_heads // config.kv_heads, axis=1)
            values = tf.repeat(values, config.num_heads // config.kv_heads, axis=1)
        scale = 1 / math.sqrt(config.dim_per_head)
        mixed = tf.transpose(self._kernels.attention(queries, keys, values, visible, scale, causal), [0, 2, 1, 3])
        mixed = tf.reshape(mixed, [tf.shape(mixed)[0], tf.shape(mixed)[1], config.attention_dim])
        return self.output_projection(mixed, dropout_keys)


def _write_slots(cache: tf.Tensor, new: tf.Tensor, positions: tf.Tensor) -> tf.Tensor:
    """The cache (batch, heads, slots, dim) with `new` (batch, heads, time, dim) at consecutive positions."""
    start, stop = positions[0], positions[-1] + 1
    return tf.concat([cache[:, :, :start], new, cache[:, :, stop:]], axis=2)


class MLP(keras.layers.Layer):
    """The position-wise part of a block: GELU, or SwiGLU with gate and value in one projection."""

    def __init__(
        self,
        config: ModelConfig,
        initializers: Initializers,
        kernels: Kernels,
        name: str,
        dtype: keras.DTypePolicy,
    ) -> None:
        super().__init__(name="mlp", dtype=dtype)
        self.config, self._kernels = config, kernels
        self.gated = config.activation == "swiglu"
        width = config.hidden_dim * (2 if self.gated else 1)
        initial, adapter = (
            initializers.normal(f"{name}/expand"),
            make_adapter(config, initializers, f"{name}/expand", dtype),
        )
        self.expand = Linear(width, config.use_bias, initial, adapter, name="expand", dtype=dtype)
        initial = initializers.residual(f"{name}/contract")
        adapter = make_adapter(config, initializers, f"{name}/contract", dtype)
        self.contract = Linear(config.model_dim, config.use_bias, initial, adapter, name="contract", dtype=dtype)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self.expand.build(input_shape)
        self.contract.build((*input_shape[:-1], self.config.hidden_dim))

    def call(self, x: tf.Tensor, dropout_keys: tf.Tensor | None = None) -> tf.Tensor:
        hidden = self.expand(x, dropout_keys)
        if self.gated:
            gate, value = tf.split(hidden, 2, axis=-1)
            return self.contract(self._kernels.swiglu(gate, value), dropout_keys)
        return self.contract(self._kernels.gelu(hidden), dropout_keys)


class Block(keras.layers.Layer):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(
        self,
        config: ModelConfig,
        initializers: Initializers,
        kernels: Kernels,
        name: str,
        dtype: keras.DTypePolicy,
        has_rope: bool,
    ) -> None:
        super().__init__(name=name, dtype=dtype)
        rate, residual = config.dropout, (f"{name}/attention", f"{name}/mlp")
        self.attention_norm = Norm(config, kernels, name="attention_norm", dtype=dtype)
        self.attention = Attention(config, initializers, kernels, residual[0], dtype, has_rope)
        self.attention_dropout = KeyedDropout(rate, residual[0], name="attention_dropout", dtype=dtype)
        self.mlp_norm = Norm(config, kernels, name="mlp_norm", dtype=dtype)
        self.mlp = MLP(config, initializers, kernels, residual[1], dtype)
        self.mlp_dropout = KeyedDropout(rate, residual[1], name="mlp_dropout", dtype=dtype)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        for layer in (self.attention_norm, self.attention, self.mlp_norm, self.mlp):
            layer.build(input_shape)

    def call(
        self,
        x: tf.Tensor,
        visible: tf.Tensor,
        dropout_keys: tf.Tensor | None = None,
        rotation: Rotation | None = None,
        is_causal: bool = True,
    ) -> tf.Tensor:
        attended = self.attention(self.attention_norm(x), visible, dropout_keys, rotation=rotation, is_causal=is_causal)
        x = x + self.attention_dropout(attended, dropout_keys)
        return x + self.mlp_dropout(self.mlp(self.mlp_norm(x), dropout_keys), dropout_keys)

    def extend(
        self,
        x: tf.Tensor,
        rotation: Rotation | None,
        keys: tf.Tensor,
        values: tf.Tensor,
        start: tf.Tensor,
        padding: tf.Tensor | None = None,
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        attended, keys, values = self.attention.extend(self.attention_norm(x), rotation, keys, values, start, padding)
        x = x + attended
        return x + self.mlp(self.mlp_norm(x)), keys, values


def rematerialised(block: keras.Layer, x: tf.Tensor, *arguments: Any, **options: Any) -> tf.Tensor:
    """block(x, ...), which keeps x alone for the backward pass and computes the rest again (Chen et al. 2016).

    `tf.recompute_grad` would take the gradient of all variables that it meets through the strategy.
    """
    variables = [*block.trainable_variables, *block.non_trainable_variables]
    frozen = [tf.convert_to_tensor(variable.value) for variable in block.non_trainable_variables]

    def run_with(x: tf.Tensor, values: Sequence[tf.Tensor]) -> tf.Tensor:
        with keras.StatelessScope(state_mapping=list(zip(variables, [*values, *frozen], strict=True))):
            return block(x, *arguments, **options)

    @tf.custom_gradient
    def keep_input(x: tf.Tensor, *values: tf.Tensor) -> tuple[tf.Tensor, Callable[[tf.Tensor], list[tf.Tensor]]]:
        def gradient(upstream: tf.Tensor) -> list[tf.Tensor]:
            # Never true, but no compiler knows: so the second computation waits for the gradient that arrives, and is
            # not recognised as the first one.
            one = tf.reshape(upstream, [-1])[0]
            never = tf.math.is_nan(one) & tf.math.is_finite(one)
            inputs = [tf.where(never, tf.zeros_like(x), x), *values]
            with tf.GradientTape() as tape:
                tape.watch(inputs)
                y = run_with(inputs[0], inputs[1:])
            return tape.gradient(y, inputs, output_gradients=upstream)

        return run_with(x, values), gradient

    return keep_input(x, *[tf.convert_to_tensor(variable.value) for variable in block.trainable_variables])
