"""Masks are a function of what is computed, never of where."""

import numpy as np
import pytest
import tensorflow as tf

from tfdp.config.sections import ModelConfig
from tfdp.models.dropout import KeyedDropout
from tfdp.models.gpt import GPT
from tfdp.ops.hashing import mix, sequence_keys

TIME, DIM = 16, 64


def keys_of(positions: list[int], step: int = 3, seed: int = 0) -> tf.Tensor:
    return sequence_keys(seed, tf.constant(step, tf.int64), tf.constant(positions, tf.int64))


def masks(positions: list[int], rate: float = 0.2, layer: str = "layer", step: int = 3, seed: int = 0) -> np.ndarray:
    return KeyedDropout(rate, layer).mask(keys_of(positions, step, seed), TIME, DIM).numpy()


def fraction_of_difference(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.mean(first != second))


def test_the_hash_is_a_bijection_equal_to_python_integers() -> None:
    def lowbias32(x: int) -> int:
        x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
        x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
        return x ^ (x >> 16)

    words = [0, 1, 2, 0x7FFFFFFF, 0x80000000, 0xDEADBEEF, 0xFFFFFFFF]
    assert mix(tf.constant(words, tf.uint32)).numpy().tolist() == [lowbias32(word) for word in words]
    assert len(np.unique(mix(tf.cast(tf.range(100_000), tf.uint32)))) == 100_000


def test_masks_of_all_pairs_of_sequences_differ_as_independent_ones_do() -> None:
    sequences = masks([0, 1, 2, 3, 1000, 2**31, 2**32, 2**32 + 1, 2**40])
    for i in range(len(sequences)):
        for j in range(i):
            assert 0.20 < fraction_of_difference(sequences[i], sequences[j]) < 0.45  # independent: 0.32


def test_the_same_key_gives_the_same_mask() -> None:
    np.testing.assert_array_equal(masks([5, 9, 5]), masks([5, 9, 5]))
    np.testing.assert_array_equal(masks([5, 9, 5])[0], masks([5, 9, 5])[2])


@pytest.mark.parametrize(
    "other",
    [{"layer": "other"}, {"step": 4}, {"step": 3 + 2**32}, {"seed": 1}, {"seed": 2**32}, {"seed": -1}],
    ids=str,
)
def test_layers_steps_and_seeds_have_masks_of_their_own(other: dict[str, int | str]) -> None:
    assert 0.28 < fraction_of_difference(masks([0, 1, 2, 3]), masks([0, 1, 2, 3], **other)) < 0.36  # type: ignore[arg-type]


@pytest.mark.parametrize("rate", [0.1, 0.2, 0.5, 0.9])
def test_the_kept_fraction_is_within_4_sigma_over_sequences_times_and_channels(rate: float) -> None:
    kept = masks(list(range(64)), rate)
    for axes in [(0, 1, 2), (0, 1), (0, 2), (1, 2)]:  # of all; of each channel; of each time; of each sequence
        fractions = kept.mean(axis=axes)
        num_draws = kept.size // np.size(fractions)
        num_sigmas = 4 if np.size(fractions) == 1 else 4.5  # the largest of up to 64 fractions
        assert np.abs(fractions - (1 - rate)).max() < num_sigmas * np.sqrt(rate * (1 - rate) / num_draws)


def test_neighbouring_elements_and_sequences_are_uncorrelated() -> None:
    kept = masks(list(range(64))).astype(np.float64) - 0.8
    for shifted in (np.roll(kept, 1, 0), np.roll(kept, 1, 1), np.roll(kept, 1, 2)):
        assert abs(np.mean(kept * shifted)) / 0.16 < 4 / np.sqrt(kept.size)


@pytest.mark.parametrize("seed", [0, 7, 2**40 + 5, -3])
def test_xla_gives_the_same_masks(seed: int) -> None:
    layer = KeyedDropout(0.2, "layer")

    def mask(step: tf.Tensor, positions: tf.Tensor) -> tf.Tensor:
        return layer.mask(sequence_keys(seed, step, positions), TIME, DIM)

    arguments = (tf.constant(2**33 + 1, tf.int64), tf.constant([0, 1, 2**35], tf.int64))
    compiled = tf.function(mask, jit_compile=True)(*arguments)
    np.testing.assert_array_equal(compiled, tf.function(mask)(*arguments))
    np.testing.assert_array_equal(compiled, mask(*arguments))


