"""Parts -> splits: which documents come into which, and their tokens end to end."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tfdp.data.encoding import INDEX, LEFT_OUT, Part
from tfdp.data.held_out import choose, cut_point
from tfdp.data.manifest import SPLITS
from tfdp.data.shard_writer import SplitWriter
from tfdp.data.tokenizers.tokenizer import Tokenizer


@dataclass(frozen=True)
class Cut:
    """Where a document is cut in two: its end is for validation."""

    document: int
    token: int  # the first of the end
    num_bytes: int  # of the end


@dataclass(frozen=True)
class Choice:
    """Which documents come into which split.

    Attributes:
      splits: the number of each document's split in `SPLITS`, -1 for one that is skipped; that of its beginning for
        the one that is cut. Shape (num_documents,).
      cut: None where no document is.
    """

    splits: np.ndarray
    cut: Cut | None = None

    def num_bytes(self, index: np.ndarray, number: int) -> int:
        """Bytes of text in split `number` of `SPLITS`."""
        moved = self.cut.num_bytes if self.cut else 0
        return int(index["num_bytes"][self.splits == number].sum()) + (moved if number else -moved)


def joined_index(parts: Sequence[Part], without_duplicates: bool) -> np.ndarray:
    """The records of all documents in order; of duplicates, all but the first are marked as skipped."""
    if not parts:
        return np.zeros(0, INDEX)
    index = np.concatenate([part.index() for part in parts])
    if without_duplicates:
        counted = np.flatnonzero(index["left_out"] == 0)
        _, first = np.unique(index["text_digest"][counted], axis=0, return_index=True)
        again = np.ones(len(counted), dtype=bool)
        again[first] = False
        index["left_out"][counted[again]] = LEFT_OUT.index("duplicate")
    return index


def labels_of(parts: Sequence[Part]) -> np.ndarray:
    """The number in `SPLITS` of the split that each document was read for; 0 where that is undecided."""
    labels = [SPLITS.index(part.split or "train") for part in parts]
    return np.repeat(np.array(labels, np.int64), [part.num_documents for part in parts])


def choose_splits(
    parts: Sequence[Part], index: np.ndarray, fraction: float, tokenizer: Tokenizer, dtype: str, may_cut: bool = True
) -> Choice:
    """Gives each document its split; where that is undecided, a fraction of the bytes is held out.

    Args:
      may_cut: whether a single document may be cut in two.
    """
    choice = Choice(np.where(index["left_out"] == 0, labels_of(parts), -1))
    if any(part.split for part in parts):
        return choice
    candidates = np.flatnonzero((index["left_out"] == 0) & (index["num_bytes"] > 0))
    held = choose(index["name_rank"][candidates], index["num_bytes"][candidates], fraction)
    choice.splits[candidates[held.documents]] = SPLITS.index("validation")
    if held.cut_document is None or not may_cut or index["num_tokens"][candidates[held.cut_document]] < 2:
        return choice
    document = int(candidates[held.cut_document])
    ids = _ids_of(parts, index, document, dtype)
    token = cut_point(ids, tokenizer.token_bytes, held.cut_bytes)
    num_bytes = sum(len(tokenizer.token_bytes[each]) for each in ids[token:].tolist())
    # A SentencePiece model may have changed the text: its tokens need not have as many bytes.
    return replace(choice, cut=Cut(document, token, min(max(1, num_bytes), int(index["num_bytes"][document]) - 1)))


def count_left_out(index: np.ndarray) -> dict[str, int]:
    """How many documents were skipped for which reason."""
    counts = np.bincount(index["left_out"], minlength=len(LEFT_OUT))
    return {reason: int(count) for reason, count in zip(LEFT_OUT, counts, strict=True) if reason and count}


def join(parts: Sequence[Part], index: np.ndarray, choice: Choice, number: int, writer: SplitWriter) -> dict[str, Any]:
    """Writes what belongs to split `number` of `SPLITS`; returns its part of the manifest."""
    wanted = choice.splits == number
    if choice.cut is not None and SPLITS[number] == "validation":
        wanted[choice.cut.document] = True
    first = 0
    for part in parts:
        of_part = slice(first, first + part.num_documents)
        here = wanted[of_part]
        if here.any():
            ids = np.fromfile(part.tokens_path, dtype=writer.dtype)
            lengths, sizes = index["num_tokens"][of_part].copy(), index["num_bytes"][of_part].copy()
            keep = np.repeat(here, lengths + 1)
            if choice.cut is not None and first <= choice.cut.document < of_part.stop:
                _keep_one_side(keep, lengths, sizes, choice.cut, choice.cut.document - first, SPLITS[number])
            names = [name for name, is_here in zip(part.names(), here.tolist(), strict=True) if is_here]
            writer.add(ids[keep], lengths[here], names, int(sizes[here].sum()))
        first = of_part.stop
    return writer.finish()


def _ids_of(parts: Sequence[Part], index: np.ndarray, document: int, dtype: str) -> np.ndarray:
    firsts = np.cumsum([0, *(part.num_documents for part in parts)])
    number = int(np.searchsorted(firsts, document, side="right")) - 1
    start = int((index["num_tokens"][firsts[number] : document] + 1).sum())
    offset, count = start * np.dtype(dtype).itemsize, int(index["num_tokens"][document])
    return np.fromfile(parts[number].tokens_path, dtype, count, offset=offset)


def _keep_one_side(keep: np.ndarray, lengths: np.ndarray, sizes: np.ndarray, cut: Cut, place: int, split: str) -> None:
    """Takes the other side of a cut out of what a split keeps of a part, in which the document has this place."""
    start = int((lengths[:place] + 1).sum())
    if split == "train":
        keep[start + cut.token : start + lengths[place]] = False
        lengths[place], sizes[place] = cut.token, sizes[place] - cut.num_bytes
    else:
        keep[start : start + cut.token] = False
        lengths[place], sizes[place] = lengths[place] - cut.token, cut.num_bytes
