"""How the tokens of a split become sequences of context_length + 1: packed end to end, or one document at a time.

Under both, every token but the first of the split is a target exactly once.
"""

from typing import Literal, Protocol

import numpy as np

from tfdp.data.shards import Split

Form = Literal["packed", "documents"]


class Sequences(Protocol):
    """Numbered rows of token ids."""

    num_sequences: int
    width: int  # tokens of a row, context_length + 1

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """Sequences by index: int32, shape (len(indices), context_length + 1), `ABSENT` where nothing is left."""
        ...

    def documents_of(self, index: int) -> list[str]:
        """The names of the documents that have a token in a sequence, in order."""
        ...


class PackedSequences:
    """Sequence w starts at token w * context_length, wherever documents begin and end.

    Neighbours share one token, which is the last target of one and the first input of the other.
    """

    def __init__(self, split: Split, context_length: int) -> None:
        self._split, self._context_length = split, context_length
        self.width = context_length + 1
        self.num_sequences = max(0, -(-(split.num_tokens - 1) // context_length))

    def rows(self, indices: np.ndarray) -> np.ndarray:
        starts = np.asarray(indices, dtype=np.int64) * self._context_length
        return self._split.read(starts, np.full(len(starts), self.width), self.width)

    def documents_of(self, index: int) -> list[str]:
        begin = index * self._context_length
        return self._split.documents_between(begin, begin + self._context_length + 1)


class DocumentSequences:
    """A document begins a sequence of its own, with the end of text before it; a longer one takes several.

    The sequences of a document share one token with their neighbours, as packed ones do; the last ends with the end
    of text, and what is left of it is absent.
    """

    def __init__(self, split: Split, context_length: int) -> None:
        self._split, self._context_length = split, context_length
        self.width = context_length + 1
        self._starts = split.document_starts
        self._ends = np.append(self._starts[1:], split.num_tokens) - 1  # of each, its end of text
        num_targets = self._ends - self._starts + 1
        self._first = np.concatenate([[0], np.cumsum(-(-num_targets // context_length))])
        self.num_sequences = int(self._first[-1])

    def rows(self, indices: np.ndarray) -> np.ndarray:
        _, begin, stop = self._locate(np.asarray(indices, dtype=np.int64))
        return self._split.read(begin, stop - begin, self.width)

    def documents_of(self, index: int) -> list[str]:
        (document,), _, _ = self._locate(np.array([index]))
        start = int(self._starts[document])
        return self._split.documents_between(start, start + 1)

    def _locate(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The document of each sequence, and its tokens from begin to stop."""
        document = np.searchsorted(self._first, indices, side="right") - 1
        begin = self._starts[document] - 1 + (indices - self._first[document]) * self._context_length
        return document, begin, np.minimum(begin + self._context_length, self._ends[document]) + 1


def sequences_of(split: Split, context_length: int, form: Form) -> Sequences:
    """The sequences of a split in the form of `data.sequences`."""
    return PackedSequences(split, context_length) if form == "packed" else DocumentSequences(split, context_length)
