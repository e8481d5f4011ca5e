"""Classes of examples: where they stand in a row, their losses with weights, and the metrics of a confusion matrix."""

import numpy as np
import pytest
import tensorflow as tf

from tfdp.config.sections import ModelConfig
from tfdp.models.classifier import CLASS_TABLE, Classifier
from tfdp.models.gpt import GPT
from tfdp.ops.cross_entropy import cross_entropy, projected_cross_entropy
from tfdp.reporting.pictures import confusion_picture
from tfdp.tasks.classification import NUM_BINS, Classification, calibration_error, scores_of
from tfdp.tasks.flags import STARTS, UNSCORED
from tfdp.tasks.task import evaluation_sums, row_losses

END, NO, YES = 255, (110, 111, 255), (121, 255)  # "no", "y"
MODEL = ModelConfig(num_layers=1, num_heads=2, model_dim=16, context_length=12, zero_init=False)


def rows() -> dict[str, tf.Tensor]:
    """Two rows: "ab" is no and "c" is y; "d" is y, and the rest is absent."""
    start, seen = END | STARTS, [ord(each) | UNSCORED for each in "abcd"]
    first = [start, *seen[:2], *NO[:2], start, seen[2], *YES, -1, -1, -1, -1]
    second = [start, seen[3], *YES, *[-1] * 9]
    tokens = np.array([first, second], np.int32)
    tokens[0, 5] = start  # which ends the first example, and is learned
    return {"tokens": tf.constant(tokens), "position": tf.range(2, dtype=tf.int64), "source": tf.constant([0, 1])}


def task(**options: object) -> Classification:
    return Classification(("no", "y"), (NO, YES), **options)  # type: ignore[arg-type]


def test_a_class_stands_at_the_last_token_of_its_text() -> None:
    expected = np.full((2, 12), -1)
    expected[0, 2], expected[0, 6], expected[1, 1] = 0, 1, 1
    np.testing.assert_array_equal(task().classes(rows()), expected)
    tokens = np.where(expected >= 0, np.where(expected == 0, NO[0], YES[0]), -1)
    np.testing.assert_array_equal(task().batch(rows()).targets, tokens)
    np.testing.assert_array_equal(task(head="linear").batch(rows()).targets, expected)
    weights = task(weights=(3.0, 0.5)).batch(rows()).weights
    np.testing.assert_array_equal(weights, np.where(expected == 0, 3.0, np.where(expected == 1, 0.5, 0.0)))


@pytest.mark.parametrize("chunk_size", [0, 5])
@pytest.mark.parametrize("fuse", [False, True])
def test_weighted_losses_have_the_gradient_of_their_sum(chunk_size: int, fuse: bool) -> None:
    generator = np.random.default_rng(0)
    features = tf.constant(generator.normal(size=(2, 6, 8)), tf.float32)
    table = tf.constant(generator.normal(size=(10, 8)), tf.float32)
    targets = tf.constant(generator.integers(-1, 10, (2, 6)), tf.int32)
    weights = tf.constant(generator.uniform(0, 3, (2, 6)), tf.float32)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch([features, table])
        found = tf.reduce_sum(projected_cross_entropy(features, table, targets, chunk_size, fuse, weights))
        plain = cross_entropy(tf.einsum("rtd,vd->rtv", features, table), targets)
        expected = tf.reduce_sum(plain * weights)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    for each in (features, table):
        np.testing.assert_allclose(tape.gradient(found, each), tape.gradient(expected, each), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("head", ["tokens", "linear"])
def test_statistics_are_the_confusion_matrix_and_the_confidences(head: str) -> None:
    model = GPT(MODEL, 256) if head == "tokens" else Classifier(2, MODEL, 256)
    if head == "linear":
        model.named_weights()[CLASS_TABLE].assign(np.random.default_rng(0).normal(size=(2, 16)).astype(np.float32))
    own = task(head=head)
    given = rows()
    sums = evaluation_sums(own, model, num_sources=2)(given).numpy()
    batch = own.batch(given)
    features = model.features(batch.inputs, None, batch.attention)
    probabilities = tf.nn.softmax(own.scores(features, model.output_table)).numpy()
    confusion, confidences = np.zeros((2, 2, 2)), np.zeros(2)
    for row, place, true in ((0, 2, 0), (0, 6, 1), (1, 1, 1)):
        confusion[true, int(probabilities[row, place].argmax()), row] += 1
        confidences[row] += probabilities[row, place].max()
    np.testing.assert_array_equal(sums[2:6], confusion.reshape(4, 2))
    bins = sums[6:].reshape(3, NUM_BINS, 2)
    np.testing.assert_array_equal(bins[0].sum(axis=0), [2, 1])
    np.testing.assert_allclose(bins[1].sum(axis=0), confidences, rtol=1e-6)
    np.testing.assert_array_equal(bins[2].sum(axis=0), np.trace(confusion))
    losses, counts = row_losses(own, model)(given, tf.constant(0, tf.int64))
    np.testing.assert_allclose(sums[0], losses, rtol=1e-6)
    np.testing.assert_array_equal(sums[1], counts)


def test_a_table_of_classes_leaves_the_model_as_it_was() -> None:
    plain, own = GPT(MODEL, 256), Classifier(3, MODEL, 256)
    tokens = tf.constant([[1, 2, 3]])
    np.testing.assert_array_equal(own.features(tokens), plain.features(tokens))
    np.testing.assert_array_equal(own(tokens), plain(tokens))
    weights = {name: variable.numpy() for name, variable in plain.named_weights().items()}
    again = Classifier(3, MODEL, 256, given=weights)
    assert again.named_weights().keys() == {*weights, CLASS_TABLE}
    assert plain.flops_per_token() - own.flops_per_token() == 6 * (256 - 3) * MODEL.model_dim  # of the projections
    np.testing.assert_array_equal(again(tokens), plain(tokens))


def test_the_confusion_matrix_is_shown() -> None:
    own = task()
    totals = {"loss": 1.0, "targets": 4, "statistics": np.zeros(own.num_statistics)}
    totals["statistics"][:4] = (3, 1, 0, 2)  # type: ignore[index]
    picture = own.exhibits(totals)["confusion"]
    np.testing.assert_array_equal(picture, confusion_picture(np.array([[3, 1], [0, 2]]), ["no", "y"]))
    assert own.exhibits({"loss": 1.0, "targets": 4}) == {}


def test_metrics_are_those_of_their_definitions() -> None:
    found = scores_of(np.array([[5.0, 1.0, 0.0], [2.0, 1.0, 0.0], [0.0, 0.0, 0.0]]))
    assert found["accuracy"] == pytest.approx(6 / 9)
    f1 = [2 * 5 / (6 + 7), 2 * 1 / (3 + 2)]  # of the two classes that occur
    assert found["macro_f1"] == pytest.approx(np.mean(f1))
    bins = np.zeros((3, NUM_BINS))
    bins[:, 3], bins[:, 14] = (4, 1.2, 2), (6, 5.7, 6)
    assert calibration_error(bins) == pytest.approx((0.8 + 0.3) / 10)
    assert np.isnan(calibration_error(np.zeros((3, NUM_BINS))))
