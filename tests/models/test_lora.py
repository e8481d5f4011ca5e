"""Low-rank adapters: what is trained, what the model computes, and what their sum computes."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from tfdp.config.sections import ModelConfig
from tfdp.models import dimensions, lora
from tfdp.models.gpt import GPT
from tfdp.system.exits import ConfigError

VOCABULARY = 40
SIZE: dict[str, Any] = {"num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "model_dim": 32, "context_length": 12}
OF_GPT2 = {"activation": "gelu", "position": "learned", "norm": "layer_norm", "use_bias": True, "tie_embeddings": True}


def random_model(**keys: Any) -> GPT:
    """A model whose weights are all random, adapters included."""
    model = GPT(ModelConfig(**{**SIZE, "zero_init": False, **keys}), VOCABULARY)
    generator = np.random.default_rng(0)
    for variable in model.weights:
        variable.assign(generator.normal(size=variable.shape) * 0.2 + (len(variable.shape) == 1))
    return model


def weights_of(model: GPT) -> dict[str, np.ndarray]:
    return {name: each.numpy() for name, each in (model.named_weights() | model.named_frozen_weights()).items()}


TOKENS = np.random.default_rng(1).integers(0, VOCABULARY, (3, 12)).astype(np.int32)


@pytest.mark.parametrize(
    "keys",
    [
        {"lora_rank": 3},
        {"lora_rank": 3, "lora_alpha": 1.5, "lora_rank_stabilised": True, "lora_targets": ("query", "value", "down")},
        {"lora_rank": 40, "lora_targets": ("up",), **OF_GPT2},
    ],
)
def test_adapters_alone_are_trained_and_merge_into_the_weights(keys: dict[str, Any]) -> None:
    model = random_model(**keys)
    shapes = {name: tuple(each.shape) for name, each in model.named_weights().items()}
    assert shapes == lora.adapter_shapes(model.config)
    frozen = {name: tuple(each.shape) for name, each in model.named_frozen_weights().items()}
    assert frozen == dimensions.weight_shapes(model.config, VOCABULARY)
    weights = weights_of(model)
    merged = GPT(lora.merged_model(model.config), VOCABULARY, given=lora.merged(model.config, weights))
    np.testing.assert_allclose(merged(TOKENS).numpy(), model(TOKENS).numpy(), atol=2e-5)
    again = GPT(model.config, VOCABULARY, given=weights)
    np.testing.assert_array_equal(again(TOKENS).numpy(), model(TOKENS).numpy())
    base = {name: weight for name, weight in weights.items() if not lora.is_adapter(name)}
    plain = GPT(lora.merged_model(model.config), VOCABULARY, given=base)
    assert np.abs(plain(TOKENS).numpy() - model(TOKENS).numpy()).max() > 0.01


def test_training_starts_from_the_model_as_it_was_and_moves_each_b() -> None:
    base = weights_of(random_model())
    model = GPT(ModelConfig(**SIZE, lora_rank=3), VOCABULARY, given=base)
    plain = GPT(ModelConfig(**SIZE), VOCABULARY, given=base)
    np.testing.assert_array_equal(model(TOKENS).numpy(), plain(TOKENS).numpy())
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(tf.nn.log_softmax(model(TOKENS))[..., 0])
    gradients = tape.gradient(loss, [variable.value for variable in model.trainable_variables])
    for variable, gradient in zip(model.trainable_variables, gradients, strict=True):
        is_b = variable.name.endswith("_b")
        assert (np.abs(gradient.numpy()).max() > 0) == is_b, variable.path  # A moves once B is no longer zero


def test_masks_of_adapters_belong_to_sequences() -> None:
    model = random_model(lora_rank=3, lora_dropout=0.5)
    tokens = np.tile(TOKENS[:1], (3, 1))
    first, second, third = model(tokens, tf.constant([4, 5, 4], tf.uint32)).numpy()
    np.testing.assert_allclose(first, third, atol=1e-5)
    assert np.abs(first - second).max() > 1e-3
    rate_free = replace(model.config, lora_dropout=0.0)
    same = GPT(rate_free, VOCABULARY, given=weights_of(model))
    np.testing.assert_array_equal(same(tokens).numpy(), model(tokens).numpy())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"lora_dropout": 0.1}, "model.lora_dropout (0.1) needs model.lora_rank: try lora_rank 8"),
        ({"lora_rank": 2, "lora_targets": ()}, "model.lora_targets (()) must name at least one, each once"),
        ({"lora_rank": 2, "lora_targets": ("up", "up")}, "must name at least one, each once"),
        ({"lora_rank": 2, "lora_alpha": -1.0}, "model.lora_alpha (-1.0) must be positive: try 16"),
        ({"lora_rank": 2, "lora_dropout": 1.0}, "model.lora_dropout (1.0) must lie in [0, 1): try 0.05"),
    ],
)
def test_a_mistake_names_its_key(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ModelConfig(**keys)
    assert message in str(caught.value)


def test_gates_have_adapters_where_there_are_gates() -> None:
    assert "gate" in ModelConfig(lora_rank=2).adapted_targets
    assert "gate" not in ModelConfig(lora_rank=2, activation="gelu").adapted_targets
    with pytest.raises(ConfigError, match=r"has gate with model\.activation swiglu only"):
        ModelConfig(lora_rank=2, activation="gelu", lora_targets=("gate",))
