"""How much of the validation text occurs in the training text: distinct windows of 50 bytes.

Text arrives in chunks `(data, starts)`: the bytes of documents one after the other (uint8), and the index of the first
byte of each document, or piece of one, among them (int64, ascending). A window lies inside one piece: none crosses from
one document to the next. A caller who cuts a document into pieces repeats the last 49 bytes of a piece at the beginning
of the next one, or loses the windows across the cut; a window that comes twice counts once, so too much is no harm.

Windows are compared by hashes of 64 bits, which takes one in about 4 million million windows for one of 4 million that
it is not. Of a large validation text only the hashes below 2**64 / scale are kept, on both sides. Such a sample
is of the distinct windows, however often each occurs, and no process need know what another one kept: FracMinHash
(Irber et al. 2022, "Lightweight compositional analysis of metagenomes with FracMinHash and minimum metagenome covers";
the `scaled` of sourmash, Brown and Irber 2016).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

Chunk = tuple[np.ndarray, np.ndarray]

WINDOW = 50  # bytes
MAX_HASHES = 4_000_000  # 32 MB of them
BLOCK = 1 << 15  # windows hashed at a time: two buffers of 256 kB stay in the processor's cache

_BASE = 0x9E3779B97F4A7C15  # odd, as are the others: multiplication loses no bit
_WORD, _FIRST, _SECOND = np.uint64(0xD6E8FEB86659FD93), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def scale_for(num_bytes: int) -> int:
    """One in how many distinct windows is looked at, so that at most about 4 million hashes are kept; 1: all."""
    return max(1, -(-num_bytes // MAX_HASHES))


def hash_blocks(data: np.ndarray, starts: np.ndarray, length: int = WINDOW) -> Iterator[np.ndarray]:
    """The hash (uint64) of each window of `length` >= 8 bytes inside one document, in the order of the windows.

    They come in blocks, in about 3 MB for data of any size; a block is gone when the next one is asked for.
    """
    assert length >= 8
    data = np.ascontiguousarray(data, np.uint8)
    first, last = _window_ranges(starts, data.size, length)
    num_windows = data.size - length + 1
    buffers = np.empty((2, BLOCK + length), np.uint64)
    for begin in range(0, num_windows, BLOCK):
        end = min(begin + BLOCK, num_windows)
        here = slice(np.searchsorted(last, begin, side="right"), np.searchsorted(first, end))
        ranges = [
            slice(*pair)
            for pair in zip(
                (np.maximum(first[here], begin) - begin).tolist(),
                (np.minimum(last[here], end) - begin).tolist(),
                strict=True,
            )
        ]
        if ranges:
            hashes = _hash(data[begin : end + length - 1], length, buffers)
            yield hashes[ranges[0]] if len(ranges) == 1 else np.concatenate([hashes[span] for span in ranges])


def _window_ranges(starts: np.ndarray, num_bytes: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the windows of each document begin: at first <= index < last. Shorter documents than a window have none."""
    first = np.concatenate([[0], starts])  # bytes before the first start are a piece too
    last = np.concatenate([starts, [num_bytes]]) - length + 1
    assert np.all(np.diff(first) >= 0) and first[-1] <= num_bytes, "starts must ascend, up to the end of the data"
    has_windows = last > first
    return first[has_windows], last[has_windows]


def _hash(data: np.ndarray, length: int, buffers: np.ndarray) -> np.ndarray:
    """Hashes of all windows of a block.

    Each run of 8 bytes is read as one number and mixed. A run of 16 is two runs of 8, and so on by doubling; the window
    is two runs of the greatest power of two that fits, which may overlap. What comes out is a polynomial in `_BASE`
    whose coefficients are the mixed numbers.
    """
    hashes, scratch = (buffer[: data.size - 7] for buffer in buffers)
    np.copyto(hashes, np.ndarray(data.size - 7, np.dtype("<u8"), data, strides=(1,)))
    np.multiply(hashes, _WORD, out=hashes)
    _fold(hashes, 32, scratch)
    width = 8
    while width < length:
        offset = min(width, length - width)
        size = hashes.size - offset
        np.multiply(hashes[:size], np.uint64(pow(_BASE, offset, 1 << 64)), out=scratch[:size])
        np.add(scratch[:size], hashes[offset:], out=scratch[:size])
        hashes, scratch = scratch[:size], hashes[:size]
        width += offset
    _fold(hashes, 30, scratch)  # from here on the end of splitmix64 (Steele, Lea, Flood 2014)
    np.multiply(hashes, _FIRST, out=hashes)
    _fold(hashes, 27, scratch)
    np.multiply(hashes, _SECOND, out=hashes)
    _fold(hashes, 31, scratch)
    return hashes


