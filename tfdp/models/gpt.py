"""The GPT: Keras layers, from the token embedding to the logits.

Pre-norm transformer blocks (Radford et al. 2019, GPT-2) with the options of its descendants: rotary
positions (Su et al. 2021), RMSNorm (Zhang and Sennrich 2019), SwiGLU (Shazeer 2020), grouped-query
attention (Ainslie et al. 2023). Nothing here knows of strategies, steps or files. Shapes: (batch, time, dim).
"""

import math
from collections.abc import Mapping

import keras
import numpy as np
import tensorflow as tf

from tfdp.config.sections import ModelConfig
from tfdp.models.dropout import KeyedDropout
from tfdp.models.initializers import Initializers
from tfdp.models.layers import Block, Norm, rematerialised
from tfdp.models.lora import is_adapter
from tfdp.models.positions import positions_of, rotary_tables, rotation_at
from tfdp.ops.kernels import Kernels
from tfdp.ops.visibility import CAUSAL, AttentionKind, visibility
from tfdp.system.exits import ConfigError

Cache = list[tuple[tf.Tensor, tf.Tensor]]  # per block: keys and values, (batch, kv_heads, slots, head_dim)


# ---------------------------------------------------------------------------------------------------
# The whole
# ---------------------------------------------------------------------------------------------------


