"""Token shards are what was written, or are refused: bit flips, lengths, swaps, and what need not be read again."""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tfdp.config.sections import DataConfig
from tfdp.data import shard_writer, shards, verification
from tfdp.data.manifest import ListedFile, read_manifest
from tfdp.data.preparation import Watcher, prepare
from tfdp.data.reading import Recipe
from tfdp.data.shards import TokenShards, open_shards
from tfdp.data.sources import expected_vocab_size, open_corpus
from tfdp.system.exits import ConfigError
from tfdp.system.sealed import read_sealed, write_sealed

NUM_FLIPS = 200
NUM_TOKENS = 4_000_000
TOKENS_PER_SHARD = {"bytes": 5000, "bpe:300": 2000}


def write_text(folder: Path) -> str:
    """Twelve documents of words; returns their source."""
    folder.mkdir()
    generator = random.Random(0)
    for number in range(12):
        words = generator.choices(["alpha", "beta", "été", "(x)", "\n"], k=300)
        (folder / f"text {number}.txt").write_text(" ".join(words))
    return f"text:{folder}/*.txt"


@pytest.fixture(scope="module", params=["bytes", "bpe:300"])
def prepared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of several shards, never opened for writing by a test."""
    folder = tmp_path_factory.mktemp("prepared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_writer, "TOKENS_PER_SHARD", TOKENS_PER_SHARD[request.param])
        prepare(Recipe(write_text(folder / "text"), None, 0.2, request.param), folder / request.param, overlap=True)
    return folder / request.param


@pytest.fixture
def folder(prepared: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may damage, opened once."""
    shutil.copytree(prepared, tmp_path / "shards")
    open_shards(tmp_path / "shards")
    return tmp_path / "shards"


def content(found: TokenShards) -> list[object]:
    """All that a run takes from shards."""
    splits = [getattr(found, name) for name in shards.SPLITS]
    return [found.corpus_sha256, found.split_sha256, found.tokenizer.fingerprint] + [
        fact
        for split in splits
        for fact in (
            split.num_bytes,
            split.document_starts.tolist(),
            split.documents_between(0, split.num_tokens),
            split.read(np.array([0]), np.array([split.num_tokens]), split.num_tokens).tolist(),
        )
    ]


