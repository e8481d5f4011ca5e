"""A Keras model of the user's, from token ids to logits, under the same step as a GPT.

What a step computes must not depend on where: so its dropout layers get masks keyed by sequence, as those of a GPT, and
a model with any other state of its own, such as batch statistics or another generator of random numbers, is refused by
the name of the layer.
"""

import collections
import importlib
import inspect
import json
import math
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras.src.backend.common import global_state

from tfdp.config.sections import KerasModelConfig
from tfdp.models.dropout import KeyedDropout
from tfdp.ops.hashing import mix, uint32
from tfdp.ops.visibility import CAUSAL, AttentionKind
from tfdp.system.exits import CommandError, ConfigError, require
from tfdp.system.messages import one_line, shown, what_and_where

Cache = list[tuple[tf.Tensor, tf.Tensor]]
_NAMES = "object_name_uids"  # where Keras counts the layers that it has named


class WrappedModel:
    """A Keras model as a recipe's model; build it inside `strategy.scope()`.

    Args:
      model: ids int32 (batch, time) to logits (batch, time, vocab_size or more); or a backbone or causal language model
        of KerasHub.
      config: of section `model`.
      vocab_size: of the tokenizer.

    Raises:
      ConfigError: it does not give such logits, sees later tokens, or has state that steps would change.
    """

    output_table = None  # features are logits already

    def __init__(self, model: keras.Model, config: KerasModelConfig, vocab_size: int) -> None:
        self.config, self._model, self._vocab_size = config, model, vocab_size
        self._is_hub = _is_of_keras_hub(model)
        self._masks = _KeyedMasks(model)
        self._check_logits()
        names = [variable.path for variable in model.weights]
        for name, count in collections.Counter(names).items():
            require(count == 1, "model.builder", config.builder, f"must give each weight a name of its own: {name}")
        self.trainable_variables = model.trainable_weights

    def features(
        self, tokens: tf.Tensor, dropout_keys: tf.Tensor | None = None, attention: AttentionKind = CAUSAL
    ) -> tf.Tensor:
        """The logits, (rows, time, vocab_size) or wider."""
        require(attention is CAUSAL, "model.builder", self.config.builder, "makes a model of causal attention alone")
        time, length = tokens.shape[1], _fixed_length(self._model) or tokens.shape[1]
        with self._masks.keyed(dropout_keys):  # what follows a token does not reach it
            padded = tf.pad(tokens, [[0, 0], [0, length - time]]) if time < length else tokens
            return self._logits(padded, training=dropout_keys is not None)[:, :time]

    def _logits(self, tokens: tf.Tensor, training: bool) -> tf.Tensor:
        if not self._is_hub:
            return self._model(tokens, training=training)
        inputs = {"token_ids": tokens, "padding_mask": tf.ones_like(tokens)}
        found = self._model(inputs, training=training)
        return found if hasattr(self._model, "backbone") else self._model.token_embedding(found, reverse=True)

    def empty_cache(self, batch_size: int, length: int | None = None) -> Cache:
        """Room for the ids of so many tokens: keys and values are computed anew for each, as the model has no cache."""
        is_fixed = _fixed_length(self._model) is not None
        size = self.config.context_length if is_fixed or length is None else length
        return [(tf.zeros((batch_size, size), tf.int32), tf.zeros((), tf.int32))]

    def extend(self, tokens: tf.Tensor, cache: Cache, start: tf.Tensor) -> tuple[tf.Tensor, Cache]:
        """Logits of new tokens (batch, time) that follow the `start` ones before them, and the longer cache."""
        ((ids, unused),) = cache
        stop = start + tf.shape(tokens)[1]
        longer = tf.ensure_shape(tf.concat([ids[:, :start], tokens, ids[:, stop:]], axis=1), ids.shape)
        logits = tf.cast(self._logits(longer, training=False), tf.float32)
        return logits[:, start:stop, : self._vocab_size], [(longer, unused)]

    def named_weights(self) -> dict[str, keras.Variable]:
        """The trainable weights by their path."""
        return {variable.path: variable for variable in self._model.trainable_weights}

    def named_frozen_weights(self) -> dict[str, keras.Variable]:
        """The other weights by their path."""
        return {variable.path: variable for variable in self._model.non_trainable_weights}

    def num_params(self) -> int:
        """Number of trainable numbers."""
        return sum(math.prod(variable.shape) for variable in self.trainable_variables)

    def flops_per_token(self) -> int:
        """6 per trained number of a matrix but embeddings, and those of the projection; attention is not counted."""
        matrices = [v for v in self.trainable_variables if len(v.shape) > 1 and "embedding" not in v.path]
        widest = max((v.shape[-1] for v in self._model.weights if "embedding" in v.path), default=0)
        return 6 * (sum(math.prod(variable.shape) for variable in matrices) + self._vocab_size * widest)

    def describe(self) -> str:
        """What it is, for people."""
        config = self.config
        kind = type(self._model).__name__
        return f"{self.num_params():,} parameters: {kind} of {config.builder}, context {config.context_length}"

    def _check_logits(self) -> None:
        """Tries the model on two rows that differ in their last token, and as in training."""
        time = self.config.context_length
        tokens = np.arange(2 * time, dtype=np.int32).reshape(2, time) % self._vocab_size
        tokens[1, :-1] = tokens[0, :-1]
        tokens[1, -1] = (tokens[0, -1] + 1) % self._vocab_size
        keys = tf.zeros([2], tf.uint32)
        try:
            with self._masks.keyed(keys), keras.StatelessScope(collect_losses=True) as scope:
                found = tf.cast(self._logits(tf.constant(tokens), training=True), tf.float32)
            with self._masks.keyed(keys), keras.StatelessScope():
                again = tf.cast(self._logits(tf.constant(tokens), training=True), tf.float32)
            with keras.StatelessScope(state_mapping=self._random_for_zeros()):
                logits = tf.cast(self._logits(tf.constant(tokens), training=False), tf.float32).numpy()
        except ConfigError:
            raise
        except Exception as error:  # whatever the layers of a user raise
            self._refuse(f"must make a model that takes int32 ids of shape (batch, {time}): {one_line(str(error))}")
        if found.shape.rank != 3 or found.shape[:2] != (2, time) or found.shape[2] < self._vocab_size:
            shape = f"(batch, time, {self._vocab_size})"
            self._refuse(f"must make a model that gives logits of shape {shape} or wider, not {list(found.shape)}")
        self._check_state(scope)
        if not np.allclose(found, again, equal_nan=True):
            self._refuse("makes a model that draws random numbers of its own: try keras.layers.Dropout")
        if self._model.losses or scope.losses:
            self._refuse("makes a model with losses of its own, which no step adds: try optimizer.weight_decay")
        if not np.isfinite(logits).all():
            self._refuse("must make a model whose first logits are finite")
        if not np.allclose(logits[0, :-1], logits[1, :-1], atol=1e-5 * np.abs(logits).max()):
            self._refuse("must make a causal model: a token moves the logits of those before it")

    def _check_state(self, scope: keras.StatelessScope) -> None:
        """Refuses variables that a pass has assigned to."""
        changed = [variable for variable in self._model.variables if id(variable) in scope.state_mapping]
        if scope.state_mapping:
            where = (
                _owner(self._model, changed[0])
                if changed
                else "one outside of its layers, such as the global generator"
            )
            self._refuse(f"makes a model with state that each step would change: {where}; leave that layer out")

    def _random_for_zeros(self) -> list[tuple[keras.Variable, np.ndarray]]:
        """Values for the weights that start at zero, through which a token would move nothing."""
        generator = np.random.default_rng(0)
        zero = (weight for weight in self._model.weights if not np.any(weight.numpy()))
        return [(weight, generator.normal(0, 0.1, weight.shape).astype(np.float32)) for weight in zero]

    def _refuse(self, rule: str) -> None:
        raise ConfigError(f"model.builder ({shown(self.config.builder)}) {rule}")


