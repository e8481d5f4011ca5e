"""KerasNLP's GPT-2, with its weights copied over, gives tfdp's logits and gradients, tensor by tensor."""

from collections.abc import Callable

import keras_nlp
import numpy as np
import pytest
import tensorflow as tf

from tfdp.config.sections import ModelConfig
from tfdp.models.gpt import GPT

VOCAB_SIZE, NUM_LAYERS, NUM_HEADS, DIM, HIDDEN, CONTEXT = 37, 3, 4, 32, 80, 24

Weights = dict[str, np.ndarray]
Both = tuple[tuple[np.ndarray, Weights], tuple[np.ndarray, Weights]]


def make_backbone() -> keras_nlp.models.GPT2Backbone:
    """A GPT-2 in which no weight, gain or bias is zero or one."""
    backbone = keras_nlp.models.GPT2Backbone(
        vocabulary_size=VOCAB_SIZE,
        num_layers=NUM_LAYERS,
        num_heads=NUM_HEADS,
        hidden_dim=DIM,
        intermediate_dim=HIDDEN,
        dropout=0.0,
        max_sequence_length=CONTEXT,
        dtype="float32",
    )
    random = np.random.default_rng(0)
    for variable in backbone.trainable_variables:
        mean = 1.0 if variable.name == "gamma" else 0.0
        variable.assign(random.normal(mean, 0.2, size=variable.shape))
    return backbone


def rename(weights: Weights) -> Weights:
    """KerasNLP's tensors, weights or their gradients, under tfdp's names and in its shapes."""
    renamed = {
        "token_embedding": weights["token_embedding/embeddings"],
        "position_embedding": weights["position_embedding/embeddings"],
        "output_norm/gain": weights["layer_norm/gamma"],
        "output_norm/bias": weights["layer_norm/beta"],
    }
    for i in range(NUM_LAYERS):
        theirs, ours = f"transformer_layer_{i}", f"block_{i}"
        for their_norm, our_norm in (("self_attention", "attention"), ("feedforward", "mlp")):
            renamed[f"{ours}/{our_norm}_norm/gain"] = weights[f"{theirs}/{their_norm}_layer_norm/gamma"]
            renamed[f"{ours}/{our_norm}_norm/bias"] = weights[f"{theirs}/{their_norm}_layer_norm/beta"]
        attention = f"{theirs}/self_attention"
        kernels = [weights[f"{attention}/{part}/kernel"].reshape(DIM, DIM) for part in ("query", "key", "value")]
        biases = [weights[f"{attention}/{part}/bias"].reshape(DIM) for part in ("query", "key", "value")]
        renamed[f"{ours}/attention/query_key_value/kernel"] = np.concatenate(kernels, axis=1)
        renamed[f"{ours}/attention/query_key_value/bias"] = np.concatenate(biases)
        output = weights[f"{attention}/attention_output/kernel"]
        renamed[f"{ours}/attention/output_projection/kernel"] = output.reshape(DIM, DIM)
        renamed[f"{ours}/attention/output_projection/bias"] = weights[f"{attention}/attention_output/bias"]
        for their_part, our_part in (("intermediate", "expand"), ("output", "contract")):
            for kind in ("kernel", "bias"):
                renamed[f"{ours}/mlp/{our_part}/{kind}"] = weights[f"{theirs}/feedforward_{their_part}_dense/{kind}"]
    return renamed


def run(
    logits_of: Callable[[tf.Tensor], tf.Tensor], variables: dict[str, tf.Variable], tokens: tf.Tensor
) -> tuple[np.ndarray, Weights]:
    """Logits, and the gradient of the mean cross-entropy of the next token, by name."""
    with tf.GradientTape() as tape:
        logits = logits_of(tokens[:, :-1])
        loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(tokens[:, 1:], logits))
    gradients = tape.gradient(loss, variables)
    return logits.numpy(), {name: tf.convert_to_tensor(gradient).numpy() for name, gradient in gradients.items()}


@pytest.fixture(scope="module")
def both() -> Both:
    """(logits, gradients) of KerasNLP, under tfdp's names, and of tfdp."""
    backbone = make_backbone()
    config = ModelConfig(
        num_layers=NUM_LAYERS,
        num_heads=NUM_HEADS,
        model_dim=DIM,
        mlp_dim=HIDDEN,
        context_length=CONTEXT,
        position="learned",
        norm="layer_norm",
        activation="gelu",
        use_bias=True,
        tie_embeddings=True,
        qk_norm=False,
        zero_init=False,
    )
    model = GPT(config, VOCAB_SIZE, seed=1)
    copied = rename({variable.path: variable.numpy() for variable in backbone.trainable_variables})
    assert copied.keys() == model.named_weights().keys()
    for name, variable in model.named_weights().items():
        assert copied[name].shape == tuple(variable.shape)
        variable.assign(copied[name])

    def keras_nlp_logits(tokens: tf.Tensor) -> tf.Tensor:
        output = backbone({"token_ids": tokens, "padding_mask": tf.ones_like(tokens)})
        return tf.matmul(output, tf.convert_to_tensor(backbone.token_embedding.embeddings), transpose_b=True)

    tokens = tf.constant(np.random.default_rng(2).integers(0, VOCAB_SIZE, (3, CONTEXT + 1)), tf.int32)
    theirs = {variable.path: variable.value for variable in backbone.trainable_variables}
    logits, gradients = run(keras_nlp_logits, theirs, tokens)
    ours = {name: variable.value for name, variable in model.named_weights().items()}
    return (logits, rename(gradients)), run(model, ours, tokens)


def test_logits_equal_those_of_keras_nlp(both: Both) -> None:
    (expected, _), (logits, _) = both
    assert expected.std() > 0.5
    assert np.abs(logits - expected).max() < 1e-5


def test_every_gradient_equals_that_of_keras_nlp(both: Both) -> None:
    (_, expected), (_, gradients) = both
    assert len(gradients) == 4 + 12 * NUM_LAYERS
    for name, gradient in gradients.items():
        assert np.linalg.norm(expected[name]) > 1e-4, name
        assert np.linalg.norm(gradient - expected[name]) < 1e-4 * np.linalg.norm(expected[name]), name
