"""What is held out: as ever where documents fill the fraction, near it elsewhere, and moved little by one more file."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tfdp.data.held_out import HeldOut, choose, cut_point

FRACTIONS = st.sampled_from([0.01, 0.02, 0.05, 0.1, 0.25, 0.5])
NUM_CASES = 300


def ranks_of(num_documents: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1 << 63, num_documents, np.uint64)


def held_bytes(held: HeldOut, sizes: np.ndarray) -> int:
    return int(sizes[held.documents].sum()) + held.cut_bytes


def that_fit(ranks: np.ndarray, sizes: np.ndarray, wanted: float) -> list[int]:
    """The rule as it always was: in the order of the hashes, each document that still fits."""
    chosen: list[int] = []
    for document in np.argsort(ranks, kind="stable").tolist():
        if sizes[document] <= wanted - sum(sizes[chosen]):
            chosen.append(document)
    return chosen


def outcome(sizes: list[int], fraction: float, seed: int = 0) -> tuple[list[int], int | None, int]:
    held = choose(ranks_of(len(sizes), seed), np.array(sizes), fraction)
    return sorted(held.documents.tolist()), held.cut_document, held.cut_bytes


@settings(max_examples=NUM_CASES, deadline=None)
@given(st.lists(st.integers(1, 2000), min_size=1, max_size=60), FRACTIONS, st.integers(0, 9))
def test_where_whole_documents_hold_half_of_what_is_wanted_nothing_changes(
    sizes: list[int], fraction: float, seed: int
) -> None:
    ranks, expected = ranks_of(len(sizes), seed), np.array(sizes)
    chosen = that_fit(ranks, expected, fraction * sum(sizes))
    held = choose(ranks, expected, fraction)
    if expected[chosen].sum() >= fraction * sum(sizes) / 2:
        assert (held.documents.tolist(), held.cut_document) == (chosen, None)
    else:
        assert held.documents.tolist()[: len(chosen)] == chosen
        assert len(held.documents) == len(chosen) + (held.cut_document is None)


@settings(max_examples=NUM_CASES, deadline=None)
@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=20), FRACTIONS, st.integers(0, 9))
def test_half_of_what_is_wanted_is_held_out_and_something_is_left(sizes: list[int], fraction: float, seed: int) -> None:
    array, wanted = np.array(sizes), fraction * sum(sizes)
    held = choose(ranks_of(len(sizes), seed), array, fraction)
    assert held_bytes(held, array) >= int(wanted / 2)
    assert len(set(held.documents.tolist())) == len(held.documents) < len(sizes)
    assert held.cut_document not in held.documents.tolist()
    if held.cut_document is not None:
        assert held_bytes(held, array) == pytest.approx(wanted, abs=1)


@settings(max_examples=NUM_CASES, deadline=None)
@given(
    st.lists(st.integers(10_000, 10**6), min_size=1, max_size=8),
    st.integers(1, 20),
    FRACTIONS,
    st.integers(0, 9),
)
def test_a_small_file_beside_few_large_ones_moves_little(
    sizes: list[int], small: int, fraction: float, seed: int
) -> None:
    """Where the old rule found too little, which is what is new; elsewhere it decides as it always did."""
    ranks, larger = ranks_of(len(sizes) + 1, seed), np.array([*sizes, small])
    for count in (len(sizes), len(sizes) + 1):
        wanted = fraction * larger[:count].sum()
        assume(larger[that_fit(ranks[:count], larger[:count], wanted)].sum() < wanted / 2)
    before, after = choose(ranks[:-1], larger[:-1], fraction), choose(ranks, larger, fraction)
    moved = set(after.documents.tolist()) ^ set(before.documents.tolist())
    assert moved <= {len(sizes)}, "no other document changes sides"
    assert after.cut_document == before.cut_document
    assert abs(after.cut_bytes - before.cut_bytes) <= small + 1


@pytest.mark.parametrize(
    ("sizes", "fraction", "documents", "cut"),
    [
        ([500, 400, 600], 0.01, [1], None),  # none fits: the shortest
        ([500, 400, 600, 10], 0.05, [1, 3], None),  # a note alone is not enough
        ([1000] * 4, 0.05, [3], None),  # equal: the first by hash
        ([1000] * 10, 0.2, [3, 5], None),
        ([1000], 0.05, [], 50),
        ([1000, 11], 0.05, [1], 40),  # training cannot do without the large one
        ([100_000, *[10] * 100], 0.05, [*range(1, 101)], 4050),
        ([100_000, *[26] * 100], 0.05, [*range(1, 101)], None),  # the small ones fill half of it
        ([100_000, 3000, 11], 0.02, [1, 2], None),
    ],
)
def test_few_documents(sizes: list[int], fraction: float, documents: list[int], cut: int | None) -> None:
    found = outcome(sizes, fraction)
    if sizes == [1000] * 4 or sizes == [1000] * 10:
        documents = np.argsort(ranks_of(len(sizes), 0))[: len(documents)].tolist()
    assert found[0] == sorted(documents)
    assert found[1:] == ((None, 0) if cut is None else (0, cut))


# --- Where a document is cut ------------------------------------------------------------------------

BYTES = [bytes([byte]) for byte in range(255)] + [b""]


def cut_of(text: str, num_bytes: int) -> str:
    """The end that is cut off a text of bytes."""
    ids = np.frombuffer(text.encode(), np.uint8)
    return bytes(ids[cut_point(ids, BYTES, num_bytes) :]).decode()


def test_a_document_is_cut_where_a_line_begins() -> None:
    text = "".join(f"line {index:03d}\n" for index in range(100))
    assert cut_of(text, 90) == text[-90:]
    assert cut_of(text, 85) == text[-90:]
    assert cut_of(text, 91) == text[-99:]


def test_without_a_line_break_a_character_stays_whole() -> None:
    assert cut_of("x" * 1000, 90) == "x" * 90
    for num_bytes in range(1, 20):
        assert cut_of("漢" * 100, num_bytes) == "漢" * -(-num_bytes // 3)
    assert cut_of("\n" + "x" * 1000, 90) == "x" * 90, "a line break that is far away does not count"


@settings(max_examples=NUM_CASES, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=2, max_size=60), st.integers(1, 200))
def test_both_sides_of_a_cut_hold_something(ids: list[int], num_bytes: int) -> None:
    table = [b"word", b"\n", b"\xc3", b"\xa9", b"a\n", b""]
    assert 1 <= cut_point(np.array(ids), table, num_bytes) <= len(ids) - 1