def flip(path: Path, bit: int) -> None:
    """Flips one bit of a file where it lies."""
    with path.open("r+b") as file:
        file.seek(bit // 8)
        (byte,) = file.read(1)
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def refusal(folder: Path) -> str | None:
    """The line with which a folder is refused; None where it opens."""
    try:
        open_shards(folder)
    except ConfigError as error:
        assert "\n" not in str(error)
        return str(error)
    return None


def files_of(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def bytes_read(function: Callable[[], object]) -> int:
    """What this process reads from files meanwhile, memory maps not counted."""

    def count() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    before = count()
    function()
    return count() - before


def write_large(folder: Path) -> Path:
    """Shards of 8 MB."""
    (folder / "text").mkdir()
    for number in range(4):
        (folder / "text" / f"{number}.txt").write_bytes(b"0123456 text\n" * (NUM_TOKENS // 13 // 4))
    prepare(Recipe(f"text:{folder}/text/*.txt", None, 0.25, "bytes"), folder / "large")
    return folder / "large"


# --- Damage ----------------------------------------------------------------------------------------


def test_every_bit_flip_is_refused_or_changes_nothing(folder: Path) -> None:
    """In the manifest a flip may turn one white space between its values into another: it says the same then."""
    expected, manifest = content(open_shards(folder)), read_manifest(folder)
    generator = random.Random(1)
    names = [name for name in files_of(folder) if name not in (".lock", "verified.json", "train-00002.bin")]
    if "tokenizer/merges.txt" in names:
        names = [name for name in names if name.startswith("tokenizer/")]  # the others are as with bytes
        assert len(names) == 3
    else:
        assert len(names) == 9, names
    for name in names:
        for _ in range(NUM_FLIPS):
            bit = generator.randrange(8 * (folder / name).stat().st_size)
            flip(folder / name, bit)
            told = refusal(folder)
            if told is None:
                assert name == "manifest.json" and read_manifest(folder) == manifest, f"bit {bit} of {name}"
            else:
                assert name in told and told.startswith(f"data ({folder}) must be a complete folder"), told
                assert told.endswith(": prepare it again")
            flip(folder / name, bit)
    assert content(open_shards(folder)) == expected


def test_a_flip_in_what_is_remembered_only_has_files_read_again(folder: Path) -> None:
    expected, generator, path = content(open_shards(folder)), random.Random(2), folder / "verified.json"
    written = path.read_bytes()
    for _ in range(NUM_FLIPS // 4):
        flip(path, generator.randrange(8 * len(written)))
        assert content(open_shards(folder)) == expected
    flip(folder / "train-00000.bin", 1234)
    damaged_state = verification.state_of(folder / "train-00000.bin")
    for _ in range(NUM_FLIPS):
        path.write_bytes(written)
        flip(path, generator.randrange(8 * len(written)))
        assert "train-00000.bin is not what was written" in str(refusal(folder))
    assert verification.state_of(folder / "train-00000.bin") == damaged_state


@pytest.mark.parametrize("name", ["train-00000.bin", "validation-00000.bin", "train.documents.npy", "manifest.json"])
@pytest.mark.parametrize("change", ["shorter", "longer", "gone", "a folder"])
def test_a_wrong_length_is_refused(folder: Path, name: str, change: str) -> None:
    path = folder / name
    match change:
        case "shorter":
            os.truncate(path, path.stat().st_size - 2)
        case "longer":
            os.truncate(path, path.stat().st_size + 2)
        case "gone":
            path.unlink()
        case "a folder":
            path.unlink()
            path.mkdir()
    assert name in str(refusal(folder))


def test_two_shards_that_change_places_are_refused(folder: Path) -> None:
    one, two = folder / "train-00000.bin", folder / "train-00001.bin"
    assert one.stat().st_size == two.stat().st_size
    one.rename(folder / "between")
    two.rename(one)
    (folder / "between").rename(two)
    assert "train-0000" in str(refusal(folder))


def test_a_flip_under_an_old_modification_time_is_refused(folder: Path) -> None:
    path = folder / "train-00000.bin"
    times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    flip(path, 777)
    os.utime(path, ns=times)
    assert path.stat().st_mtime_ns == times[1]
    assert "train-00000.bin is not what was written" in str(refusal(folder))


def test_an_id_that_the_tokenizer_does_not_have_is_refused_though_the_digest_is_right(tmp_path: Path) -> None:
    folder = write_large(tmp_path)
    path = folder / "train-00000.bin"
    ids = np.fromfile(path, "<u2")
    ids[1_234_567] = 60_000
    ids.tofile(path)
    manifest = read_manifest(folder)
    entry = manifest["splits"]["train"]["shards"][0]
    entry["sha256"] = hashlib.sha256(ids.tobytes()).hexdigest()
    write_sealed(folder / "manifest.json", manifest)
    told = "train-00000.bin holds the id 60000 at index 1,234,567, and the vocabulary has 256 ids"
    for _ in range(2):  # read, then remembered
        assert told in str(refusal(folder))


def test_a_run_names_the_key_and_the_vocabulary_too_is_of_what_was_written(folder: Path, tmp_path: Path) -> None:
    config = DataConfig(source=f"tokens:{folder}", tokenizer="auto")
    num_ids = expected_vocab_size(config)
    assert num_ids == open_corpus(config, tmp_path / "cache").tokenizer.vocab_size
    flip(folder / "tokenizer" / "tokenizer.tfdp.json", 20)
    for door in (lambda: expected_vocab_size(config), lambda: open_corpus(config, tmp_path / "cache")):
        with pytest.raises(ConfigError, match=r"^data\.source: tokens \(.*tokenizer/tokenizer\.tfdp\.json is not what"):
            door()


def test_damaged_shards_are_prepared_again_and_said_to_be(prepared: Path, folder: Path) -> None:
    class Lines(Watcher):
        def __init__(self) -> None:
            self.lines: list[str] = []

        def warn(self, line: str) -> None:
            self.lines.append(line)

    expected = content(open_shards(prepared))
    recipe = Recipe(f"text:{prepared.parent}/text/*.txt", None, 0.2, prepared.name)
    for name in ("train-00001.bin", "validation.documents.jsonl", "tokenizer/tokenizer.tfdp.json"):
        flip(folder / name, 99)
        lines = Lines()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shard_writer, "TOKENS_PER_SHARD", TOKENS_PER_SHARD[prepared.name])
            assert content(prepare(recipe, folder, watcher=lines)) == expected
        assert any(name in line and line.endswith("prepare it again: making them again") for line in lines.lines)


# --- Read once -------------------------------------------------------------------------------------


def test_files_are_read_once_and_again_only_after_a_change(tmp_path: Path) -> None:
    folder = write_large(tmp_path)
    size = 2 * NUM_TOKENS
    assert bytes_read(lambda: open_shards(folder)) < 0.02 * size
    (folder / "verified.json").unlink()
    assert size <= bytes_read(lambda: open_shards(folder)) < 1.1 * size
    assert bytes_read(lambda: open_shards(folder)) < 0.02 * size
    (folder / "train-00000.bin").chmod(0o600)  # changes its change time
    assert 0.7 * size < bytes_read(lambda: open_shards(folder)) < 0.8 * size
    assert bytes_read(lambda: open_shards(folder)) < 0.02 * size
    moved = folder.rename(tmp_path / "moved")  # a rename does not change the files
    assert bytes_read(lambda: open_shards(moved)) < 0.02 * size
    shutil.copytree(moved, tmp_path / "copied")  # other inodes
    assert bytes_read(lambda: open_shards(tmp_path / "copied")) > size


def test_a_folder_that_cannot_be_written_is_remembered_in_the_cache(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_large(tmp_path)
    (folder / "verified.json").unlink()
    (folder / "verified.json").mkdir()  # root may write anywhere, but not there
    config, cache = DataConfig(source=f"tokens:{folder}"), tmp_path / "cache"
    assert bytes_read(lambda: open_corpus(config, cache)) > 2 * NUM_TOKENS
    assert bytes_read(lambda: open_corpus(config, cache)) < 0.02 * NUM_TOKENS
    assert capsys.readouterr().err == ""
    (tmp_path / "file").write_text("")
    for _ in range(2):
        assert bytes_read(lambda: open_corpus(config, tmp_path / "file")) > 2 * NUM_TOKENS
    first, second = capsys.readouterr().err.splitlines()
    assert first == second
    assert first.startswith(f"{folder} is verified again at every start: neither {folder}/verified.json nor ")


def test_what_takes_a_while_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, lines = write_large(tmp_path), []
    monkeypatch.setattr(verification, "ANNOUNCED_BYTES", 1_000_000)
    (folder / "verified.json").unlink()
    for _ in range(2):
        open_shards(folder, say=lines.append)
    assert lines == [f"verifying 0.0 GB of token shards in {folder}, once"]


def test_verifying_takes_the_same_memory_for_any_size(tmp_path: Path) -> None:
    peaks = []
    for num_bytes in (16 << 20, 64 << 20):
        path = tmp_path / "a.bin"
        np.zeros(num_bytes // 2, "<u2").tofile(path)
        listed = ListedFile("a.bin", num_bytes, hashlib.sha256(bytes(num_bytes)).hexdigest(), "<u2")
        tracemalloc.start()
        assert verification.examine(path, listed).max_id == 0
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert max(peaks) < 2 * verification.CHUNK_BYTES
    assert peaks[1] < 1.1 * peaks[0]


@pytest.mark.multiworker
def test_of_several_processes_one_verifies_and_none_fails(tmp_path: Path) -> None:
    folder = write_large(tmp_path)
    (folder / "verified.json").unlink()
    program = (
        "import sys; from pathlib import Path; from tfdp.data.shards import open_shards\n"
        "count = lambda: int(Path('/proc/self/io').read_text().split()[1])\n"
        "sys.stdin.readline(); before = count(); open_shards(Path(sys.argv[1])); print(count() - before)"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    counts = [int(process.communicate(timeout=120)[0]) for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    assert sum(count > NUM_TOKENS for count in counts) == 1, counts
    assert len(read_sealed(folder / "verified.json")) == 6
    assert not list(folder.glob(".verified*"))


# --- Folders of version 4 --------------------------------------------------------------------------


@pytest.fixture
def old_folder(folder: Path) -> Path:
    """What a preparation of version 4 left: no digest of the manifest, the index files and the tokenizer."""
    manifest = {**read_manifest(folder), "version": 4}
    del manifest["tokenizer_files"]
    for split in manifest["splits"].values():
        split["index"] = [{"file": each["file"], "num_bytes": each["num_bytes"]} for each in split["index"]]
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
    (folder / "verified.json").unlink()
    return folder


def test_a_folder_of_version_4_is_read_as_before(prepared: Path, old_folder: Path) -> None:
    assert content(open_shards(old_folder)) == content(open_shards(prepared))


def test_a_folder_of_version_4_is_checked_as_far_as_it_can_be(old_folder: Path) -> None:
    """A start that moves between its neighbours, a letter of a name and a count of bytes pass: nothing tells them."""
    expected, generator = content(open_shards(old_folder)), random.Random(3)
    for name in files_of(old_folder):
        if name in (".lock", "verified.json"):
            continue
        for _ in range(50):
            bit = generator.randrange(8 * (old_folder / name).stat().st_size)
            flip(old_folder / name, bit)
            if refusal(old_folder) is None:  # whatever it says, it can be read, and the tokens are what they were
                found = content(open_shards(old_folder))
                assert (found[1], found[2]) == (expected[1], expected[2]), f"bit {bit} of {name}"
                assert (found[6], found[10]) == (expected[6], expected[10]), f"bit {bit} of {name}"
                assert name.endswith((".npy", ".jsonl", ".json"))
            flip(old_folder / name, bit)


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("train.documents.jsonl", '"a"\n', "must hold the names of"),
        ("train.documents.jsonl", "1\n" * 10, "must hold the names of 10 documents"),
        ("train.documents.jsonl", '"a\n' * 10, "must hold a JSON string in each line"),
        ("train.documents.npy", "no array", "is not an array of 10 starts"),
    ],
)
def test_an_index_of_version_4_that_cannot_be_is_refused(old_folder: Path, name: str, text: str, told: str) -> None:
    (old_folder / name).write_text(text)
    manifest = json.loads((old_folder / "manifest.json").read_text())
    for entry in manifest["splits"]["train"]["index"]:
        entry["num_bytes"] = (old_folder / entry["file"]).stat().st_size
    (old_folder / "manifest.json").write_text(json.dumps(manifest))
    assert told in str(refusal(old_folder))
