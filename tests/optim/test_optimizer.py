"""Update rules against float64 numpy, written from the papers and Keras's documentation; schedules at listed steps."""

from collections.abc import Callable

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfdp.config.sections import OptimizerConfig
from tfdp.optim.optimizer import Optimizer, decays
from tfdp.optim.schedule import make_schedule
from tfdp.system.exits import ConfigError

NAMES = ["adamw", "adam", "sgd", "momentum", "rmsprop", "lion", "adafactor", "muon"]
SHAPES = {
    "block_0/kernel": (6, 4),
    "wide/kernel": (3, 7),
    "gpt/token_embedding": (5, 4),
    "norm/gain": (4,),
    "block_0/bias": (6,),
}
LEARNING_RATES = [0.05, 0.1, 0.02, 0.07, 0.01]
DECAY = 0.3
BETA_1, BETA_2, EPSILON, MOMENTUM = 0.8, 0.95, 1e-3, 0.9

Slots = dict[str, np.ndarray]


def make_weights() -> list[keras.Variable]:
    random, weights = np.random.default_rng(0), []
    for path, shape in SHAPES.items():
        layer, name = path.split("/")
        with keras.name_scope(layer):
            weights.append(keras.Variable(random.normal(size=shape), name=name, dtype="float32"))
    assert [weight.path for weight in weights] == list(SHAPES)
    return weights


def make_config(name: str, **changes: object) -> OptimizerConfig:
    values = {"weight_decay": DECAY, "beta_1": BETA_1, "beta_2": BETA_2, "epsilon": EPSILON, "momentum": MOMENTUM}
    values["adam_learning_rate"] = None
    return OptimizerConfig(name=name, **{**values, **changes})  # type: ignore[arg-type]


def make_gradients(step: int) -> list[np.ndarray]:
    random = np.random.default_rng(100 + step)
    return [random.normal(size=shape).astype(np.float32) for shape in SHAPES.values()]


def values_of(variables: list[keras.Variable]) -> list[tf.Tensor]:
    return [tf.convert_to_tensor(variable.value) for variable in variables]


def run(
    optimizer: Optimizer, gradients_at: Callable[[int], list[np.ndarray]], num_steps: int, num_groups: int = 1
) -> list[np.ndarray]:
    """The weights after some updates, carried from tensor to tensor."""
    found: dict[int, np.ndarray] = {}
    for group in optimizer.groups(num_groups):
        weights, state = values_of(group.weights), values_of(group.state)
        for step in range(num_steps):
            rate, now = tf.constant(LEARNING_RATES[step]), tf.constant(step, tf.int64)
            gradients = gradients_at(step)
            own = [tf.constant(gradients[index]) for index in group.indices]
            weights, state = optimizer.update(group, weights, state, own, rate, now)
        found.update(zip(group.indices, [weight.numpy() for weight in weights], strict=True))
    return [found[index] for index in range(len(optimizer.weights))]


# ---------------------------------------------------------------------------------------------------
# References: (weight, gradient, slots of this weight, learning rate, step from 1) -> what is subtracted
# ---------------------------------------------------------------------------------------------------


def adam(_: np.ndarray, gradient: np.ndarray, slots: Slots, rate: float, step: int) -> np.ndarray:
    """Kingma and Ba 2015, in the order of computation before their section 2.1 ("epsilon hat")."""
    slots["m"] = BETA_1 * slots.get("m", 0) + (1 - BETA_1) * gradient
    slots["v"] = BETA_2 * slots.get("v", 0) + (1 - BETA_2) * gradient**2
    corrected_rate = rate * np.sqrt(1 - BETA_2**step) / (1 - BETA_1**step)
    return corrected_rate * slots["m"] / (np.sqrt(slots["v"]) + EPSILON)


def sgd(_: np.ndarray, gradient: np.ndarray, slots: Slots, rate: float, step: int) -> np.ndarray:
    return rate * gradient


def momentum(_: np.ndarray, gradient: np.ndarray, slots: Slots, rate: float, step: int) -> np.ndarray:
    """Polyak 1964; the velocity is in units of the weight, so it keeps the learning rate of its time."""
    slots["velocity"] = MOMENTUM * slots.get("velocity", 0) + rate * gradient
    return slots["velocity"]