def _fold(hashes: np.ndarray, shift: int, scratch: np.ndarray) -> None:
    np.right_shift(hashes, np.uint64(shift), out=scratch)
    np.bitwise_xor(hashes, scratch, out=hashes)


@dataclass(frozen=True)
class OverlapResult:
    """How many of the distinct windows of the validation text were found in the training text."""

    num_windows: int
    """Distinct windows looked at."""
    num_found: int
    """Those of them that occur in the training text."""
    scale: int
    """One in how many distinct windows was looked at."""

    @property
    def fraction(self) -> float:
        return self.num_found / self.num_windows if self.num_windows else 0.0

    def describe(self) -> str:
        percent = 100 * self.fraction
        share = "less than 0.1 %" if 0 < percent < 0.05 else f"{percent:.1f} %"
        sample = "exact" if self.scale == 1 else f"1 in {self.scale} windows looked at"
        return (
            f"{share} of {self.num_windows:,} distinct {WINDOW}-byte windows of the validation text "
            f"occur in the training text ({sample})"
        )


class Overlap:
    """The windows of the validation text, in which those of the training text are looked up.

    Several processes can each mark a part of the training text in an array of their own; the `or` of all arrays is what
    one process would have marked. Memory: at most 60 MB, and 160 MB while it is made.

    A bitmap of the low bits passes 1 in 16 windows of unrelated text. A directory of the high bits, about as long as
    there are hashes, tells where among the sorted hashes to look for those.
    """

    def __init__(self, chunks: Iterable[Chunk], num_bytes: int, scale: int | None = None) -> None:
        """`chunks` of the validation text, about `num_bytes` in all; scale None: `scale_for(num_bytes)`."""
        self.scale = scale_for(num_bytes) if scale is None else scale
        self._limit = (2**64 - 1) // self.scale
        kept = [hashes.copy() for chunk in chunks for hashes in self._sampled(chunk)]
        hashes = _distinct(np.concatenate([np.empty(0, np.uint64), *kept]))
        del kept
        self.num_windows = hashes.size
        num_bits = max(hashes.size, 1).bit_length()
        self._shift = np.uint64(self._limit.bit_length() - num_bits)
        sizes = np.bincount((hashes >> self._shift).view(np.int64), minlength=1 << num_bits)
        self._directory = (np.cumsum(sizes) - sizes).astype(np.int32)
        self._bitmap = np.zeros(2 << num_bits, np.uint8)
        np.bitwise_or.at(self._bitmap, self._byte(hashes), np.left_shift(np.uint8(1), _bit(hashes)))
        self._hashes = np.append(hashes, np.uint64(2**64 - 1))  # where every search ends

    def nothing_found(self) -> np.ndarray:
        """An array for `mark`: for each window looked at whether it was found."""
        return np.zeros(self.num_windows, bool)

    def mark(self, found: np.ndarray, chunk: Chunk) -> None:
        """Sets `found` where a window occurs in this chunk of the training text."""
        for hashes in self._sampled(chunk):
            passed = np.right_shift(self._bitmap.take(self._byte(hashes)), _bit(hashes)) & np.uint8(1)
            hashes = hashes[passed.view(bool)]
            places = self._directory.take((hashes >> self._shift).view(np.int64)).astype(np.int64)
            while hashes.size:
                here = self._hashes.take(places)
                found[places[here == hashes]] = True
                further = here < hashes
                hashes, places = hashes[further], places[further] + 1

    def result(self, found: np.ndarray) -> OverlapResult:
        return OverlapResult(self.num_windows, int(np.count_nonzero(found)), self.scale)

    def _sampled(self, chunk: Chunk) -> Iterator[np.ndarray]:
        for hashes in hash_blocks(*chunk):
            yield hashes if self.scale == 1 else hashes[hashes <= np.uint64(self._limit)]

    def _byte(self, hashes: np.ndarray) -> np.ndarray:
        return ((hashes >> np.uint64(3)) & np.uint64(self._bitmap.size - 1)).view(np.int64)


def _bit(hashes: np.ndarray) -> np.ndarray:
    return hashes.astype(np.uint8) & np.uint8(7)


def _distinct(hashes: np.ndarray) -> np.ndarray:
    """Sorted, each once; `np.unique` of numpy 2.4 takes ten times as long, by a hash table."""
    hashes = np.sort(hashes)
    is_new = np.ones(hashes.size, bool)
    np.not_equal(hashes[1:], hashes[:-1], out=is_new[1:])
    return hashes[is_new]
