"""Pictures for TensorBoard: what a confusion matrix looks like, for few classes, many, and names of any length."""

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from tfdp.reporting.pictures import confusion_picture
from tfdp.reporting.writer import Boards


def colours(picture: np.ndarray) -> set[tuple[int, ...]]:
    return set(map(tuple, picture.reshape(-1, 3).tolist()))


def test_a_cell_has_the_shade_of_its_share_of_its_row() -> None:
    picture = confusion_picture(np.array([[3.0, 1.0], [0.0, 1000.0]]), ["ham", "spam"])
    assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3
    full, half = (8, 48, 107), (132, 152, 181)
    assert {(255, 255, 255), full, (70, 100, 144), (193, 203, 218)} <= colours(picture)  # 0, 1, 3/4 and 1/4
    assert half not in colours(picture)
    assert half in colours(confusion_picture(np.array([[500, 500], [1, 0]]), ["ham", "spam"]))
    other = confusion_picture(np.array([[300.0, 100.0], [0.0, 1000.0]]), ["ham", "spam"])
    assert other.shape != picture.shape or (other != picture).any()  # the same shares, other counts
    empty = confusion_picture(np.zeros((2, 2)), ["ham", "spam"])
    assert full not in colours(empty)


def test_names_stand_at_rows_and_columns() -> None:
    counts = np.eye(2)
    pictures = [confusion_picture(counts, labels) for labels in (["ab", "cd"], ["cd", "ab"])]
    assert pictures[0].shape == pictures[1].shape and (pictures[0] != pictures[1]).any()


@pytest.mark.parametrize("label", ["", "a", "läuft 猫", "two\nlines", "long " * 400])
def test_names_of_any_length(label: str) -> None:
    height, width, _ = confusion_picture(np.eye(2), [label, "b"]).shape
    assert 80 < height <= 320 and 80 < width <= 320


@pytest.mark.parametrize("num", [2, 30, 31, 100, 2000])
def test_any_number_of_classes(num: int) -> None:
    picture = confusion_picture(np.eye(num), [f"class {number}" for number in range(num)])
    height, width, _ = picture.shape
    assert max(height, width) < (2200 if num == 2000 else 1200)
    assert (picture == (8, 48, 107)).all(axis=2).sum() >= num  # the diagonal


def test_a_picture_reaches_tensorboards_file(tmp_path: Path) -> None:
    picture = confusion_picture(np.eye(3), ["a", "b", "c"])
    boards = Boards(tmp_path)
    boards.exhibit("confusion", picture, 7)
    boards.close()
    assert pictures_in(tmp_path / "validation") == {("confusion", 7): picture.shape}


def pictures_in(folder: Path) -> dict[tuple[str, int], tuple[int, ...]]:
    """The shapes of the pictures in TensorBoard's files, by name and step."""
    found = {}
    for path in folder.glob("events*"):
        for record in tf.data.TFRecordDataset(str(path)):
            event = tf.compat.v1.Event.FromString(record.numpy())
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name == "images":
                    encoded = tf.make_ndarray(value.tensor)[2]
                    found[value.tag, event.step] = tuple(tf.io.decode_png(encoded, channels=3).shape)
    return found