@pytest.mark.parametrize("dtype", [tf.float32, tf.bfloat16])
def test_kept_elements_are_scaled_and_the_others_are_zero(dtype: tf.DType) -> None:
    x = tf.cast(np.random.default_rng(0).normal(size=(2, TIME, DIM)), dtype)
    y = KeyedDropout(0.2, "layer", dtype=dtype.name)(x, keys_of([0, 1]))
    expected = np.where(masks([0, 1]), x.numpy() * tf.constant(1.25, dtype).numpy(), 0)
    assert y.dtype == dtype
    np.testing.assert_array_equal(y.numpy().astype(np.float32), expected.astype(np.float32))


def test_dropped_elements_get_no_gradient_even_from_infinities() -> None:
    x = tf.Variable(tf.fill([1, TIME, DIM], np.float32(np.inf)))
    with tf.GradientTape() as tape:
        y = KeyedDropout(0.2, "layer")(x, keys_of([0]))
    np.testing.assert_array_equal(tape.gradient(y, x).numpy(), np.where(masks([0]), np.float32(1.25), 0))
    np.testing.assert_array_equal(y.numpy() == 0, ~masks([0]))


@pytest.mark.parametrize("rate", [0.0, 0.2])
def test_without_keys_nothing_is_dropped(rate: float) -> None:
    x = tf.random.stateless_normal([2, TIME, DIM], seed=[0, 0])
    np.testing.assert_array_equal(KeyedDropout(rate, "layer")(x), x)


def test_a_sequence_alone_has_the_mask_it_has_in_a_batch() -> None:
    together = masks([4, 8, 15, 16])
    for row, position in enumerate([4, 8, 15, 16]):
        np.testing.assert_array_equal(masks([position])[0], together[row])


def test_the_mask_of_a_sequence_does_not_depend_on_its_replica() -> None:
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    with strategy.scope():
        layer = KeyedDropout(0.2, "layer")
    for order in ([0, 1, 2, 3], [2, 3, 0, 1]):
        shares = strategy.experimental_distribute_values_from_function(
            lambda context, order=order: tf.constant(order, tf.int64)[context.replica_id_in_sync_group * 2 :][:2]
        )

        @tf.function
        def run(shares: tf.Tensor) -> tf.Tensor:
            return strategy.run(
                lambda positions: layer(tf.ones([2, TIME, DIM]), sequence_keys(0, tf.constant(3, tf.int64), positions)),
                args=(shares,),
            )

        outputs = np.concatenate([part.numpy() for part in strategy.experimental_local_results(run(shares))])
        np.testing.assert_array_equal(outputs > 0, masks(order))


def test_a_gpt_drops_after_the_embedding_and_each_residual_branch_with_keys_of_their_own() -> None:
    model = GPT(ModelConfig(num_layers=3, num_heads=2, model_dim=8, context_length=8, dropout=0.2), 11)
    layers = [layer for layer in model._flatten_layers() if isinstance(layer, KeyedDropout)]
    assert len(layers) == 7
    assert len({layer.layer_key for layer in layers}) == 7
    assert {layer.rate for layer in layers} == {0.2}


def test_a_gpt_gives_a_sequence_the_same_logits_in_any_batch_and_others_in_another_step() -> None:
    config = ModelConfig(
        num_layers=2, num_heads=2, model_dim=8, context_length=8, dropout=0.2, init_stddev=0.3, zero_init=False
    )
    model = GPT(config, 11)
    tokens = tf.constant(np.random.default_rng(0).integers(0, 11, (4, 8)), tf.int32)
    batch = model(tokens, keys_of([6, 7, 8, 9])).numpy()
    alone = model(tokens[2:3], keys_of([8])).numpy()
    np.testing.assert_allclose(alone[0], batch[2], atol=1e-5)
    assert np.abs(model(tokens, keys_of([6, 7, 8, 9], step=4)).numpy() - batch).max() > 0.1
    assert np.abs(model(tokens).numpy() - batch).max() > 0.1