class GPT(keras.Model):
    """A causal language model; build it inside `strategy.scope()`.

    Args:
      config: the shape.
      vocab_size: number of token ids; the tables have more rows where the config says so.
      seed: of the initial weights.
      precision: of the products: float32, bfloat16 or float16; weights are float32 always.
      remat: whether backward computes each block's activations again instead of keeping them.
      fuse: whether XLA compiles what lies between the matrix products, where it does not compile the whole.
      given: weights to start from, by path; each is read when its variable is made.

    Raises:
      ConfigError: a given weight is missing, has another shape, or has no place in the model.
    """

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int,
        seed: int = 0,
        precision: str = "float32",
        remat: bool = False,
        fuse: bool = False,
        given: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        policy = keras.DTypePolicy("float32" if precision == "float32" else f"mixed_{precision}")
        super().__init__(name="gpt", dtype=policy)
        self.config, self.vocab_size, self.remat = config, config.vocab_size or vocab_size, remat
        initializers = Initializers(config, seed, given)
        self._initializers = initializers
        self.embedding_dropout = KeyedDropout(config.dropout, "embedding", name="embedding_dropout", dtype=policy)
        kernels = Kernels(fuse)
        self.blocks = [
            Block(config, initializers, kernels, f"block_{index}", policy, has_rope)
            for index, has_rope in enumerate(_layers_with_rope(config))
        ]
        self.output_norm = Norm(config, kernels, name="output_norm", dtype=policy)
        self.build((None, config.context_length))
        if given is not None:
            self._assign_vectors(given)
        if config.lora_rank is not None:
            for variable in self.weights:
                variable.trainable = is_adapter(variable.path)

    def _assign_vectors(self, given: Mapping[str, np.ndarray]) -> None:
        """Assigns gains and biases, which no initializer has taken from the given weights."""
        weights = {**self.named_weights(), **self.named_frozen_weights()}
        others = {name for name in weights if is_adapter(name)}  # which may start anew
        for name in sorted({*weights} ^ {*given, *others}):
            raise ConfigError(f"the model and its weights must have the same names: {name} is in one of them only")
        for name, variable in weights.items():
            if len(variable.shape) == 1:
                variable.assign(given[name])

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        config, normal = self.config, self._initializers.normal
        table = (self.vocab_size, config.model_dim)
        self.token_embedding = self.add_weight(shape=table, initializer=normal("embedding"), name="token_embedding")
        if config.position == "learned":
            self.position_embedding = self.add_weight(
                shape=(config.context_length, config.model_dim),
                initializer=normal("position_embedding"),
                name="position_embedding",
            )
        if not config.tie_embeddings:
            starts_at_zero = config.zero_init and not self._initializers.are_given
            initial = keras.initializers.Zeros() if starts_at_zero else normal("output_embedding")
            self.output_embedding = self.add_weight(shape=table, initializer=initial, name="output_embedding")
        for block in self.blocks:
            block.build((None, input_shape[1], config.model_dim))
        self.output_norm.build((None, input_shape[1], config.model_dim))

    def call(
        self, tokens: tf.Tensor, dropout_keys: tf.Tensor | None = None, attention: AttentionKind = CAUSAL
    ) -> tf.Tensor:
        """Logits of the next token: int32 (batch, time) -> float32 (batch, time, vocab_size).

        Args:
          tokens: ids, time at most context_length.
          dropout_keys: uint32 (batch,) from `ops.hashing.sequence_keys` to train with dropout; None to drop nothing.
          attention: who sees whom.
        """
        return self.logits(self.features(tokens, dropout_keys, attention))

    def features(
        self, tokens: tf.Tensor, dropout_keys: tf.Tensor | None = None, attention: AttentionKind = CAUSAL
    ) -> tf.Tensor:
        """What the output projection sees: (batch, time, dim) in the compute dtype."""
        positions, visible, is_causal = visibility(attention, tokens.shape[1], self.config.sliding_window)
        x = self.embedding_dropout(self._embed(tokens, positions), dropout_keys)
        rotation = rotation_at(self.config, positions)
        for block in self.blocks:
            if self.remat:
                x = rematerialised(block, x, visible, dropout_keys, rotation=rotation, is_causal=is_causal)
            else:
                x = block(x, visible, dropout_keys, rotation=rotation, is_causal=is_causal)
        return self.output_norm(x)

    def logits(self, features: tf.Tensor) -> tf.Tensor:
        """Projects (batch, time, dim) to float32 logits (batch, time, vocab_size)."""
        flat = tf.reshape(features, [-1, self.config.model_dim])
        flat = tf.matmul(flat, tf.cast(self.output_table, flat.dtype), transpose_b=True)
        shape = [tf.shape(features)[0], tf.shape(features)[1], self.vocab_size]
        return tf.reshape(tf.cast(flat, tf.float32), shape)

    @property
    def output_table(self) -> keras.Variable:
        """The output projection's rows, one per token id: (vocab_size, dim)."""
        return self.token_embedding if self.config.tie_embeddings else self.output_embedding

    def empty_cache(self, batch_size: int, length: int | None = None) -> Cache:
        """A cache of keys and values with nothing in it, for `extend`: of `length` tokens; None: of context_length."""
        config = self.config
        slots = config.context_length if length is None else length
        shape = (batch_size, config.kv_heads, slots, config.dim_per_head)
        return [(tf.zeros(shape, self.compute_dtype), tf.zeros(shape, self.compute_dtype)) for _ in self.blocks]

    def extend(
        self, tokens: tf.Tensor, cache: Cache, start: tf.Tensor, padding: tf.Tensor | None = None
    ) -> tuple[tf.Tensor, Cache]:
        """Logits of new tokens (batch, time) that follow the `start` cached ones, and the longer cache.

        start + time must not exceed the length of the cache, which may be longer than the context where rows are
        padded: then no token of use may have a position beyond it. The first tokens of a cache (start 0) are the
        prompt, which sees itself as `prompt_attention` says.

        Args:
          padding: int32 (batch,), how many of the first tokens of a row are none: so prompts of several lengths end
            together. None: there are none.
        """
        features, cache = self.extend_features(tokens, cache, start, padding)
        return self.logits(features), cache

    def extend_features(
        self, tokens: tf.Tensor, cache: Cache, start: tf.Tensor, padding: tf.Tensor | None = None
    ) -> tuple[tf.Tensor, Cache]:
        """What `extend` projects, (batch, time, dim), and the longer cache."""
        slots = start + tf.range(tf.shape(tokens)[1])
        positions = positions_of(slots, padding, self.config.context_length)
        x, rotation = self._embed(tokens, positions), rotation_at(self.config, positions)
        longer = []
        for block, (keys, values) in zip(self.blocks, cache, strict=True):
            x, keys, values = block.extend(x, rotation, keys, values, start, padding)
            longer.append((keys, values))
        return self.output_norm(x), longer

    def named_weights(self) -> dict[str, keras.Variable]:
        """The trainable variables by name, such as "block_0/attention/query_key_value/kernel"."""
        return {variable.path.removeprefix("gpt/"): variable for variable in self.trainable_variables}

    def named_frozen_weights(self) -> dict[str, keras.Variable]:
        """The weights that are not trained (`layer.trainable = False`), by name."""
        return {variable.path.removeprefix("gpt/"): variable for variable in self.non_trainable_variables}

    def describe(self) -> str:
        """The shape, for people."""
        config = self.config
        num_frozen = sum(math.prod(variable.shape) for variable in self.non_trainable_variables)
        frozen = f" trained, {num_frozen:,} frozen" if num_frozen else ""
        return (
            f"{self.num_params():,} parameters{frozen}: {config.num_layers} layers, {config.num_heads} heads, "
            f"{config.model_dim} wide, context {config.context_length}, vocabulary {self.vocab_size}"
        )

    def num_params(self) -> int:
        """Number of trainable numbers; a tied embedding counts once."""
        return sum(math.prod(variable.shape) for variable in self.trainable_variables)

    def flops_per_token(self) -> int:
        """Floating-point operations of forward and backward for one token of a full sequence.

        6 per weight of a matrix product (the output projection included, embedding look-ups not), and 12 * layers *
        width for each key that a query attends to: (context_length + 1) / 2 in the mean. Appendix B of PaLM (Chowdhery
        et al. 2022) counts attention as if nothing were masked; causal attention that skips the masked half would then
        show an MFU above what the units do. A frozen weight needs no gradient: 4.
        """
        config = self.config
        trained, frozen = (
            sum(
                math.prod(variable.shape)
                for variable in variables
                if variable.name == "kernel" or is_adapter(variable.path)
            )
            for variables in (self.trainable_variables, self.non_trainable_variables)
        )
        projection = (6 if self.output_table.trainable else 4) * math.prod(self.output_table.shape)
        attention = 6 * config.num_layers * (config.context_length + 1) * config.attention_dim
        return 6 * trained + 4 * frozen + projection + attention

    def _embed(self, tokens: tf.Tensor, positions: tf.Tensor) -> tf.Tensor:
        x = tf.gather(tf.convert_to_tensor(self.token_embedding), tokens)
        if self.config.position == "learned":
            x = x + tf.gather(tf.convert_to_tensor(self.position_embedding), positions)
        elif self.config.position == "sinusoidal":
            cosines, sines = rotary_tables(self.config.context_length, self.config.model_dim)
            table = np.concatenate([sines, cosines], axis=-1) * self.config.init_stddev
            x = x + tf.cast(tf.gather(table, positions), x.dtype)
        return tf.cast(x, self.compute_dtype)


def _layers_with_rope(config: ModelConfig) -> list[bool]:
    """Whether each layer rotates its queries and keys."""
    return [config.position == "rope" and index not in config.layers_without_rope for index in range(config.num_layers)]
