"""How the tokens of a split become sequences of context_length + 1: packed end to end, or by documents.

Packed end to end, and one document at a time, every token but the first of the split is in a sequence, as a target,
exactly once. Whole documents and examples may be too long for a sequence; a rule says what happens then.
"""

from typing import Literal, Protocol

import numpy as np

from tfdp.data.cutting import InputCuts
from tfdp.data.shards import Split
from tfdp.system.exits import ConfigError
from tfdp.tasks.flags import STARTS

Form = Literal["packed", "documents", "whole"]
TooLong = Literal["cut_start", "cut_end", "cut_input", "skip", "refuse"]


class Sequences(Protocol):
    """Numbered rows of token ids."""

    num_sequences: int
    width: int  # tokens of a row, context_length + 1
    num_inputs: int  # tokens of all rows that another one follows: what a model computes in an epoch

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
        self.num_inputs = max(0, split.num_tokens - 1)
        self.num_sequences = -(-self.num_inputs // context_length)

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
        self.num_inputs = int(num_targets.sum())
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


class WholeSequences:
    """Whole documents, each with the end of text before it: one in a sequence, or as many neighbours as fit.

    What is left of a sequence is absent.

    Args:
      split: of documents.
      context_length: tokens of a sequence, less one.
      packs: whether neighbours share a sequence.
      too_long: what happens to a document that does not fit. cut_start: its last tokens stay; cut_end: its first
        ones; cut_input: those of an example that `InputCuts` says, in a row by itself, or else its last ones; skip: it
        is in no sequence; refuse: `ConfigError`.
      has_marks: whether rows carry flags: those of the split, and `STARTS` before each document.
      room: with cut_input, see `InputCuts`.

    Attributes:
      num_too_long: documents that do not fit.
      num_cut_at_start: those of them that lost their first tokens.
    """

    def __init__(
        self,
        split: Split,
        context_length: int,
        packs: bool,
        too_long: TooLong,
        has_marks: bool = False,
        room: int = 0,
    ) -> None:
        self._split, self._has_marks = split, has_marks
        self.width = context_length + 1
        starts = np.asarray(split.document_starts) - 1  # of each, the end of text before it
        stops = np.append(starts[1:], split.num_tokens - 1) + 1  # and behind the one after it
        is_long = stops - starts > self.width
        if is_long.any() and too_long == "refuse":
            self._refuse(int(np.flatnonzero(is_long)[0]), stops - starts)
        kept = np.flatnonzero(~is_long) if too_long == "skip" else np.arange(len(starts))
        self._starts = starts
        cuts = InputCuts(split, starts, stops, self.width, room) if too_long == "cut_input" else None
        loses_start = is_long & (too_long == "cut_start")
        begins = np.where(loses_start, stops - self.width, starts)
        ends = np.where(is_long & (too_long == "cut_end"), starts + self.width, stops)
        if cuts is not None:
            loses_start[cuts.impossible] = True
            begins[cuts.impossible] = stops[cuts.impossible] - self.width
            ends[cuts.documents] = starts[cuts.documents] + cuts.heads
            is_long[cuts.documents] = True  # one that fits may leave too little room
        self.num_too_long, self.num_cut_at_start = int(is_long.sum()), int(loses_start.sum())
        self._first = _row_heads(kept, begins, ends, self.width, is_long) if packs else kept
        last = np.append(self._first[1:], len(starts)) - 1
        self._last = _last_kept(kept, last) if packs else kept
        self._begins, self._ends = begins[self._first], ends[self._last]
        self.num_sequences = len(self._first)
        self._tails = np.zeros((self.num_sequences, 2), np.int64)  # of a row, a second range of tokens behind its first
        if cuts is not None:
            rows = np.searchsorted(self._first, cuts.documents)
            self._tails[rows] = np.stack([cuts.tails, stops[cuts.documents]], axis=1)
        self.num_inputs = int((self._ends - self._begins - 1).sum() + np.diff(self._tails).sum())

    def rows(self, indices: np.ndarray) -> np.ndarray:
        indices = np.asarray(indices, dtype=np.int64)
        begins, lengths = self._begins[indices], self._ends[indices] - self._begins[indices]
        rows = self._split.read(begins, lengths, self.width, with_flags=self._has_marks)
        tails, tail_lengths = self._tails[indices, 0], self._tails[indices, 1] - self._tails[indices, 0]
        for number in np.flatnonzero(tail_lengths).tolist():
            one, length = slice(number, number + 1), int(tail_lengths[number])
            (tail,) = self._split.read(tails[one], tail_lengths[one], length, with_flags=self._has_marks)
            rows[number, lengths[number] : lengths[number] + length] = tail
        if self._has_marks:
            for row, index, begin in zip(rows, indices.tolist(), begins.tolist(), strict=True):
                places = self._starts[self._first[index] : self._last[index] + 1] - begin
                row[np.maximum(places, 0)] |= STARTS
        return rows

    def documents_of(self, index: int) -> list[str]:
        begin, stop = int(self._starts[self._first[index]]) + 1, int(self._starts[self._last[index]]) + 2
        return self._split.documents_between(begin, stop)

    def _refuse(self, document: int, lengths: np.ndarray) -> None:
        start = int(self._split.document_starts[document])
        (name,) = self._split.documents_between(start, start + 1)
        raise ConfigError(
            f"data.too_long (refuse): {name} has {int(lengths[document]) - 1} tokens, and model.context_length is "
            f"{self.width - 1}: {int((lengths > self.width).sum())} of {len(lengths)} documents are too long"
        )


def _row_heads(kept: np.ndarray, begins: np.ndarray, ends: np.ndarray, width: int, is_long: np.ndarray) -> np.ndarray:
    """The first document of each row: neighbours share one as long as they fit; what is too long has its own."""
    heads: list[int] = []
    begin, before = 0, -2
    for document in kept.tolist():
        is_neighbour = document == before + 1 and begins[document] <= ends[before]
        is_alone = is_long[document] or (before >= 0 and is_long[before])
        if is_alone or not (heads and is_neighbour and ends[document] - begin <= width):
            heads.append(document)
            begin = int(begins[document])
        before = document
    return np.array(heads, dtype=np.int64)


def _last_kept(kept: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """The last kept document at or before each bound."""
    return kept[np.searchsorted(kept, bounds, side="right") - 1]


def sequences_of(split: Split, context_length: int, form: Form, too_long: TooLong = "cut_start") -> Sequences:
    """The sequences of a split of text in the form of `data.sequences`."""
    if form == "whole":
        return WholeSequences(split, context_length, packs=True, too_long=too_long)
    return PackedSequences(split, context_length) if form == "packed" else DocumentSequences(split, context_length)


def examples_of(split: Split, context_length: int, form: Form, too_long: TooLong, room: int = 0) -> WholeSequences:
    """The examples of a split: with `whole` as many in a row as fit, with `documents` one.

    Args:
      room: tokens that a prompt leaves free in a row at least, with cut_input: see `InputCuts`.

    Raises:
      ConfigError: the split holds plain text.
    """
    if not split.has_flags:
        raise ConfigError("data.source must hold examples: prepare it with --target_field, or another of the fields")
    return WholeSequences(split, context_length, form == "whole", too_long, has_marks=True, room=room)
