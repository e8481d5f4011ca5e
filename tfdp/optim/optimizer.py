"""The update rule as a pure function: Keras's optimizers, without their own idea of distribution.

Keras computes; tfdp decides when. A Keras optimizer on the TensorFlow backend sums gradients over the
replicas once more and updates variable by variable through the strategy. Here its arithmetic runs on plain
tensors instead (in the stateless scope that Keras has for JAX), so an update is one function of
(weights, state, gradients) that XLA can fuse, and nothing is reduced or clipped behind the step's back.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import keras
import tensorflow as tf
from keras.src.optimizers.base_optimizer import BaseOptimizer

from tfdp.config.sections import OptimizerConfig


class _Pure:
    """Puts Keras's backend-free methods back in front of the TensorFlow backend's distributed ones."""

    assign = BaseOptimizer.assign
    assign_add = BaseOptimizer.assign_add
    assign_sub = BaseOptimizer.assign_sub
    _apply_weight_decay = BaseOptimizer._apply_weight_decay
    _backend_update_step = BaseOptimizer._backend_update_step

    def _var_key(self, variable: keras.Variable) -> str:
        return str(variable.path)


def _pure(base: type[keras.optimizers.Optimizer]) -> type[keras.optimizers.Optimizer]:
    # Muon brings a decay rule of its own, for its two parts; it is free of the backend already.
    own = {name: base.__dict__[name] for name in ("_apply_weight_decay",) if name in base.__dict__}
    return type(base.__name__, (_Pure, base), own)


@dataclass(frozen=True, eq=False)
class Group:
    """Weights that are updated together."""

    indices: list[int]  # of the weights, ascending
    weights: list[keras.Variable]
    state_indices: list[int]  # of the optimizer's state, ascending
    state: list[keras.Variable]


class Optimizer:
    """An update rule and its state for a list of weights; make it inside `strategy.scope()`.

    Args:
      config: the rule and its constants.
      weights: the trainable variables, matrices of shape (inputs, outputs).
    """

    def __init__(self, config: OptimizerConfig, weights: Sequence[keras.Variable]) -> None:
        self.weights = list(weights)
        self._keras = _make_keras_optimizer(config)
        self._keras.exclude_from_weight_decay([weight for weight in self.weights if not decays(weight, config)])
        self._keras.build(self.weights)
        given = (self._keras.iterations, self._keras._learning_rate)  # arguments of `update`, not state
        self.state = [variable for variable in self._keras.variables if all(variable is not v for v in given)]

    def groups(self, count: int) -> list[Group]:
        """Cuts the weights into groups of about equal size, each weight with its state.

        There is one group where it cannot be told which weight each variable of the state belongs to.
        """
        owners = [self._owner(variable) for variable in self.state]
        if count == 1 or None in owners:
            return [self._group(list(range(len(self.weights))), list(range(len(self.state))))]
        sizes = [math.prod(weight.shape) for weight in self.weights]
        filled, members = [0] * count, [set[int]() for _ in range(count)]
        for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
            least = filled.index(min(filled))
            filled[least] += sizes[index]
            members[least].add(index)
        return [
            self._group(sorted(chosen), [index for index, owner in enumerate(owners) if owner in chosen])
            for chosen in members
            if chosen
        ]

    def _group(self, indices: list[int], state_indices: list[int]) -> Group:
        weights, state = [self.weights[index] for index in indices], [self.state[index] for index in state_indices]
        return Group(indices, weights, state_indices, state)

    def _owner(self, variable: keras.Variable) -> int | None:
        """The index of the weight that a variable of the state belongs to, which Keras puts into its name."""
        prefixes = [weight.path.replace("/", "_") + "_" for weight in self.weights]
        fitting = [index for index, prefix in enumerate(prefixes) if variable.name.startswith(prefix)]
        return max(fitting, key=lambda index: len(prefixes[index]), default=None)

    def named_state(self) -> dict[str, keras.Variable]:
        """The state by name; the number in front keeps names apart and in order."""
        return {f"{index:05d}/{variable.path}": variable for index, variable in enumerate(self.state)}

    def update(
        self,
        group: Group,
        weights: Sequence[tf.Tensor],
        state: Sequence[tf.Tensor],
        gradients: Sequence[tf.Tensor],
        learning_rate: tf.Tensor,
        step: tf.Tensor,
    ) -> tuple[list[tf.Tensor], list[tf.Tensor]]:
        """One update of a group, without side effects.

        Args:
          group: one of `groups`.
          weights, gradients: float32 tensors in the order of the group's weights.
          state: tensors in the order of its state.
          learning_rate: float32 scalar.
          step: int64 scalar, the number of updates before this one.

        Returns:
          The new weights and the new state.
        """
        iterations = self._keras.iterations
        values = [
            *zip(group.weights, weights, strict=True),
            *zip(group.state, state, strict=True),
            (iterations, tf.cast(step, iterations.dtype)),
            (self._keras._learning_rate, learning_rate),
        ]
        with keras.StatelessScope(state_mapping=values) as scope:
            self._keras.apply(list(gradients), group.weights)
        return (
            [scope.get_current_value(weight) for weight in group.weights],
            [scope.get_current_value(variable) for variable in group.state],
        )


def decays(weight: keras.Variable, config: OptimizerConfig) -> bool:
    """Whether weight decay reaches a variable: matrices always, embeddings by choice, gains and biases never.

    A bias of Keras's EinsumDense has several axes, so the name counts too.
    """
    if len(weight.shape) < 2 or weight.name in ("bias", "beta", "gamma", "scale"):
        return False
    return config.decay_embeddings or "embedding" not in weight.path


def _make_keras_optimizer(config: OptimizerConfig) -> keras.optimizers.Optimizer:
    weight_decay = config.decay_rate
    common = {"learning_rate": config.learning_rate, "weight_decay": weight_decay, "name": "optimizer"}
    adam: dict[str, object] = {"beta_1": config.beta_1, "beta_2": config.beta_2, "epsilon": config.epsilon}
    choices: dict[str, tuple[type[keras.optimizers.Optimizer], dict[str, object]]] = {
        "adamw": (keras.optimizers.AdamW, adam),
        "adam": (keras.optimizers.Adam, adam),
        "sgd": (keras.optimizers.SGD, {}),
        "momentum": (keras.optimizers.SGD, {"momentum": config.momentum}),
        "rmsprop": (keras.optimizers.RMSprop, {"rho": config.beta_2, "epsilon": config.epsilon}),
        "lion": (keras.optimizers.Lion, {"beta_1": config.beta_1, "beta_2": config.beta_2}),
        "adafactor": (keras.optimizers.Adafactor, {"relative_step": False}),
        "muon": (
            keras.optimizers.Muon,
            {
                "adam_beta_1": config.beta_1,
                "adam_beta_2": config.beta_2,
                "adam_weight_decay": weight_decay,
                "adam_lr_ratio": (config.adam_learning_rate or config.learning_rate) / config.learning_rate,
                "epsilon": config.epsilon,
                "momentum": config.momentum,
            },
        ),
    }
    base, arguments = choices[config.name]
    return _pure(base)(**common, **arguments)
