"""Overlap of validation and training text: against sets of the windows themselves."""

import pickle
from collections.abc import Sequence

import numpy as np
import pytest

from tfdp.data import overlap
from tfdp.data.overlap import WINDOW, Chunk, Overlap, OverlapResult, hash_blocks, scale_for


def chunk(documents: Sequence[bytes]) -> Chunk:
    starts = np.cumsum([0, *map(len, documents)])[:-1]
    return np.frombuffer(b"".join(documents), np.uint8), starts.astype(np.int64)


def windows(chunks: Sequence[Sequence[bytes]], length: int = WINDOW) -> list[bytes]:
    documents = [document for documents in chunks for document in documents]
    return [text[i : i + length] for text in documents for i in range(len(text) - length + 1)]


def random_corpus(num_chunks: int, seed: int) -> list[list[bytes]]:
    """Documents of 0 to 400 bytes, put together from few passages, so that windows come many times."""
    rng = np.random.default_rng(seed)
    passages = [bytes(np.random.default_rng(key).integers(97, 100, 70, np.uint8)) for key in range(40)]
    noise = [bytes(rng.integers(97, 100, 70, np.uint8)) for _ in range(40)]

    def document() -> bytes:
        parts = [(passages + noise)[index] for index in rng.integers(0, 80, rng.integers(0, 7))]
        return b"".join(part[rng.integers(0, 40) :] for part in parts)

    return [[document() for _ in range(rng.integers(1, 30))] for _ in range(num_chunks)]


def window_hashes(data: np.ndarray, starts: np.ndarray, length: int = WINDOW) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.uint64), *(block.copy() for block in hash_blocks(data, starts, length))])


@pytest.mark.parametrize("length", [8, 9, 15, 16, 31, 33, 50, 64, 100])
@pytest.mark.parametrize("block", [1, 7, 64, 1 << 15])
def test_equal_windows_have_equal_hashes_and_others_others(
    length: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overlap, "BLOCK", block)
    documents = random_corpus(1, seed=1)[0]
    found = windows([documents], length)
    hashes = window_hashes(*chunk(documents), length)
    assert hashes.dtype == np.uint64 and len(hashes) == len(found) > 100
    assert len(set(hashes.tolist())) == len(set(found)) == len(set(zip(hashes.tolist(), found, strict=True)))


def test_every_byte_of_a_window_counts() -> None:
    window = np.full(WINDOW, ord("a"), np.uint8)
    changed = np.repeat(window[None], WINDOW * 8, axis=0)
    for index, row in enumerate(changed):
        row[index // 8] ^= 1 << index % 8
    starts = np.arange(0, changed.size + WINDOW, WINDOW)
    hashes = window_hashes(np.concatenate([window, changed.ravel()]), starts)
    assert len(set(hashes.tolist())) == 1 + WINDOW * 8
    flipped = np.unpackbits((hashes[1:] ^ hashes[0]).view(np.uint8)).reshape(WINDOW * 8, 64)
    assert flipped.mean() == pytest.approx(0.5, abs=0.01)
    assert flipped.mean(axis=0) == pytest.approx(0.5, abs=0.12)


def test_no_window_crosses_from_one_document_to_the_next() -> None:
    text = bytes(range(120))
    assert len(window_hashes(*chunk([text]))) == 71
    assert len(window_hashes(*chunk([text[:60], text[60:]]))) == 22
    assert len(window_hashes(*chunk([text[:50], b"", text[50:99], text[99:]]))) == 1
    data, starts = chunk([text[:60], text[60:]])
    assert len(window_hashes(data, starts[1:])) == 22  # bytes before the first start are a piece too


def test_short_documents_have_no_windows() -> None:
    for documents in ([], [b""], [b"a" * 49], [b"a" * 49] * 3, [b"", b""]):
        assert window_hashes(*chunk(documents)).size == 0
    short = chunk([b"a" * 49] * 3)
    nothing = Overlap([short], 147)
    found = nothing.nothing_found()
    nothing.mark(found, chunk([b"a" * 500]))
    assert nothing.result(found) == OverlapResult(0, 0, 1)
    assert Overlap([], 0).num_windows == 0


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("block", [13, 1 << 15])
def test_the_counts_are_those_of_sets(seed: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "BLOCK", block)
    validation, training = random_corpus(4, seed), random_corpus(6, seed + 100)
    looked_up = Overlap(map(chunk, validation), sum(len(text) for texts in validation for text in texts))
    found = looked_up.nothing_found()
    for texts in training:
        looked_up.mark(found, chunk(texts))
    expected = set(windows(validation))
    shared = expected & set(windows(training))
    assert 0 < len(shared) < len(expected)
    assert looked_up.result(found) == OverlapResult(len(expected), len(shared), 1)


@pytest.mark.parametrize("scale", [1, 8])
def test_processes_can_share_the_training_text(scale: int) -> None:
    validation, training = random_corpus(4, seed=1), random_corpus(6, seed=2)
    looked_up = Overlap(map(chunk, validation), 0, scale)
    alone = looked_up.nothing_found()
    parts = []
    for texts in training:
        looked_up.mark(alone, chunk(texts))
        other = pickle.loads(pickle.dumps(looked_up))
        parts.append(other.nothing_found())
        other.mark(parts[-1], chunk(texts))
    assert np.array_equal(np.any(parts, axis=0), alone)


def test_a_sample_of_one_in_eight() -> None:
    rng = np.random.default_rng(0)
    text = bytes(rng.integers(0, 256, 400_000, np.uint8))
    training = chunk([text[:100_000], text[:100_000]])
    sampled = Overlap([chunk([text]), chunk([text[:200_000]])], len(text), scale=8)
    found = sampled.nothing_found()
    sampled.mark(found, training)
    result = sampled.result(found)
    assert result.num_windows == pytest.approx(50_000, abs=4 * 50_000**0.5)
    assert result.fraction == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / 50_000) ** 0.5)
    exact = Overlap([chunk([text])], len(text), scale=1)
    assert exact.num_windows == 400_000 - WINDOW + 1


def test_the_scale_keeps_at_most_four_million_windows() -> None:
    assert [scale_for(size) for size in (0, 1, 4_000_000, 4_000_001, 10**9, 10**12)] == [1, 1, 1, 2, 250, 250_000]
    assert Overlap([chunk([b"a" * 60])], 5_000_000).scale == 2


@pytest.mark.parametrize(
    ("result", "line"),
    [
        (OverlapResult(1_234_567, 9_877, 1), "0.8 % of 1,234,567 distinct 50-byte windows {} (exact)"),
        (OverlapResult(1_000_000, 7, 1), "less than 0.1 % of 1,000,000 distinct 50-byte windows {} (exact)"),
        (OverlapResult(40, 40, 16), "100.0 % of 40 distinct 50-byte windows {} (1 in 16 windows looked at)"),
        (OverlapResult(0, 0, 1), "0.0 % of 0 distinct 50-byte windows {} (exact)"),
    ],
)
def test_what_is_told(result: OverlapResult, line: str) -> None:
    assert result.describe() == line.format("of the validation text occur in the training text")
    assert 0.0 <= result.fraction <= 1.0
