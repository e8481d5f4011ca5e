"""The classes of examples, and how often each occurs in a split."""

from collections.abc import Sequence

import numpy as np

from tfdp.data.shards import Split
from tfdp.data.tokenizers.tokenizer import Tokenizer, markup_ids
from tfdp.system.exits import ConfigError
from tfdp.system.messages import shown
from tfdp.tasks.flags import UNSCORED


def label_ids(labels: Sequence[str], tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    """The tokens of each label, with the end of text that stands behind it."""
    return [(*markup_ids(tokenizer, label).tolist(), tokenizer.end_of_text) for label in labels]


def label_room(labels: Sequence[str]) -> int:
    """Tokens of a row that a text leaves free for its label, whatever that is and whatever the tokenizer: so many as
    the longest one has bytes, and two more, for the end of text and a token that a tokenizer may put first."""
    return max((len(label.encode()) for label in labels), default=0) + 2


def count_labels(split: Split, labels: Sequence[str], ids: Sequence[tuple[int, ...]]) -> np.ndarray:
    """Examples of each class, (classes,). Raises `ConfigError` for one that is of none, naming its document."""
    width = max(map(len, ids)) + 1  # and one token before, which is only seen
    stops = np.append(split.document_starts[1:], split.num_tokens)
    starts = np.maximum(stops - width, 0)
    ends = split.read(starts, stops - starts, width, with_flags=True)
    for short in np.flatnonzero(stops - starts < width):  # at the beginning of the split
        ends[short] = np.roll(ends[short], width - int(stops[short] - starts[short]))
    found = np.full(len(ends), -1)
    for number, label in enumerate(ids):
        is_label = np.all(ends[:, width - len(label) :] == label, axis=1)
        found[is_label & (ends[:, width - len(label) - 1] & UNSCORED != 0)] = number
    if np.any(found < 0):
        start = int(split.document_starts[int(np.argmax(found < 0))])
        (name,) = split.documents_between(start, start + 1)
        listed = shown(", ".join(labels))
        raise ConfigError(f"labels ({listed}) must hold the label of each example, but not that of {shown(name)}")
    return np.bincount(found, minlength=len(labels))
