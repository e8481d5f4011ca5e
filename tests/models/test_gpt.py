"""The model: its arithmetic, its counts, its initial weights."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfdp.config.sections import ModelConfig
from tfdp.models.gpt import GPT
from tfdp.models.layers import rotate
from tfdp.models.positions import rotary_tables, rotation_at
from tfdp.ops.chunking import query_blocks
from tfdp.ops.kernels import Kernels
from tfdp.tasks.causal_lm import next_token_loss

VOCAB_SIZE = 13
POSITIONS = ["learned", "sinusoidal", "rope"]
COMBINATIONS = list(itertools.product(POSITIONS, ["layer_norm", "rms_norm"], ["gelu", "swiglu"]))


def make_model(vocab_size: int = VOCAB_SIZE, seed: int = 0, precision: str = "float32", **shape: Any) -> GPT:
    """A tiny model with weights large enough for every effect to show."""
    default = {"num_layers": 2, "num_heads": 4, "model_dim": 16, "mlp_dim": 24, "context_length": 8}
    default |= {"tie_embeddings": True, "qk_norm": False, "zero_init": False}
    return GPT(ModelConfig(**{**default, "init_stddev": 0.3, **shape}), vocab_size, seed, precision)


def make_tokens(rows: int = 2, time: int = 8, vocab_size: int = VOCAB_SIZE) -> tf.Tensor:
    return tf.constant(np.random.default_rng(0).integers(0, vocab_size, (rows, time)), tf.int32)


def weights_of(model: GPT) -> dict[str, np.ndarray]:
    return {name: variable.numpy() for name, variable in model.named_weights().items()}


def randomize(model: GPT) -> None:
    """Gives every weight, gains and biases too, a random value."""
    random = np.random.default_rng(1)
    for variable in model.trainable_variables:
        variable.assign(variable + 0.3 * random.normal(size=variable.shape))


# ---------------------------------------------------------------------------------------------------
# What it computes
# ---------------------------------------------------------------------------------------------------


def cross_entropy(logits: tf.Tensor, targets: tf.Tensor) -> tuple[tf.Tensor, int]:
    """The sum over all targets, and their number."""
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(targets, logits)
    return tf.reduce_sum(losses), int(tf.size(targets))


@pytest.mark.parametrize("time", [1, 5, 8])
def test_logits_have_one_row_for_each_token(time: int) -> None:
    logits = make_model()(make_tokens(3, time))
    assert logits.shape == (3, time, VOCAB_SIZE)
    assert logits.dtype == tf.float32


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_the_first_loss_is_the_log_of_the_vocabulary(position: str, tie_embeddings: bool) -> None:
    config = ModelConfig(
        num_layers=2, model_dim=64, context_length=64, position=position, tie_embeddings=tie_embeddings
    )
    tokens = make_tokens(8, 64, 256)
    loss_sum, count = cross_entropy(GPT(config, 256)(tokens[:, :-1]), tokens[:, 1:])
    assert abs(float(loss_sum / count) - math.log(256)) < 0.05


@pytest.mark.parametrize(
    ("position", "norm", "activation", "num_kv_heads"),
    [(*combination, 2) for combination in COMBINATIONS] + [("rope", "rms_norm", "gelu", n) for n in (None, 1)],
)
@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_token_moves_its_own_and_later_logits_only(
    position: str, norm: str, activation: str, num_kv_heads: int | None, qk_norm: bool
) -> None:
    shape = {"position": position, "norm": norm, "activation": activation, "num_kv_heads": num_kv_heads}
    model = make_model(qk_norm=qk_norm, **shape)
    tokens = np.tile(make_tokens(1), [9, 1])
    for time in range(8):
        tokens[time + 1, time] = (tokens[time + 1, time] + 1) % VOCAB_SIZE
    logits = model(tf.constant(tokens)).numpy()
    moved = np.abs(logits[1:] - logits[0]).max(axis=-1)  # (changed time, time of the logit)
    assert moved[np.tril_indices(8, -1)].max() < 1e-5
    assert moved[np.triu_indices(8)].min() > 1e-3


@pytest.mark.parametrize("position", POSITIONS)
def test_the_order_of_earlier_tokens_matters(position: str) -> None:
    model = make_model(position=position, num_layers=1)
    tokens = tf.constant([[1, 2, 3, 4], [2, 1, 3, 4]])
    first, swapped = model(tokens).numpy()[:, -1]
    assert np.abs(first - swapped).max() > 1e-3


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_every_block_and_branch_changes_its_input(norm: str, activation: str) -> None:
    model = make_model(norm=norm, activation=activation)
    x = tf.random.stateless_normal([2, 8, 16], seed=[0, 0])
    rotation, visible = rotation_at(model.config, tf.range(8)), tf.constant(np.tril(np.ones((8, 8), dtype=bool)))
    for block in model.blocks:
        assert tf.norm(block(x, visible, rotation=rotation) - x) / tf.norm(x) > 0.1
        for y in (block.attention(x, visible, rotation=rotation), block.mlp(x)):
            assert y.shape == x.shape
            assert tf.norm(y - x) / tf.norm(x) > 0.1
            assert tf.norm(y) / tf.norm(x) > 0.1


@pytest.mark.parametrize(
    ("position", "norm", "activation"), [("learned", "layer_norm", "gelu"), ("rope", "rms_norm", "swiglu")]
)
def test_every_weight_moves_the_logits_and_gets_a_gradient(position: str, norm: str, activation: str) -> None:
    model = make_model(
        num_layers=1,
        position=position,
        norm=norm,
        activation=activation,
        use_bias=True,
        tie_embeddings=False,
        num_kv_heads=2,
    )
    randomize(model)
    tokens = make_tokens()
    with tf.GradientTape() as tape:
        logits = model(tokens)
        loss_sum, _ = cross_entropy(logits, tokens)
    gradients = tape.gradient(loss_sum, [variable.value for variable in model.trainable_variables])
    for variable, gradient in zip(model.trainable_variables, gradients, strict=True):
        old = variable.numpy()
        variable.assign(old + np.random.default_rng(2).normal(size=old.shape))
        assert np.abs(model(tokens) - logits).max() > 1e-2, variable.path
        variable.assign(old)
        assert np.linalg.norm(tf.convert_to_tensor(gradient)) > 1e-3, variable.path


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_norm_equals_numpy(norm: str) -> None:
    layer = make_model(norm=norm, use_bias=True).output_norm
    random = np.random.default_rng(0)
    gain, bias = random.normal(size=16), random.normal(size=16) * (norm == "layer_norm")
    layer.gain.assign(gain)
    if norm == "layer_norm":
        layer.bias.assign(bias)
    else:
        assert len(layer.weights) == 1
    x = random.normal(2.0, 3.0, size=(2, 3, 16))
    y = x - x.mean(axis=-1, keepdims=True) if norm == "layer_norm" else x
    expected = y / np.sqrt((y**2).mean(axis=-1, keepdims=True) + 1e-5) * gain + bias
    np.testing.assert_allclose(layer(tf.constant(x, tf.float32)), expected, atol=2e-5)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_mlp_equals_numpy(activation: str) -> None:
    layer = make_model(activation=activation).blocks[0].mlp
    x = np.random.default_rng(0).normal(size=(2, 3, 16))
    hidden = x @ layer.expand.kernel.numpy().astype(np.float64)
    if activation == "swiglu":
        hidden = hidden[..., :24] / (1 + np.exp(-hidden[..., :24])) * hidden[..., 24:]
    else:
        hidden = 0.5 * hidden * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
    expected = hidden @ layer.contract.kernel.numpy().astype(np.float64)
    np.testing.assert_allclose(layer(tf.constant(x, tf.float32)), expected, atol=1e-5)


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("num_kv_heads", [1, 2])
def test_grouped_queries_equal_full_attention_with_repeated_heads(position: str, num_kv_heads: int) -> None:
    grouped = make_model(position=position, num_kv_heads=num_kv_heads, use_bias=True)
    randomize(grouped)
    full = make_model(position=position, use_bias=True)

    def repeat_heads(fused: np.ndarray) -> np.ndarray:
        heads = fused.reshape([*fused.shape[:-1], 4 + 2 * num_kv_heads, 4])
        queries, keys, values = np.split(heads, [4, 4 + num_kv_heads], axis=-2)
        copies = 4 // num_kv_heads
        repeated = [queries, np.repeat(keys, copies, axis=-2), np.repeat(values, copies, axis=-2)]
        return np.concatenate(repeated, axis=-2).reshape([*fused.shape[:-1], 48])

    for name, variable in full.named_weights().items():
        value = grouped.named_weights()[name].numpy()
        variable.assign(repeat_heads(value) if "query_key_value" in name else value)
    np.testing.assert_allclose(full(make_tokens()), grouped(make_tokens()), atol=1e-5)


def test_rotary_scores_depend_on_the_distance_only() -> None:
    cosines, sines = rotary_tables(64, 8)
    query, key = np.random.default_rng(0).normal(size=(2, 8))
    queries = rotate(tf.constant(np.tile(query, [1, 1, 64, 1]), tf.float32), cosines, sines)
    keys = rotate(tf.constant(np.tile(key, [1, 1, 64, 1]), tf.float32), cosines, sines)
    scores = tf.matmul(queries, keys, transpose_b=True).numpy()[0, 0]
    diagonals = [np.diagonal(scores, distance) for distance in range(-63, 64)]
    assert max(np.ptp(diagonal) for diagonal in diagonals) < 1e-5
    assert np.ptp([diagonal[0] for diagonal in diagonals]) > 1
    np.testing.assert_allclose(np.diagonal(scores), query @ key, atol=1e-5)


def test_rotary_pairs_turn_by_position_over_powers_of_10000() -> None:
    cosines, sines = rotary_tables(3, 4)
    np.testing.assert_allclose(cosines[2], [math.cos(2), math.cos(0.02)], rtol=1e-6)
    turned = rotate(tf.constant([[[[1.0, 2.0, 3.0, 4.0]]]]), cosines[2:], sines[2:]).numpy()[0, 0, 0]
    first, second = (1 + 3j) * np.exp(2j), (2 + 4j) * np.exp(0.02j)
    np.testing.assert_allclose(turned, [first.real, second.real, first.imag, second.imag], rtol=1e-6)


@pytest.mark.parametrize("num_kv_heads", [None, 2])
def test_moving_a_text_leaves_a_rotary_model_as_it_was(num_kv_heads: int | None) -> None:
    model = make_model(position="rope", num_kv_heads=num_kv_heads)
    for block in model.blocks:
        attention = block.attention
        x = tf.random.stateless_normal([1, 4, 16], seed=[1, 1])
        visible = tf.constant(np.tril(np.ones((4, 4), bool)))
        first, later = (rotation_at(model.config, tf.range(start, start + 4)) for start in (0, 4))
        here = attention._attend(*attention._project(x, first), visible, causal=True)
        there = attention._attend(*attention._project(x, later), visible, causal=True)
        np.testing.assert_allclose(there, here, atol=1e-5)


def test_a_graph_holds_the_rotary_tables_once() -> None:
    model = make_model(position="rope", num_layers=4)
    graph = tf.function(model.features).get_concrete_function(tf.TensorSpec([1, 4], tf.int32)).graph
    shapes = [each.outputs[0].shape.as_list() for each in graph.get_operations() if each.type == "Const"]
    assert shapes.count(list(rotary_tables(model.config.context_length, model.config.dim_per_head)[0].shape)) == 2


# ---------------------------------------------------------------------------------------------------
# Embeddings and precision
# ---------------------------------------------------------------------------------------------------


def test_a_tied_embedding_is_one_variable_with_the_gradient_of_both_uses() -> None:
    tied, untied = make_model(), make_model(tie_embeddings=False)
    assert tied.output_table is tied.token_embedding
    assert set(untied.named_weights()) - set(tied.named_weights()) == {"output_embedding"}
    for name, variable in untied.named_weights().items():
        variable.assign(tied.named_weights()["token_embedding" if name == "output_embedding" else name])
    gradients = {}
    tokens = make_tokens()
    for model in (tied, untied):
        with tf.GradientTape() as tape:
            loss_sum, _ = cross_entropy(model(tokens), tf.roll(tokens, -1, axis=1))
        values = {name: variable.value for name, variable in model.named_weights().items()}
        gradients[model] = {n: tf.convert_to_tensor(g).numpy() for n, g in tape.gradient(loss_sum, values).items()}
    as_input, as_output = gradients[untied]["token_embedding"], gradients[untied]["output_embedding"]
    assert np.linalg.norm(as_input) > 0.1
    assert np.linalg.norm(as_output) > 0.1
    np.testing.assert_allclose(gradients[tied]["token_embedding"], as_input + as_output, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_bfloat16_keeps_weights_and_logits_in_float32_and_stays_near_float32(position: str, norm: str) -> None:
    shape = {"position": position, "norm": norm, "use_bias": True, "num_kv_heads": 2, "init_stddev": 0.1}
    exact, rounded = make_model(**shape), make_model(precision="bfloat16", **shape)
    assert {variable.dtype for variable in rounded.variables} == {"float32"}
    for name, value in weights_of(exact).items():
        np.testing.assert_array_equal(weights_of(rounded)[name], value)
    expected, logits = exact(make_tokens()), rounded(make_tokens())
    assert rounded.features(make_tokens()).dtype == tf.bfloat16
    assert logits.dtype == tf.float32
    assert 1e-4 < float(tf.norm(logits - expected) / tf.norm(expected)) < 0.03


@pytest.mark.parametrize("position", POSITIONS)
def test_bfloat16_reads_on_from_a_cache(position: str) -> None:
    model = make_model(position=position, precision="bfloat16", init_stddev=0.1)
    tokens = make_tokens()
    logits, cache = model.extend(tokens[:, :5], model.empty_cache(2), tf.constant(0))
    more, _ = model.extend(tokens[:, 5:], cache, tf.constant(5))
    expected = model(tokens)
    assert float(tf.norm(tf.concat([logits, more], axis=1) - expected) / tf.norm(expected)) < 0.03


# ---------------------------------------------------------------------------------------------------
# Counts
# ---------------------------------------------------------------------------------------------------

# 13 tokens, 2 layers, 16 wide, context 8. GPT-2's shape, MLP 24 wide: embeddings 13*16 + 8*16 = 336; a block
# 2 norms of 32, attention 16*48+48 + 16*16+16 = 1088, MLP 16*24+24 + 24*16+16 = 808: 1960; the last norm 32.
GPT2_SHAPE = {"activation": "gelu", "position": "learned", "norm": "layer_norm", "use_bias": True}
GPT2_NUM_PARAMS = 336 + 2 * 1960 + 32
# Llama's shape, 2 of 4 heads for keys and values, untied, MLP 64 wide by default (8/3 * 16 = 43, up to 64): embeddings
# 2*13*16 = 416; a block 2 gains of 16, attention 16*(16+8+8) + 16*16 = 768, MLP 16*128 + 64*16 = 3072: 3872; a gain 16.
LLAMA_SHAPE = {"activation": "swiglu", "num_kv_heads": 2, "tie_embeddings": False, "mlp_dim": None}
LLAMA_NUM_PARAMS = 416 + 2 * 3872 + 16


@pytest.mark.parametrize(
    ("shape", "num_params"),
    [
        (GPT2_SHAPE, GPT2_NUM_PARAMS),
        ({**GPT2_SHAPE, "tie_embeddings": False}, GPT2_NUM_PARAMS + 13 * 16),
        (LLAMA_SHAPE, LLAMA_NUM_PARAMS),
        ({**LLAMA_SHAPE, "tie_embeddings": True}, LLAMA_NUM_PARAMS - 13 * 16),
        ({**LLAMA_SHAPE, "position": "sinusoidal"}, LLAMA_NUM_PARAMS),
    ],
)
def test_num_params_equals_the_formula(shape: dict[str, Any], num_params: int) -> None:
    model = make_model(**shape)
    assert model.num_params() == num_params
    assert sum(value.size for value in weights_of(model).values()) == num_params
    assert f"{num_params:,} parameters" in model.describe()


@pytest.mark.parametrize(
    ("shape", "num_matrix_weights"),
    [
        (GPT2_SHAPE, 2 * (16 * 48 + 16 * 16 + 2 * 16 * 24) + 13 * 16),
        ({**GPT2_SHAPE, "tie_embeddings": False}, 2 * (16 * 48 + 16 * 16 + 2 * 16 * 24) + 13 * 16),
        (LLAMA_SHAPE, 2 * (16 * 32 + 16 * 16 + 16 * 128 + 64 * 16) + 13 * 16),
    ],
)
def test_flops_per_token_are_6_per_matrix_weight_and_those_of_attention(
    shape: dict[str, Any], num_matrix_weights: int
) -> None:
    # attention: scores and mixing, 2 * 2 * context * width forward, three times that with backward, per layer
    assert make_model(**shape).flops_per_token() == 6 * num_matrix_weights + 2 * (3 * 2 * 2 * 4.5 * 16)


def test_weight_names_say_where_a_weight_is() -> None:
    parts = ["attention/output_projection", "attention/query_key_value", "mlp/contract", "mlp/expand"]
    expected = {f"block_{i}/{part}/{kind}" for i in range(2) for part in parts for kind in ("kernel", "bias")}
    norms = ["block_0/attention_norm", "block_0/mlp_norm", "block_1/attention_norm", "block_1/mlp_norm", "output_norm"]
    expected |= {f"{norm}/{kind}" for norm in norms for kind in ("gain", "bias")}
    expected |= {"token_embedding", "position_embedding"}
    assert set(make_model(**GPT2_SHAPE).named_weights()) == expected
    assert set(make_model(**GPT2_SHAPE).named_weights()) == expected  # a second model has the same names


# ---------------------------------------------------------------------------------------------------
# Initial weights
# ---------------------------------------------------------------------------------------------------


def test_initial_weights_depend_on_the_seed_and_the_name_only() -> None:
    first = weights_of(make_model(seed=5))
    keras.utils.set_random_seed(99)
    make_model(seed=6)
    again, deeper = weights_of(make_model(seed=5)), weights_of(make_model(seed=5, num_layers=3, tie_embeddings=False))
    other = weights_of(make_model(seed=6))
    assert first.keys() == again.keys() == other.keys()
    for name, value in first.items():
        np.testing.assert_array_equal(again[name], value)
        if value.ndim < 2:
            np.testing.assert_array_equal(value, np.ones(16))
            continue
        assert np.abs(np.corrcoef(other[name].ravel(), value.ravel())[0, 1]) < 0.3
        residual = "output_projection" in name or "contract" in name  # scaled by depth: 1 / sqrt(2 * num_layers)
        np.testing.assert_allclose(deeper[name] * np.sqrt(3 / 2 if residual else 1), value, rtol=1e-5)


def test_no_two_weights_start_from_the_same_numbers() -> None:
    shape = {"tie_embeddings": False, "position": "learned", "num_layers": 3, "mlp_dim": 16}
    matrices = [value for value in weights_of(make_model(16, context_length=16, **shape)).values() if value.ndim == 2]
    assert len(matrices) == 3 + 3 * 4
    for first, second in itertools.combinations(matrices, 2):
        assert np.abs(np.corrcoef(first.ravel()[:256], second.ravel()[:256])[0, 1]) < 0.3  # 4.8 sigma


@pytest.mark.parametrize("num_layers", [1, 4])
def test_initial_spread_is_that_of_gpt2(num_layers: int) -> None:
    shape = {"num_layers": num_layers, "model_dim": 64, "position": "learned", "norm": "layer_norm", "use_bias": True}
    config = ModelConfig(**shape, tie_embeddings=True, zero_init=False)
    for name, value in weights_of(GPT(config, 256)).items():
        if value.ndim < 2:
            np.testing.assert_array_equal(value, np.full(value.shape, float(name.endswith("gain"))))
            continue
        residual = "output_projection" in name or "contract" in name
        expected = 0.02 / math.sqrt(2 * num_layers) if residual else 0.02
        assert abs(value.std() / expected - 1) < 4 / math.sqrt(2 * value.size), name
        assert abs(value.mean()) < 4 * expected / math.sqrt(value.size), name


# --- Remat -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "jit_compile", "fuse"),
    [
        pytest.param("float32", False, False, marks=pytest.mark.slow),
        ("float32", True, False),
        ("float32", False, True),
        pytest.param("bfloat16", False, False, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_remat_gives_the_same_loss_and_gradients(
    activation: Any, precision: str, jit_compile: bool, fuse: bool
) -> None:
    shape = {"num_layers": 3, "num_heads": 2, "model_dim": 16, "context_length": 12, "activation": activation}
    config = ModelConfig(**shape, dropout=0.2, zero_init=False)
    tokens = tf.constant(np.random.default_rng(0).integers(0, 50, (4, 13)), tf.int32)
    found = []
    for remat in (False, True):
        model = GPT(config, 50, seed=1, precision=precision, remat=remat, fuse=fuse)
        loss = next_token_loss(model, dropout_seed=2, fuse=fuse)

        @tf.function(jit_compile=jit_compile)
        def gradients(model: GPT = model, loss: object = loss) -> list[tf.Tensor]:
            weights = [variable.value for variable in model.trainable_variables]
            with tf.GradientTape() as tape:
                sums, _ = loss({"tokens": tokens, "position": tf.range(4, dtype=tf.int64)}, tf.constant(0, tf.int64))  # type: ignore[operator]
            return [sums, *map(tf.convert_to_tensor, tape.gradient(sums, weights))]

        found.append([value.numpy() for value in gradients()])
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-6)


# --- Attention in blocks of queries, and compiled parts --------------------------------------------


def attention_case(time: int, precision: str) -> tuple[list[tf.Tensor], tf.Tensor, tf.Tensor]:
    """Queries, keys and values; who sees whom, with a second document in the second row; a gradient."""
    random = np.random.default_rng(time)
    inputs = [tf.constant(random.normal(size=(2, 3, time, 8)), precision) for _ in range(3)]
    visible = np.tril(np.ones((2, 1, time, time), bool))
    visible[1, 0, time // 3 :, : time // 3] = False
    return inputs, tf.constant(visible), tf.constant(random.normal(size=(2, 3, time, 8)), precision)


def attend(kernels: Kernels, inputs: list[tf.Tensor], visible: tf.Tensor, upstream: tf.Tensor, **kind: bool) -> Any:
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        output = kernels.attention(*inputs, visible, 0.3, **kind)
    return [output, *tape.gradient(output, inputs, upstream)]


@pytest.mark.parametrize("time", [12, 256, 300, 640])
@pytest.mark.parametrize("compiled", [False, True])
def test_attention_in_blocks_is_that_over_all_keys(time: int, compiled: bool) -> None:
    assert len(query_blocks(time)) == {12: 1, 256: 2, 300: 2, 640: 4}[time]
    inputs, visible, upstream = attention_case(time, "float64")
    wide = attend(Kernels(False), inputs, visible, upstream, causal=False)
    inputs, visible, upstream = attention_case(time, "float32")
    found = attend(Kernels(compiled), inputs, visible, upstream, causal=True)
    for one, other in zip(wide, found, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("compiled", [False, True])
def test_blocks_multiply_less_than_half_of_what_the_mask_throws_away(compiled: bool) -> None:
    inputs, visible, upstream = attention_case(512, "float32")
    kernels = Kernels(compiled)
    graph = tf.function(lambda: attend(kernels, inputs, visible, upstream, causal=True)).get_concrete_function().graph
    products = [op for op in graph.get_operations() if op.type == "BatchMatMulV2"]
    multiplied = 0
    for op in products:
        left = op.inputs[0].shape[-2 if op.get_attr("adj_x") else -1]
        multiplied += int(np.prod(op.outputs[0].shape)) * left
    assert multiplied == 0.625 * 6 * 2 * 3 * 512 * 512 * 8  # two products forward, four backward


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_compiled_gelu_and_norms_have_the_slopes_of_the_formulas(precision: str) -> None:
    random = np.random.default_rng(0)
    x, upstream = (tf.constant(random.normal(size=(2, 5, 32)) * 2, precision) for _ in range(2))
    gain, bias = (tf.constant(random.normal(size=32), tf.float32) for _ in range(2))
    functions: list[tuple[Callable[..., tf.Tensor], list[tf.Tensor]]] = [
        (lambda kernels, x: kernels.gelu(x), [x]),
        (lambda kernels, x, value: kernels.swiglu(x, value), [x, upstream]),
        (lambda kernels, x, *weights: kernels.norm(x, weights, True, 1e-5), [x, gain, bias]),
        (lambda kernels, x, *weights: kernels.norm(x, weights, True, 1e-5), [x, gain]),
        (lambda kernels, x, *weights: kernels.norm(x, weights, False, 1e-5), [x, gain]),
        (lambda kernels, x, *weights: kernels.norm(x, weights, False, 1e-5), [x, gain, bias]),
    ]
    rounding = {"float32": 2e-6, "bfloat16": 2**-7}[precision]
    for function, inputs in functions:
        found = []
        for compiled, dtype in ((False, tf.float32), (True, None)):  # float32 formulas beside what is compiled
            values = [tf.cast(value, dtype or value.dtype) for value in inputs]
            with tf.GradientTape() as tape:
                tape.watch(values)
                y = function(Kernels(compiled), *values)
            found.append([y, *tape.gradient(y, values, tf.cast(upstream, y.dtype))])
        for one, other in zip(*found, strict=True):
            np.testing.assert_allclose(
                tf.cast(other, tf.float32), one, rtol=2 * rounding, atol=rounding * np.abs(one).max()
            )


@pytest.mark.parametrize("changes", [{}, {"norm": "layer_norm", "use_bias": True}, {"activation": "swiglu"}])
def test_compiled_parts_compute_what_single_operations_do(changes: dict[str, object]) -> None:
    config = ModelConfig(num_layers=1, num_heads=2, model_dim=16, context_length=12, zero_init=False, **changes)  # type: ignore[arg-type]
    tokens = tf.constant(np.random.default_rng(0).integers(0, 50, (4, 13)), tf.int32)
    found = []
    for fuse in (False, True):
        model = GPT(config, 50, seed=1, fuse=fuse)
        loss = next_token_loss(model, fuse=fuse)
        weights = [variable.value for variable in model.trainable_variables]
        with tf.GradientTape() as tape:
            sums, _ = loss({"tokens": tokens, "position": tf.range(4, dtype=tf.int64)}, tf.constant(0, tf.int64))
        found.append([sums, *map(tf.convert_to_tensor, tape.gradient(sums, weights))])
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-4, atol=2e-6)
