"""Classification: each example of a row belongs to one class, which is told of it behind its text."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import tensorflow as tf

from tfdp.ops.visibility import ByDocument
from tfdp.reporting.pictures import confusion_picture
from tfdp.tasks.answers import read_examples
from tfdp.tasks.task import Batch, Metric, Rows

NUM_BINS = 15  # of confidence, in the calibration error (Guo et al. 2017)


@dataclass(frozen=True)
class Classification:
    """The class of an example, from all of its text.

    Attributes:
      labels: names of the classes.
      label_ids: the tokens of each name, with the end of text behind it.
      head: where the scores of the classes come from. tokens: those of the first token of each name, among all
        tokens of the vocabulary; linear: a table with a row for each class.
      weights: of the classes in training; None: 1.
    """

    best: ClassVar[str] = "macro_f1"
    best_is_lowest: ClassVar[bool] = False
    labels: Sequence[str]
    label_ids: Sequence[Sequence[int]]
    head: Literal["tokens", "linear"] = "tokens"
    weights: Sequence[float] | None = None

    @property
    def num_statistics(self) -> int:
        return len(self.labels) ** 2 + 3 * NUM_BINS

    def batch(self, rows: Rows) -> Batch:
        """Targets are the first tokens of labels, or the classes, at the last token of each text."""
        examples = read_examples(rows["tokens"])
        classes = self.classes(rows)
        scored = [ids[0] for ids in self.label_ids] if self.head == "tokens" else range(len(self.labels))
        is_label = classes >= 0
        targets = tf.where(is_label, tf.gather(tf.constant(list(scored)), tf.maximum(classes, 0)), -1)
        weights = None
        if self.weights is not None:
            table = tf.constant(list(self.weights), tf.float32)
            weights = tf.where(is_label, tf.gather(table, tf.maximum(classes, 0)), 0.0)
        return Batch(examples.inputs, targets, ByDocument(examples.starts), weights)

    def classes(self, rows: Rows) -> tf.Tensor:
        """The class of the example whose text ends at a token, int32 (rows, time); -1 everywhere else."""
        examples = read_examples(rows["tokens"])
        learned = examples.is_learned
        before = tf.pad(learned, [[0, 0], [1, 0]])[:, :-1]
        begins = learned & (~before | examples.starts)
        longest, time = max(map(len, self.label_ids)), examples.labels.shape[1]
        names = np.array([[*ids, *[-1] * (longest - len(ids))] for ids in self.label_ids], np.int32)
        padded = tf.pad(examples.labels, [[0, 0], [0, longest]], constant_values=-1)
        matches = begins[..., tf.newaxis]  # (rows, time, classes)
        for place in range(longest):
            matches &= (padded[:, place : place + time, tf.newaxis] == names[:, place]) | (names[:, place] < 0)
        return tf.where(
            tf.reduce_any(matches, axis=-1), tf.argmax(tf.cast(matches, tf.int32), axis=-1, output_type=tf.int32), -1
        )

    def scores(self, features: tf.Tensor, table: Any) -> tf.Tensor:
        """Logits of the classes, float32 (rows, time, classes)."""
        chosen = tf.convert_to_tensor(table)
        if self.head == "tokens":
            chosen = tf.gather(chosen, [ids[0] for ids in self.label_ids])
        return tf.einsum("rtd,cd->rtc", tf.cast(features, tf.float32), tf.cast(chosen, tf.float32))

    def statistics(self, rows: Rows, features: tf.Tensor, table: Any) -> tf.Tensor:
        """Of each row: the confusion matrix (true, predicted), and of each bin of confidence the number of examples,
        the sum of their confidences, and how many are right."""
        num, classes = len(self.labels), self.classes(rows)
        probabilities = tf.nn.softmax(self.scores(features, table))
        predicted = tf.argmax(probabilities, axis=-1, output_type=tf.int32)
        confidence, is_label = tf.reduce_max(probabilities, axis=-1), classes >= 0
        cells = tf.one_hot(tf.where(is_label, classes * num + predicted, -1), num * num)
        bins = tf.cast(tf.minimum(confidence * NUM_BINS, NUM_BINS - 1), tf.int32)
        binned = tf.one_hot(tf.where(is_label, bins, -1), NUM_BINS)
        right = tf.cast(predicted == classes, tf.float32)[..., tf.newaxis]
        parts = [cells, binned, binned * confidence[..., tf.newaxis], binned * right]
        return tf.concat([tf.reduce_sum(part, axis=1) for part in parts], axis=1)

    def metrics(self, totals: Mapping[str, Any]) -> dict[str, Metric]:
        loss = totals["loss"] / totals["targets"] if totals["targets"] else math.nan
        found = {"loss": Metric(loss, f"loss {loss:.4f}")}
        if "statistics" not in totals:
            return found
        num = len(self.labels)
        confusion = np.reshape(totals["statistics"][: num * num], (num, num))
        for name, value in scores_of(confusion).items():
            found[name] = Metric(value, f"{name.replace('_', ' ')} {value:.4f}")
        error = calibration_error(np.reshape(totals["statistics"][num * num :], (3, NUM_BINS)))
        found["calibration_error"] = Metric(error, f"calibration error {error:.4f}")
        for number, label in enumerate(self.labels):
            of_class = confusion[number, number]
            for name, total in (("precision", confusion[:, number].sum()), ("recall", confusion[number].sum())):
                value = of_class / total if total else 0.0
                found[f"{name}/{label}"] = Metric(value, "")  # a line for each class would be long
        return found

    def exhibits(self, totals: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """The confusion matrix as a picture, uint8 (height, width, 3)."""
        if "statistics" not in totals:
            return {}
        num = len(self.labels)
        confusion = np.reshape(totals["statistics"][: num * num], (num, num))
        return {"confusion": confusion_picture(confusion, self.labels)}


def scores_of(confusion: np.ndarray) -> dict[str, float]:
    """Accuracy, and the mean of F1 over the classes that occur (macro F1): of a matrix (true, predicted)."""
    right, true, predicted = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    occurs = true + predicted > 0
    f1 = 2 * right[occurs] / (true + predicted)[occurs]
    return {
        "macro_f1": float(f1.mean()) if occurs.any() else math.nan,
        "accuracy": float(right.sum() / confusion.sum()) if confusion.sum() else math.nan,
    }


def calibration_error(bins: np.ndarray) -> float:
    """The expected calibration error (Guo et al. 2017) of (3, bins): counts, sums of confidences, right ones."""
    counts, confidences, right = bins
    return float(np.abs(confidences - right).sum() / counts.sum()) if counts.sum() else math.nan
