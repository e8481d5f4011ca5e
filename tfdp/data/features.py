"""Features of TensorFlow Datasets as fields of records: texts, classes by name, numbers, lists and objects of these.

Only the reading process uses this (`datasets.py`): the values become JSON there.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tfdp.data import records
from tfdp.system.exits import ConfigError
from tfdp.system.messages import shown

Convert = Callable[[Any], Any]  # what as_numpy gives -> what JSON has; raises ValueError "must ..."


class Field:
    """A feature that is wanted, by its name: a.b is the feature a.b, else the feature b of the features a.

    Args:
      name: of it.
      features: all that the data set has, by name.
      where: they are, for messages.

    Raises:
      ConfigError: there is no such feature, or it is of a kind that no record has.
    """

    def __init__(self, name: str, features: Mapping[str, Any], where: str) -> None:
        place = _find(features, name)
        if place is None:
            listed = ", ".join(map(shown, sorted(features)[:20])) or "none"
            raise ConfigError(f"{where} must have the field {shown(name)}: it has {listed}")
        self.name, self.place = name, place
        feature: Any = features
        for part in place:
            feature = feature[part]
        try:
            self._convert = _convert_of(feature)
        except TypeError as error:
            rule = "must be text, classes, numbers, truth values, or lists or objects of these"
            raise ConfigError(f"{where}, field {shown(name)} {rule}, and has {error}") from None

    def value(self, example: Any, where: str) -> Any:
        """The value as JSON has it. Raises `ConfigError` "`where` field NAME must ..."."""
        for part in self.place:
            example = example[part]
        try:
            return self._convert(example)
        except ValueError as error:
            raise ConfigError(f"{where} field {shown(self.name)} {error}") from None


def _find(features: Mapping[str, Any], name: str) -> Sequence[str] | None:
    if name in features:
        return [name]
    for first, rest in records.splits(name):
        if first in features and (found := _find(_below(features[first]), rest)):
            return [first, *found]
    return None


def _below(feature: Any) -> Mapping[str, Any]:
    from tensorflow_datasets import features as kinds

    return feature if isinstance(feature, kinds.FeaturesDict) else {}


def _convert_of(feature: Any) -> Convert:
    """What makes JSON of the values of a feature. Raises `TypeError` with the kind of one that has no such values."""
    from tensorflow_datasets import features as kinds

    if isinstance(feature, kinds.FeaturesDict):
        inner = {name: _convert_of(each) for name, each in sorted(feature.items())}  # they come unsorted
        return lambda value: {name: convert(value[name]) for name, convert in inner.items()}
    if isinstance(feature, kinds.Sequence) and not isinstance(feature, kinds.Video):
        convert = _convert_of(feature.feature)
        return lambda value: [convert(each) for each in _items(value)]
    if isinstance(feature, kinds.ClassLabel):
        return _class_of(feature)
    has_encoder = isinstance(feature, kinds.Text) and feature.encoder is not None  # whose values are its ids
    if not isinstance(feature, kinds.Tensor) or isinstance(feature, kinds.Audio) or has_encoder:
        raise TypeError(type(feature).__name__)
    info = feature.get_tensor_info()
    if np.dtype(info.np_dtype).kind == "c":
        raise TypeError("complex numbers")
    return _plain_of(info)


def _items(value: Any) -> list[Any]:
    """The elements of a sequence: that of an object comes as an object of sequences."""
    if isinstance(value, dict):
        columns = [_items(each) for each in value.values()]
        return [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]
    return value.to_list() if hasattr(value, "to_list") else list(value)  # the first are ragged


def _class_of(feature: Any) -> Convert:
    """The name of a class; its number where it has no name."""
    names = feature.names if feature.num_classes is not None else []
    if names == [str(number) for number in range(len(names))]:
        names = []

    def convert(value: Any) -> int | str:
        if value < 0:  # which stands for none in TensorFlow Datasets
            raise ValueError(f"must have a class, and has none ({value})")
        return names[value] if names else int(value)

    return convert


def _plain_of(info: Any) -> Convert:
    """Numbers, truth values and texts, and lists of them."""
    is_told = info.optional and np.dtype(info.np_dtype).kind in "if"  # a text that is missing is empty, as others are
    missing = info.default_value if is_told else None

    def convert(value: Any) -> Any:
        value = value.tolist() if hasattr(value, "tolist") else value
        if isinstance(value, list):
            return [convert(each) for each in value]
        if isinstance(value, bytes):
            try:
                return value.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"must be UTF-8: {error.reason} at byte {error.start}") from None
        if missing is not None and value == missing:  # as TensorFlow Datasets stores None
            raise ValueError(f"must have a value, and has none ({value})")
        return value

    return convert
