"""What is known of a run before it is built, against what is built."""

import math
from typing import get_args, get_type_hints

import pytest

from tfdp.benchmarking import estimates
from tfdp.benchmarking.estimates import Measured
from tfdp.config.sections import DistributionConfig, ModelConfig, OptimizerConfig, TrainingConfig
from tfdp.models import dimensions
from tfdp.models.gpt import GPT
from tfdp.optim.optimizer import Optimizer

VOCAB_SIZE = 33
SHAPE = {"num_layers": 2, "num_heads": 2, "model_dim": 16, "context_length": 8}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm": "layer_norm", "use_bias": True, "position": "learned", "tie_embeddings": True, "qk_norm": False},
        {"activation": "swiglu", "num_kv_heads": 1, "norm": "layer_norm"},
        {"mlp_dim": 40, "position": "sinusoidal", "use_bias": True},
        {"head_dim": 12, "num_kv_heads": 1, "qkv_bias": True, "qk_norm_gain": True, "vocab_size": 40},
    ],
)
def test_shapes_and_operations_are_those_of_the_model(changes: dict[str, object]) -> None:
    config = ModelConfig(**{**SHAPE, **changes})  # type: ignore[arg-type]
    model, shapes = GPT(config, VOCAB_SIZE), dimensions.weight_shapes(config, VOCAB_SIZE)
    assert {name: tuple(weight.shape) for name, weight in model.named_weights().items()} == shapes
    assert dimensions.num_params(shapes) == model.num_params()
    assert estimates.flops_per_token(config, VOCAB_SIZE) == model.flops_per_token()


@pytest.mark.parametrize("name", get_args(get_type_hints(OptimizerConfig)["name"]))
def test_the_state_of_every_optimizer(name: str) -> None:
    config = OptimizerConfig(name=name)  # type: ignore[arg-type]
    model = GPT(ModelConfig(**SHAPE), VOCAB_SIZE)  # type: ignore[arg-type]
    state = Optimizer(config, model.trainable_variables).named_state()
    expected = sum(math.prod(variable.shape) for variable in state.values())
    shapes = dimensions.weight_shapes(model.config, VOCAB_SIZE)
    assert estimates.num_state_numbers(config, shapes) == expected


def test_bytes_of_a_reduction() -> None:
    shapes = {"a": (3, 5), "b": (2,)}
    assert estimates.reduction_bytes(DistributionConfig(), shapes, num_replicas=1) == 0
    assert estimates.reduction_bytes(DistributionConfig(), shapes, num_replicas=4) == 4 * 17
    assert estimates.reduction_bytes(DistributionConfig(wire_dtype="bfloat16"), shapes, num_replicas=4) == 2 * 17
    assert estimates.network_seconds(DistributionConfig(), 10**9, 2, gbits_per_second=8.0) == pytest.approx(1.0)
    assert estimates.network_seconds(DistributionConfig(), 10**9, 4, gbits_per_second=8.0) == pytest.approx(1.5)


def test_bytes_of_islands() -> None:
    """Sums travel once for a replica, messages in few bits once for each of its islands, to all others."""
    shapes = {"a": (8192, 5)}
    summed = DistributionConfig(synchronization="local", num_islands=4)
    assert estimates.reduction_bytes(summed, shapes, num_replicas=2) == 4 * 8192 * 5
    few_bits = DistributionConfig(synchronization="local", num_islands=4, delta_dtype="int4")
    assert estimates.reduction_bytes(few_bits, shapes, num_replicas=2) == 2 * (8192 * 5 // 2 + 4 * 10)
    assert estimates.network_seconds(few_bits, 10**9, 4, gbits_per_second=8.0) == pytest.approx(3.0)
    assert estimates.num_island_numbers(DistributionConfig(), 100, 150, num_replicas=2) == 0
    # one more optimizer state, two islands' new weights and new states, the outer momentum
    assert estimates.num_island_numbers(summed, 100, 150, num_replicas=2) == 150 + 2 * (100 + 150) + 100
    assert estimates.num_stored_island_numbers(DistributionConfig(), 100, 150) == 0
    assert estimates.num_stored_island_numbers(summed, 100, 150) == 3 * 150 + 100
    assert estimates.num_stored_island_numbers(few_bits, 100, 150) == 3 * 150 + 4 * 100 + 100


def test_remat_and_half_precision_keep_less() -> None:
    config = ModelConfig(num_layers=8, context_length=128)
    found = [
        estimates.activation_bytes(config, training, 256, num_rows=4)
        for training in (TrainingConfig(), TrainingConfig(precision="bfloat16"), TrainingConfig(remat=True))
    ]
    whole, half, again = found
    assert 0.45 < half / whole < 0.6
    assert again < 0.4 * whole


def test_measurements_extend_along_a_line() -> None:
    few, more = Measured(1, 1.0, 100, 10.0), Measured(4, 2.5, 160, 13.0)
    assert few.extended(more, 12) == Measured(12, 6.5, 320, 21.0)
    assert few.extended(few, 1) == few