def rmsprop(_: np.ndarray, gradient: np.ndarray, slots: Slots, rate: float, step: int) -> np.ndarray:
    """Hinton 2012; Keras adds epsilon under the root."""
    slots["v"] = BETA_2 * slots.get("v", 0) + (1 - BETA_2) * gradient**2
    return rate * gradient / np.sqrt(slots["v"] + EPSILON)


def lion(_: np.ndarray, gradient: np.ndarray, slots: Slots, rate: float, step: int) -> np.ndarray:
    """Chen et al. 2023, algorithm 2."""
    before = slots.get("m", np.zeros_like(gradient))
    slots["m"] = BETA_2 * before + (1 - BETA_2) * gradient
    return rate * np.sign(BETA_1 * before + (1 - BETA_1) * gradient)


def adafactor(weight: np.ndarray, gradient: np.ndarray, slots: Slots, rate: float, step: int) -> np.ndarray:
    """Shazeer and Stern 2018, algorithms 4 and 5, with the paper's constants; the rate is at most 1 / sqrt(step)."""
    beta, square = 1 - step**-0.8, gradient**2 + 1e-30
    if weight.ndim == 2:
        slots["rows"] = beta * slots.get("rows", 0) + (1 - beta) * square.sum(axis=1)
        slots["columns"] = beta * slots.get("columns", 0) + (1 - beta) * square.sum(axis=0)
        second_moment = np.outer(slots["rows"], slots["columns"]) / slots["rows"].sum()
    else:
        slots["v"] = beta * slots.get("v", 0) + (1 - beta) * square
        second_moment = slots["v"]
    update = gradient / np.sqrt(second_moment)
    update /= max(1, np.sqrt(np.mean(update**2)))
    return max(1e-3, np.sqrt(np.mean(weight**2))) * min(rate, 1 / np.sqrt(step)) * update


def muon(weight: np.ndarray, gradient: np.ndarray, slots: Slots, rate: float, step: int) -> np.ndarray:
    """Jordan et al. 2024 (Nesterov momentum, five Newton-Schulz steps), scaled as Liu et al. 2025 do."""
    slots["m"] = MOMENTUM * slots.get("m", 0) + gradient
    x = gradient + MOMENTUM * slots["m"]
    x = x / np.linalg.norm(x)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    return rate * 0.2 * np.sqrt(max(weight.shape)) * x


RULES = {
    "adamw": adam,
    "adam": adam,
    "sgd": sgd,
    "momentum": momentum,
    "rmsprop": rmsprop,
    "lion": lion,
    "adafactor": adafactor,
    "muon": muon,
}


def reference(name: str, decay_embeddings: bool, num_steps: int) -> list[np.ndarray]:
    weights = [variable.numpy().astype(np.float64) for variable in make_weights()]
    slots: list[Slots] = [{} for _ in weights]
    for step in range(num_steps):
        for index, (path, gradient) in enumerate(zip(SHAPES, make_gradients(step), strict=True)):
            weight, rate = weights[index], LEARNING_RATES[step]
            if path.endswith("kernel") or (path.endswith("embedding") and decay_embeddings):
                weight = weight * (1 - rate * DECAY)  # decoupled: Loshchilov and Hutter 2019
            rule = adam if name == "muon" and not path.endswith("kernel") else RULES[name]
            weights[index] = weight - rule(weight, gradient.astype(np.float64), slots[index], rate, step + 1)
    return weights


# ---------------------------------------------------------------------------------------------------
# Rules
# ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay_embeddings", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_five_updates_equal_the_reference(name: str, decay_embeddings: bool) -> None:
    optimizer = Optimizer(make_config(name, decay_embeddings=decay_embeddings), make_weights())
    before = [variable.numpy() for variable in make_weights()]
    after, expected = run(optimizer, make_gradients, 5), reference(name, decay_embeddings, 5)
    for path, old, new, wanted in zip(SHAPES, before, after, expected, strict=True):
        moved = np.linalg.norm(wanted - old)
        assert moved > 1e-2, path
        assert np.linalg.norm(new - wanted) < 1e-5 * moved, path


