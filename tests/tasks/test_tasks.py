"""What a task may ask of a model: which targets count, and who sees whom."""

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import pytest
import tensorflow as tf

from tfdp.config.sections import ModelConfig
from tfdp.models.gpt import GPT
from tfdp.ops.visibility import CAUSAL, ByDocument, Prefix, visibility
from tfdp.tasks.causal_lm import CausalLM, next_token_losses
from tfdp.tasks.task import Batch, Metric, Rows, row_losses, source_losses

TIME, VOCAB = 8, 11
MODEL = ModelConfig(num_layers=2, num_heads=2, model_dim=16, context_length=TIME, zero_init=False)
LENGTHS = [0, 1, 5, 8]


class PrefixLM:
    """As a recipe's own: rows whose first tokens are given, and of which only the rest is learned."""

    best: ClassVar[str] = "loss"
    best_is_lowest: ClassVar[bool] = True

    def batch(self, rows: Rows) -> Batch:
        inputs, targets = rows["tokens"][:, :-1], rows["tokens"][:, 1:]
        given = tf.range(1, TIME + 1) < rows["length"][:, tf.newaxis]
        return Batch(inputs, tf.where(given, -1, targets), Prefix(rows["length"]))

    def metrics(self, totals: Mapping[str, float]) -> dict[str, Metric]:
        return CausalLM().metrics(totals)


def rows() -> dict[str, tf.Tensor]:
    tokens = np.random.default_rng(0).integers(0, VOCAB, (len(LENGTHS), TIME + 1), np.int32)
    return {"tokens": tf.constant(tokens), "length": tf.constant(LENGTHS, tf.int32)}


def influence(model: GPT, attention: object, row: int) -> np.ndarray:
    """Whether the features of a row's token (rows) change with the id of another (columns)."""
    tokens = rows()["tokens"][:, :-1].numpy()
    before = model.features(tf.constant(tokens), None, attention).numpy()[row]  # type: ignore[arg-type]
    columns = []
    for position in range(TIME):
        changed = tokens.copy()
        changed[row, position] = (changed[row, position] + 1) % VOCAB
        after = model.features(tf.constant(changed), None, attention).numpy()[row]  # type: ignore[arg-type]
        columns.append(np.any(after != before, axis=1))
    return np.stack(columns, axis=1)


@pytest.mark.parametrize("fuse", [False, True])
def test_a_prefix_sees_itself_whole_and_the_rest_what_is_before(fuse: bool) -> None:
    model = GPT(MODEL, VOCAB, fuse=fuse)
    past = np.tril(np.ones((TIME, TIME), bool))
    for row, length in enumerate(LENGTHS):
        expected = past.copy()
        expected[:length, :length] = True
        np.testing.assert_array_equal(influence(model, Prefix(tf.constant(LENGTHS)), row), expected)
        np.testing.assert_array_equal(influence(model, CAUSAL, row), past)


@pytest.mark.parametrize("fuse", [False, True])
def test_a_prefix_of_one_token_is_causal(fuse: bool) -> None:
    model, tokens = GPT(MODEL, VOCAB, fuse=fuse), rows()["tokens"][:, :-1]
    ones = Prefix(tf.ones([len(LENGTHS)], tf.int32))
    np.testing.assert_allclose(model.features(tokens, None, ones), model.features(tokens), rtol=1e-5, atol=1e-6)


def test_only_what_sees_nothing_later_is_causal() -> None:
    starts = tf.zeros([2, TIME], tf.bool)
    for kind, is_causal in ((CAUSAL, True), (ByDocument(starts), True), (Prefix(tf.constant([3, 4])), False)):
        assert visibility(kind, TIME).is_causal == is_causal


def test_a_target_that_is_left_out_keeps_its_input() -> None:
    model, given = GPT(MODEL, VOCAB), rows()
    with tf.GradientTape() as tape:
        sums, counts = source_losses(row_losses(PrefixLM(), model))(given, tf.constant(0, tf.int64))
    gradient = tf.convert_to_tensor(tape.gradient(sums, model.token_embedding.value))
    targets = PrefixLM().batch(given).targets.numpy()
    assert int(counts[0]) == (targets >= 0).sum() == sum(TIME - max(0, length - 1) for length in LENGTHS)

    logits = model(given["tokens"][:, :-1], attention=Prefix(given["length"])).numpy()
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(np.maximum(targets, 0), logits).numpy()
    np.testing.assert_allclose(float(sums[0]), losses[targets >= 0].sum(), rtol=1e-5)
    # the last row is a prefix whole: it teaches its last token, by way of all its inputs
    last = given["tokens"][-1:, :-1]
    alone = {"tokens": given["tokens"][-1:], "length": given["length"][-1:]}
    with tf.GradientTape() as tape:
        sums, _ = source_losses(row_losses(PrefixLM(), model))(alone, tf.constant(0, tf.int64))
    gradient = tf.convert_to_tensor(tape.gradient(sums, model.token_embedding.value)).numpy()
    assert set(np.flatnonzero(np.any(gradient != 0, axis=1))) == set(last.numpy().ravel().tolist())


def test_the_causal_task_gives_what_it_gave_before_there_were_others() -> None:
    model, given = GPT(MODEL, VOCAB), {**rows(), "position": tf.range(len(LENGTHS), dtype=tf.int64)}
    sums, counts = next_token_losses(model)(given, tf.constant(0, tf.int64))
    logits = model(given["tokens"][:, :-1])
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(given["tokens"][:, 1:], logits)
    np.testing.assert_allclose(sums, tf.reduce_sum(losses, axis=1), rtol=1e-5)
    np.testing.assert_array_equal(counts, [TIME] * len(LENGTHS))
