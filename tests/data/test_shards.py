"""Token shards: nothing is lost, nothing is in two splits, and a cache is made once."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tfdp.config.sections import DataConfig
from tfdp.data import shard_writer, shards
from tfdp.data.corpus import documents
from tfdp.data.sequences import PackedSequences
from tfdp.data.shards import ABSENT, Split, TokenShards, open_shards
from tfdp.data.sources import open_corpus
from tfdp.data.tokenizers.tokenizer import ByteTokenizer
from tfdp.system.exits import ConfigError

END = bytes([ByteTokenizer.end_of_text])


def write_corpus(folder: Path, sizes: list[int]) -> str:
    """Writes a document of each size in bytes, all different, and returns their source."""
    folder.mkdir(exist_ok=True)
    for index, size in enumerate(sizes):
        line = f"document {index} of é text\n".encode()
        content = line * (size // len(line))
        (folder / f"{index:03d}.txt").write_bytes(content + b"x" * (size - len(content)))
    return f"text:{folder}/*.txt"


def prepare(cache: Path, source: str, **values: object) -> TokenShards:
    (found,) = open_corpus(DataConfig(source=source, **values), cache).sources  # type: ignore[arg-type]
    return found.shards


def windows(split: Split, indices: list[int] | np.ndarray, context_length: int) -> np.ndarray:
    return PackedSequences(split, context_length).rows(np.array(indices))


def num_windows(split: Split, context_length: int) -> int:
    return PackedSequences(split, context_length).num_sequences


def tokens(split: Split) -> bytes:
    """All ids of a split as bytes, read in one window."""
    (row,) = windows(split, [0], split.num_tokens - 1)
    return bytes(row.astype(np.uint8))


def texts(split: Split) -> list[bytes]:
    """The documents between the end-of-text tokens of a split."""
    stream = tokens(split)
    assert stream.startswith(END) and stream.endswith(END)
    return stream[1:].split(END)[:-1]


def make_split(num_tokens: int, *cuts: int) -> Split:
    """A split of the ids 0, 1, 2 ... in shards that end at `cuts`."""
    ids = np.arange(num_tokens, dtype=np.uint16)
    return Split(np.split(ids, cuts), num_documents=1, num_bytes=num_tokens)


@pytest.fixture
def corpus(tmp_path: Path) -> Callable[..., TokenShards]:
    source = write_corpus(tmp_path / "text", [300 + 7 * index for index in range(40)])
    return lambda **values: prepare(tmp_path / "cache", source, **values)


# --- The split -------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.9])
def test_the_splits_hold_every_document_once_with_ends_of_text_around(
    tmp_path: Path, corpus: Callable[..., TokenShards], fraction: float
) -> None:
    found = corpus(validation_fraction=fraction)
    written = [document.text.encode() for document in documents(f"text:{tmp_path}/text/*.txt")]
    train, validation = texts(found.train), texts(found.validation)
    assert sorted(train + validation) == sorted(written)
    assert not set(train) & set(validation)
    assert train == [text for text in written if text in set(train)], "documents keep their order"
    assert validation == [text for text in written if text in set(validation)]
    for split, held in ((found.train, train), (found.validation, validation)):
        assert split.num_documents == len(held)
        assert split.num_bytes == sum(map(len, held))
        assert split.num_tokens == split.num_bytes + split.num_documents + 1


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.25, 0.5, 0.75])
def test_validation_fills_the_byte_fraction_and_no_more(corpus: Callable[..., TokenShards], fraction: float) -> None:
    found = corpus(validation_fraction=fraction)
    total = found.train.num_bytes + found.validation.num_bytes
    assert found.validation.num_bytes <= fraction * total
    assert found.validation.num_bytes > fraction * total - 300 - 7 * 40, "one more document would not fit"


def test_one_large_document_does_not_break_the_fraction(tmp_path: Path) -> None:
    found = prepare(tmp_path / "cache", write_corpus(tmp_path / "text", [100_000] + [100] * 100))
    assert found.validation.num_bytes == 2200  # all that fits into 2 % of 110,000
    assert found.train.num_documents == 79


def test_one_document_at_least_is_held_out(tmp_path: Path) -> None:
    found = prepare(tmp_path / "cache", write_corpus(tmp_path / "text", [500, 400, 600]), validation_fraction=0.01)
    assert [len(text) for text in texts(found.validation)] == [400]
    assert [len(text) for text in texts(found.train)] == [500, 600]


def test_the_split_is_the_same_every_time(tmp_path: Path) -> None:
    source = write_corpus(tmp_path / "text", [200] * 30)
    first, second = (prepare(tmp_path / cache, source, validation_fraction=0.2) for cache in ("a", "b"))
    assert tokens(first.train) == tokens(second.train)
    assert tokens(first.validation) == tokens(second.validation)
    assert first.corpus_sha256 == second.corpus_sha256


def test_a_document_added_leaves_the_others_in_their_order_by_hash(tmp_path: Path) -> None:
    source = write_corpus(tmp_path / "text", [200] * 30)
    before = set(texts(prepare(tmp_path / "cache", source, validation_fraction=0.2).validation))
    write_corpus(tmp_path / "text", [200] * 31)
    after = set(texts(prepare(tmp_path / "cache", source, validation_fraction=0.2).validation))
    assert len(before) == len(after) == 6
    assert len(before & after) >= 5


def test_a_single_document_is_cut_at_a_line_break(tmp_path: Path) -> None:
    text = "".join(f"line {index:03d}\n" for index in range(100))
    (tmp_path / "a.txt").write_text(text)
    found = prepare(tmp_path / "cache", f"text:{tmp_path}/a.txt", validation_fraction=0.105)
    assert texts(found.train) == [text[: 89 * 9].encode()]
    assert texts(found.validation) == [text[89 * 9 :].encode()]


@pytest.mark.parametrize("text", ["x" * 1000, "title\n" + "é" * 1000], ids=["no line break", "one far from the cut"])
def test_a_single_document_of_one_long_line_keeps_the_fraction(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.txt").write_text(text)
    found = prepare(tmp_path / "cache", f"text:{tmp_path}/a.txt", validation_fraction=0.1)
    (train,), (validation,) = texts(found.train), texts(found.validation)
    assert (train + validation).decode() == text
    assert len(validation) <= 0.15 * len(text.encode())


def test_empty_documents_beside_a_single_one_do_not_keep_it_from_being_cut(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("line\n" * 100)
    (tmp_path / "b.txt").write_text("")
    found = prepare(tmp_path / "cache", f"text:{tmp_path}/*.txt", validation_fraction=0.1)
    assert (found.train.num_bytes, found.validation.num_bytes) == (450, 50)


def test_a_validation_source_is_the_validation_split(tmp_path: Path) -> None:
    source, other = write_corpus(tmp_path / "a", [100, 200]), write_corpus(tmp_path / "b", [50, 60, 70])
    found = prepare(tmp_path / "cache", source, validation_source=other)
    assert [len(text) for text in texts(found.train)] == [100, 200]
    assert [len(text) for text in texts(found.validation)] == [50, 60, 70]


def test_a_document_that_moves_to_the_validation_source_moves_in_the_shards(tmp_path: Path) -> None:
    write_corpus(tmp_path / "text", [100, 200, 300])
    for train, validation, sizes in (("[0]", "[12]", [200, 300]), ("[01]", "[2]", [300])):
        pattern = f"text:{tmp_path}/text/00%s.txt"
        found = prepare(tmp_path / "cache", pattern % train, validation_source=pattern % validation)
        assert [len(text) for text in texts(found.validation)] == sizes


# --- The cache -------------------------------------------------------------------------------------


def state_of(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.rglob("*")}


def only_folder(cache: Path) -> Path:
    (folder,) = cache.iterdir()
    return folder


def test_a_second_opening_writes_nothing(tmp_path: Path, corpus: Callable[..., TokenShards]) -> None:
    first = corpus()
    before = state_of(tmp_path / "cache")
    second = corpus()
    assert state_of(tmp_path / "cache") == before
    assert sorted(before) == sorted(
        [
            only_folder(tmp_path / "cache").name,
            "manifest.json",
            "verified.json",
            ".lock",
            "tokenizer",
            "tokenizer.tfdp.json",
            "train-00000.bin",
            "validation-00000.bin",
            "train.documents.npy",
            "train.documents.jsonl",
            "validation.documents.npy",
            "validation.documents.jsonl",
        ]
    )
    assert tokens(second.train) == tokens(first.train)


def test_the_manifest_holds_the_counts_and_the_index_the_document_starts(
    tmp_path: Path, corpus: Callable[..., TokenShards]
) -> None:
    found = corpus()
    folder = only_folder(tmp_path / "cache")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["corpus_sha256"], manifest["tokenizer"]) == (found.corpus_sha256, "bytes-256-eot-255")
    for name in shards.SPLITS:
        split = getattr(found, name)
        (shard,) = manifest["splits"][name]["shards"]
        assert shard["num_tokens"] == split.num_tokens
        assert (folder / shard["file"]).stat().st_size == 2 * split.num_tokens
        starts = np.load(folder / f"{name}.documents.npy")
        assert starts.tolist() == np.cumsum([1] + [len(text) + 1 for text in texts(split)])[:-1].tolist()
        names = [json.loads(line) for line in (folder / f"{name}.documents.jsonl").read_text().splitlines()]
        assert [(tmp_path / "text" / name).read_bytes() for name in names] == texts(split)


@pytest.mark.parametrize("change", ["text", "name", "fraction"])
def test_what_changes_the_tokens_makes_another_folder(
    tmp_path: Path, corpus: Callable[..., TokenShards], change: str
) -> None:
    first = corpus()
    if change == "text":
        (tmp_path / "text" / "007.txt").write_text("changed")
    if change == "name":
        (tmp_path / "text" / "007.txt").rename(tmp_path / "text" / "zzz.txt")
    second = corpus(validation_fraction=0.5 if change == "fraction" else 0.05)
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert (first.corpus_sha256 == second.corpus_sha256) == (change == "fraction")


def test_a_text_changed_and_changed_back_finds_its_first_shards(
    tmp_path: Path, corpus: Callable[..., TokenShards]
) -> None:
    corpus()
    before = state_of(tmp_path / "cache")
    path = tmp_path / "text" / "007.txt"
    text = path.read_text()
    path.write_text("changed")
    corpus()
    path.write_text(text)
    corpus()
    after = state_of(tmp_path / "cache")
    assert len(after) == 2 * len(before) - 11, "two folders, whose files have the same names"
    assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.parametrize(
    "damage",
    [
        "truncated shard",
        "missing shard",
        "missing names",
        "truncated starts",
        "missing manifest",
        "truncated manifest",
        "manifest of null",
    ],
)
def test_a_damaged_folder_is_made_again(tmp_path: Path, corpus: Callable[..., TokenShards], damage: str) -> None:
    expected = tokens(corpus().train)
    folder = only_folder(tmp_path / "cache")
    shard, manifest = folder / "train-00000.bin", folder / "manifest.json"
    match damage:
        case "truncated shard":
            os.truncate(shard, shard.stat().st_size - 1)
        case "missing shard":
            shard.unlink()
        case "missing names":
            (folder / "train.documents.jsonl").unlink()
        case "truncated starts":
            os.truncate(folder / "validation.documents.npy", 130)
        case "missing manifest":
            manifest.unlink()
        case "truncated manifest":
            manifest.write_text(manifest.read_text()[:100])
        case "manifest of null":
            manifest.write_text("null")
    with pytest.raises(ConfigError, match=rf"^data \({folder}\) must be a complete folder of token shards"):
        open_shards(folder)
    assert tokens(corpus().train) == expected
    assert only_folder(tmp_path / "cache") == folder, "nothing half-made stays behind"
    assert tokens(open_shards(folder).train) == expected


def test_a_cache_that_cannot_be_made_is_the_users_mistake(tmp_path: Path) -> None:
    source = write_corpus(tmp_path / "text", [100, 100])
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"^data\.cache_dir "):
        prepare(tmp_path / "file", source)


@pytest.mark.parametrize("tokens_per_shard", [1, 100, 1000, 5000])
def test_many_shards_read_as_one(
    tmp_path: Path, corpus: Callable[..., TokenShards], monkeypatch: pytest.MonkeyPatch, tokens_per_shard: int
) -> None:
    whole = corpus()
    monkeypatch.setattr(shard_writer, "TOKENS_PER_SHARD", tokens_per_shard)
    parts = prepare(tmp_path / "parts", f"text:{tmp_path}/text/*.txt")
    files = sorted(path.name for path in only_folder(tmp_path / "parts").glob("train-*.bin"))
    assert len(files) > 3
    assert files == [f"train-{index:05d}.bin" for index in range(len(files))]
    for name in shards.SPLITS:
        one, many = getattr(whole, name), getattr(parts, name)
        assert one.num_tokens == many.num_tokens
        for context_length in (7, 64, 3000):
            indices = np.random.default_rng(0).permutation(num_windows(one, context_length))
            np.testing.assert_array_equal(windows(many, indices, context_length), windows(one, indices, context_length))


# --- Windows ---------------------------------------------------------------------------------------


def test_neighbouring_windows_share_one_token() -> None:
    rows = windows(make_split(9), [1, 0], 4)
    assert rows.tolist() == [[4, 5, 6, 7, 8], [0, 1, 2, 3, 4]]
    assert rows.dtype == np.int32


def test_the_ragged_end_is_absent() -> None:
    split = make_split(10)
    assert num_windows(split, 4) == 3
    assert windows(split, [2, 3, 1000], 4).tolist() == [[8, 9] + [ABSENT] * 3, [ABSENT] * 5, [ABSENT] * 5]
    assert ABSENT == -1


def test_a_window_may_cross_several_shards() -> None:
    assert windows(make_split(10, 1, 2, 5, 5), [0, 1], 6).tolist() == [
        [0, 1, 2, 3, 4, 5, 6],
        [6, 7, 8, 9] + [ABSENT] * 3,
    ]


@pytest.mark.parametrize("context_length", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 7, 8, 9, 64, 65, 66, 1000])
def test_every_token_but_the_first_is_a_target_once(num_tokens: int, context_length: int) -> None:
    split = make_split(num_tokens, num_tokens // 3)
    num_sequences = num_windows(split, context_length)
    rows = windows(split, np.arange(num_sequences), context_length)
    targets = rows[:, 1:]
    assert targets[targets != ABSENT].tolist() == list(range(1, num_tokens))
    assert num_sequences == -(-(num_tokens - 1) // context_length)
    assert all((row[1:] != ABSENT).any() for row in rows), "no window is without a target"
    inputs = rows[:, :-1][targets != ABSENT]
    assert inputs.tolist() == list(range(num_tokens - 1)), "each target has the token before it"


@pytest.mark.parametrize("context_length", [1, 2, 5, 17, 300])
def test_a_window_names_the_documents_that_it_touches(tmp_path: Path, context_length: int) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    sizes = {"0.txt": 7, "1 \n é.txt": 1, "2.txt": 0, "3.txt": 40, "4.txt": 3}
    for index, (name, size) in enumerate(sizes.items()):
        (folder / name).write_text(str(index) * size)
    write_corpus(tmp_path / "other", [10])
    split = prepare(tmp_path / "cache", f"text:{folder}/*", validation_source=f"text:{tmp_path}/other/*").train
    names = list(sizes)
    for window in range(num_windows(split, context_length) + 2):
        (row,) = windows(split, [window], context_length)
        digits = bytes(row[(row != ABSENT) & (row != END[0])].astype(np.uint8)).decode()
        assert PackedSequences(split, context_length).documents_of(window) == [
            names[int(digit)] for digit in sorted(set(digits))
        ]


def test_describe_counts_for_people() -> None:
    found = TokenShards(make_split(1500), make_split(7), ByteTokenizer(), "0", "1")
    assert found.describe() == "train 1 documents, 1,500 tokens; validation 1 documents, 7 tokens"
