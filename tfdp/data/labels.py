"""The classes of examples: which there are in a split, and how often each."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tfdp.data.shards import Split
from tfdp.data.tokenizers.tokenizer import Tokenizer, markup_ids
from tfdp.system.exits import ConfigError
from tfdp.system.messages import shown
from tfdp.tasks.flags import UNSCORED


class Found(NamedTuple):
    """A label of an example."""

    ids: tuple[int, ...]  # with the end of text behind it
    document: int  # of the split


def label_ids(labels: Sequence[str], tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    """The tokens of each label, with the end of text that stands behind it."""
    return [(*markup_ids(tokenizer, label).tolist(), tokenizer.end_of_text) for label in labels]


def labels_in(split: Split, tokenizer: Tokenizer) -> list[str]:
    """The labels of a split in the order of their names."""
    return sorted({tokenizer.decode(np.array(found.ids[:-1])) for found in _each(split)})


def count_labels(split: Split, labels: Sequence[str], ids: Sequence[tuple[int, ...]]) -> np.ndarray:
    """Examples of each class, (classes,). Raises `ConfigError` for one that is of none, naming its document."""
    place = {each: number for number, each in enumerate(ids)}
    counts = np.zeros(len(labels), np.int64)
    for found in _each(split):
        if found.ids not in place:
            start = int(split.document_starts[found.document])
            (name,) = split.documents_between(start, start + 1)
            listed = shown(", ".join(labels))
            raise ConfigError(f"labels ({listed}) must hold the label of each example, but not that of {shown(name)}")
        counts[place[found.ids]] += 1
    return counts


def _each(split: Split) -> list[Found]:
    """The label of each example: the tokens behind the last that is only seen."""
    starts = np.append(split.document_starts, split.num_tokens)
    found = []
    for document, (start, stop) in enumerate(zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)):
        width = stop - start
        (row,) = split.read(np.array([start]), np.array([width]), width, with_flags=True)
        seen = np.flatnonzero(row & UNSCORED)
        found.append(Found(tuple(row[seen[-1] + 1 if len(seen) else 0 :].tolist()), document))
    return found