@pytest.mark.parametrize("decay_embeddings", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_without_gradients_decay_moves_exactly_the_matrices(name: str, decay_embeddings: bool) -> None:
    weights = make_weights()
    optimizer = Optimizer(make_config(name, decay_embeddings=decay_embeddings), weights)
    after = run(optimizer, lambda _: [np.zeros(shape, np.float32) for shape in SHAPES.values()], 2)
    kept = (1 - LEARNING_RATES[0] * DECAY) * (1 - LEARNING_RATES[1] * DECAY)
    for weight, new in zip(weights, after, strict=True):
        decaying = "kernel" in weight.path or ("embedding" in weight.path and decay_embeddings)
        assert decays(weight, make_config(name, decay_embeddings=decay_embeddings)) == decaying
        if decaying:
            np.testing.assert_allclose(new, weight.numpy() * kept, rtol=1e-6)
        else:
            np.testing.assert_array_equal(new, weight.numpy())


@pytest.mark.parametrize(
    ("name", "decay"), [(name, {"adamw": 0.1, "lion": 0.1, "muon": 0.01}.get(name, 0.0)) for name in NAMES]
)
def test_the_decay_of_each_rule_by_default(name: str, decay: float) -> None:
    weights = make_weights()
    after = run(Optimizer(OptimizerConfig(name=name), weights), lambda _: [np.zeros_like(w) for w in weights], 1)
    np.testing.assert_allclose(after[0], weights[0].numpy() * (1 - LEARNING_RATES[0] * decay), rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_an_update_has_no_side_effects(name: str) -> None:
    optimizer = Optimizer(make_config(name), make_weights())
    variables = [*optimizer.weights, *optimizer.state, *optimizer._keras.variables]
    before = [variable.numpy() for variable in variables]
    first, second = run(optimizer, make_gradients, 2), run(optimizer, make_gradients, 2)
    for variable, value in zip(variables, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_groups", [2, 9])
def test_groups_give_the_same_bits(name: str, num_groups: int) -> None:
    optimizer = Optimizer(make_config(name), make_weights())
    groups = optimizer.groups(num_groups)
    owned = [variable for group in groups for variable in group.state]
    assert sorted(map(id, owned)) == sorted(map(id, optimizer.state))
    assert len(groups) == (1 if name == "adafactor" else min(num_groups, len(SHAPES)))
    expected = run(optimizer, make_gradients, 3)
    for one, other in zip(run(optimizer, make_gradients, 3, num_groups), expected, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", NAMES)
def test_a_graph_gives_the_same_update(name: str) -> None:
    optimizer = Optimizer(make_config(name), make_weights())
    expected = run(optimizer, make_gradients, 3)
    optimizer.update = tf.function(optimizer.update)  # type: ignore[method-assign]
    for one, other in zip(run(optimizer, make_gradients, 3), expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)
    assert optimizer.update.experimental_get_tracing_count() == 1


@pytest.mark.parametrize(
    ("name", "num_slots"),
    # Adafactor has placeholders where it does not factor; Muon's Adam part has a second moment for three of five.
    [
        ("adamw", 10),
        ("adam", 10),
        ("sgd", 0),
        ("momentum", 5),
        ("rmsprop", 5),
        ("lion", 5),
        ("adafactor", 15),
        ("muon", 8),
    ],
)
def test_every_state_tensor_has_a_name_of_its_own(name: str, num_slots: int) -> None:
    optimizer = Optimizer(make_config(name), make_weights())
    named = optimizer.named_state()
    assert len(named) == len(optimizer.state) == num_slots
    assert len({id(variable) for variable in named.values()}) == num_slots
    assert list(named) == sorted(named)
    assert not any("iteration" in key or "learning_rate" in key for key in named)
    assert list(Optimizer(make_config(name), make_weights()).named_state()) == list(named)  # in a second process, too


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("constant", ["beta_1", "beta_2", "momentum", "weight_decay"])
def test_a_constant_of_zero_is_refused_by_the_config_or_works(name: str, constant: str) -> None:
    """What the config accepts, the optimizer must accept: Keras's Lion raises without a first moment."""
    if (name, constant) == ("lion", "beta_1"):
        with pytest.raises(ConfigError, match=r"^optimizer.beta_1 \(0.0\) "):
            make_config(name, beta_1=0.0)
        return
    weights = make_weights()
    after = run(Optimizer(make_config(name, **{constant: 0.0}), weights), make_gradients, 1)
    assert all(np.all(np.isfinite(new)) and np.any(new != old.numpy()) for new, old in zip(after, weights, strict=True))


# ---------------------------------------------------------------------------------------------------
# Schedules
# ---------------------------------------------------------------------------------------------------


def rates(schedule: str, warmup_steps: int, num_steps: int = 11, **changes: float) -> list[float]:
    """Learning rates of a run as fractions of the peak."""
    config = OptimizerConfig(learning_rate=2e-3, schedule=schedule, warmup_steps=warmup_steps, **changes)  # type: ignore[arg-type]
    learning_rate = make_schedule(config, num_steps)
    tensors = [learning_rate(tf.constant(step, tf.int64)) for step in range(num_steps)]
    assert all(tensor.dtype == tf.float32 and tensor.shape == () for tensor in tensors)
    return [float(tensor) / 2e-3 for tensor in tensors]


HALF_COSINE = [0.5 * (1 + np.cos(np.pi * step / 10)) for step in range(11)]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1.0] * 11),
        ("linear", [1 - 0.9 * step / 10 for step in range(11)]),
        ("cosine", [0.1 + 0.9 * left for left in HALF_COSINE]),
        ("wsd", [1.0] * 7 + [1 - 0.9 * step / 4 for step in range(5)][1:]),  # the last 5 of 11 decay, from the peak
    ],
)
def test_schedules_without_warm_up(schedule: str, expected: list[float]) -> None:
    actual = rates(schedule, 0, final_fraction=0.1, decay_fraction=5 / 11)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1.0] * 7),
        ("linear", [1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0.0]),
        ("cosine", [1.0, 0.5 + 0.25 * 3**0.5, 0.75, 0.5, 0.25, 0.5 - 0.25 * 3**0.5, 0.0]),
        ("wsd", [1.0, 1.0, 1.0, 1.0, 2 / 3, 1 / 3, 0.0]),
    ],
)
def test_schedules_after_4_steps_of_warm_up(schedule: str, expected: list[float]) -> None:
    actual = rates(schedule, 4, decay_fraction=4 / 11)
    np.testing.assert_allclose(actual, [0.25, 0.5, 0.75, 1.0, *expected], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd"])
@pytest.mark.parametrize("warmup_steps", [0, 1, 4, 9])
@pytest.mark.parametrize("final_fraction", [0.0, 0.1, 1.0])
def test_the_last_step_reaches_the_final_fraction(schedule: str, warmup_steps: int, final_fraction: float) -> None:
    assert abs(rates(schedule, warmup_steps, final_fraction=final_fraction)[-1] - final_fraction) < 1e-6


@pytest.mark.parametrize(
    ("schedule", "warmup_steps", "decay_fraction"),
    [("wsd", 0, 0.1), ("wsd", 0, 0.0), ("linear", 10, 0.4), ("cosine", 10, 0.4)],
)
def test_a_decay_of_one_step_reaches_the_final_fraction(
    schedule: str, warmup_steps: int, decay_fraction: float
) -> None:
    """Of 11 steps only the last is left to decay; make_schedule promises final_fraction of the peak there."""
    actual = rates(schedule, warmup_steps, final_fraction=0.1, decay_fraction=decay_fraction)
    assert abs(actual[-2] - 1.0) < 1e-6
    assert abs(actual[-1] - 0.1) < 1e-6


def test_a_schedule_is_the_same_in_a_graph_at_large_steps() -> None:
    learning_rate = make_schedule(OptimizerConfig(learning_rate=1e-3, schedule="cosine", warmup_steps=1000), 1_000_001)
    step = tf.constant(500_500, tf.int64)  # half-way down
    assert abs(float(learning_rate(step)) / 5e-4 - 1) < 1e-5
    assert float(tf.function(learning_rate)(step)) == float(learning_rate(step))