class _KeyedMasks:
    """Gives the dropout layers of a model masks by the keys of the sequences, in place of a generator's."""

    def __init__(self, model: keras.Model) -> None:
        self._keys: tf.Tensor | None = None
        self._num_calls: collections.Counter[str] = collections.Counter()  # of each layer in a pass
        for index, layer in enumerate(_layers(model)):
            if type(layer) is keras.layers.Dropout and layer.rate > 0 and layer.noise_shape is None:
                layer.call = self._call_of(
                    KeyedDropout(layer.rate, f"dropout_{index}", dtype=layer.dtype_policy), layer
                )

    @contextmanager
    def keyed(self, keys: tf.Tensor | None) -> Iterator[None]:
        """Within it the masks are those of the sequences with these keys, (rows,); None: nothing is dropped."""
        before, self._keys = self._keys, keys
        self._num_calls.clear()
        try:
            yield
        finally:
            self._keys = before

    def _call_of(self, dropout: KeyedDropout, layer: keras.Layer) -> Callable[..., tf.Tensor]:
        def call(inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
            keys = self._keys
            if keys is None or not training:
                return inputs
            if inputs.shape[0] not in (keys.shape[0], None):
                raise ConfigError(
                    f"the layer {layer.name} (Dropout) must drop parts of sequences, the first axis of its input, but "
                    f"that is of shape {list(inputs.shape)}"
                )
            count = self._num_calls[layer.path]
            self._num_calls[layer.path] += 1
            own = keys if count == 0 else mix(keys ^ uint32(count))  # a layer that is used twice draws twice
            flat = dropout.call(tf.reshape(inputs, [tf.shape(keys)[0], -1, 1]), own)
            return tf.reshape(flat, tf.shape(inputs))

        return call


def build(config: KerasModelConfig, vocab_size: int, seed: int, precision: str) -> keras.Model:
    """Calls the builder of a configuration, with as many of `vocab_size` and `context_length` as it asks for.

    Layers have the same names, and random initial weights are the same, whatever the process built before.

    Raises:
      ConfigError: there is no such function, or it does not return a Keras model.
    """
    function = find_builder(config.builder)
    known = {"vocab_size": vocab_size, "context_length": config.context_length}
    given = json.loads(config.arguments)
    if config.builder.startswith("keras.") and {*given} - {"filepath"}:
        raise ConfigError("model.arguments must hold filepath alone for a builder of Keras: others run foreign code")
    taken = inspect.signature(function).parameters
    policy, names = keras.config.dtype_policy(), global_state.get_global_attribute(_NAMES)
    keras.config.set_dtype_policy("float32" if precision == "float32" else f"mixed_{precision}")
    global_state.set_global_attribute(_NAMES, collections.defaultdict(int))
    states = random.getstate(), np.random.get_state()
    keras.utils.set_random_seed(seed)
    try:
        model = function(**{name: value for name, value in known.items() if name in taken}, **given)
        if isinstance(model, keras.Model) and not model.built:  # its layers get names and policy here
            model(tf.zeros([1, config.context_length], tf.int32))
    except Exception as error:  # whatever the function of a user raises
        where = f"model.builder ({shown(config.builder)})"
        raise CommandError(f"{where} cannot build a model: {what_and_where(error)}") from error
    finally:
        keras.config.set_dtype_policy(policy)
        global_state.set_global_attribute(_NAMES, names)
        random.setstate(states[0])
        np.random.set_state(states[1])
    rule = "must be a function that returns a keras.Model"
    require(isinstance(model, keras.Model), "model.builder", config.builder, rule)
    policy = model.dtype_policy.name
    rule = f"must be float32, or the precision of the model, whose policy is {policy}"
    require(precision == "float32" or policy == f"mixed_{precision}", "training.precision", precision, rule)
    return model


def find_builder(name: str) -> Callable[..., Any]:
    """The function "package.module:function". Raises `ConfigError` where there is none."""
    module, _, function = name.partition(":")
    is_foreign = module.partition(".")[0] in sys.stdlib_module_names - {"__main__"}
    require(not is_foreign, "model.builder", name, "must not be a function of Python's standard library")
    try:
        found: Any = _running_script(module) or importlib.import_module(module)
        for part in function.split("."):
            found = getattr(found, part)
    except Exception as error:  # whatever the module of a user raises
        raise ConfigError(f"model.builder ({shown(name)}) must name MODULE:FUNCTION: {what_and_where(error)}") from None
    require(callable(found), "model.builder", name, "must name a function: try my_package.my_module:build")
    return found


def _running_script(module: str) -> Any:
    """The script that runs, where it is the module: to import it would run it once more. A command is no script."""
    script = sys.modules["__main__"]
    is_script = script.__spec__ is None and Path(getattr(script, "__file__", None) or "").stem == module
    return script if is_script else None


def _owner(model: keras.Model, variable: keras.Variable) -> str:
    """The name and the kind of the innermost layer that has a variable."""
    owners = [layer for layer in _layers(model) if any(each is variable for each in layer.variables)]
    innermost = min(owners or [model], key=lambda layer: len(layer.variables))
    return f"{variable.name} of {innermost.name} ({type(innermost).__name__})"


def _layers(model: keras.Model) -> list[keras.Layer]:
    return list(model._flatten_layers(include_self=False))


def _is_of_keras_hub(model: keras.Model) -> bool:
    """Whether its inputs are those of KerasHub's backbones and causal language models."""
    inputs = getattr(model, "input", None)
    return isinstance(inputs, dict) and {*inputs} == {"token_ids", "padding_mask"}


def _fixed_length(model: keras.Model) -> int | None:
    """The length of the rows that a functional model takes; None: any."""
    shape = getattr(model, "input_shape", None)
    return shape[1] if isinstance(shape, tuple) and len(shape) == 2 else None
