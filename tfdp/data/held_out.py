"""Which documents are held out for validation, and where the end of one is cut off instead.

Documents are taken in the order of a hash of their names, each that still fits into the wanted fraction of all bytes.
So the choice depends neither on a seed, which keeps the losses of two runs with other seeds comparable, nor on the
order of files, and a document that is added moves few others.

Whole documents may not come near the fraction: three books and a short note, of which the note alone fits. Where they
hold less than half of what is wanted, the shortest of the remaining documents is held out as well. Where only one
remains, which training needs, the missing bytes are cut off its end.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

ENOUGH = 0.5  # of the wanted bytes


@dataclass(frozen=True)
class HeldOut:
    """What is held out.

    Attributes:
      documents: whole ones, by index.
      cut_document: the one whose end is held out too; None where none is cut.
      cut_bytes: of that end.
    """

    documents: np.ndarray
    cut_document: int | None = None
    cut_bytes: int = 0


def choose(name_ranks: np.ndarray, sizes: np.ndarray, fraction: float) -> HeldOut:
    """Chooses from documents that have text.

    Args:
      name_ranks: the hash of each one's name, uint64, shape (num_documents,).
      sizes: bytes of each, at least 1.
      fraction: of all bytes, that is wanted.
    """
    wanted = fraction * float(sizes.sum())
    chosen = _that_fit(name_ranks, sizes, wanted)
    missing = wanted - float(sizes[chosen].sum())
    remaining = np.setdiff1d(np.arange(len(sizes)), chosen)
    if missing <= (1.0 - ENOUGH) * wanted or not len(remaining):
        return HeldOut(chosen)
    if len(remaining) == 1:
        return HeldOut(chosen, int(remaining[0]), max(1, round(missing)))
    shortest = remaining[np.lexsort((name_ranks[remaining], sizes[remaining]))[0]]
    return HeldOut(np.append(chosen, shortest))


def cut_point(ids: np.ndarray, token_bytes: Sequence[bytes], num_bytes: int) -> int:
    """The index of the first token of about the last `num_bytes` bytes of a document.

    It is the beginning of the last line that starts before them, unless that makes the end half as long again; then it
    is the beginning of a character. Something stays on both sides of it.

    Args:
      ids: of the document, at least two.
      token_bytes: of each id.
      num_bytes: that are wanted.
    """
    lengths = np.array([len(data) for data in token_bytes])
    left = np.cumsum(lengths[ids][::-1])[::-1]  # bytes from each token to the end
    cut = int(np.clip(np.searchsorted(-left, -num_bytes, side="right") - 1, 1, len(ids) - 1))
    first = max(1, int(np.searchsorted(-left, -1.5 * num_bytes)))
    ends_line = np.array([data.endswith(b"\n") for data in token_bytes])
    if len(good := np.flatnonzero(ends_line[ids[first - 1 : cut]])):
        return first + int(good[-1])
    first = max(1, cut - 3)  # a character has four bytes at most
    begins_character = np.array([not data or data[0] & 0xC0 != 0x80 for data in token_bytes])
    good = np.flatnonzero(begins_character[ids[first : cut + 1]])
    return first + int(good[-1]) if len(good) else cut


def _that_fit(name_ranks: np.ndarray, sizes: np.ndarray, wanted: float) -> np.ndarray:
    """The documents in the order of their hashes, each that still fits into the wanted bytes."""
    ranked = np.argsort(name_ranks, kind="stable")
    left, chosen = wanted, []
    for document, size in zip(ranked.tolist(), sizes[ranked].tolist(), strict=True):
        if size <= left:
            chosen.append(document)
            left -= size
    return np.array(chosen, dtype=np.int64)
