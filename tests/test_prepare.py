"""`python -m tfdp.prepare`: the same shards however often it is stopped, and nothing is dropped unsaid."""

import gzip
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tfdp.config.sections import DataConfig
from tfdp.data import encoding, joining, preparation, shard_folder
from tfdp.data.cleaning import Cleaning
from tfdp.data.manifest import read_manifest
from tfdp.data.preparation import prepare
from tfdp.data.reading import Recipe
from tfdp.data.shards import Split, open_shards
from tfdp.data.sources import open_corpus
from tfdp.data.tokenizers import bpe
from tfdp.data.tokenizers.tokenizer import ByteTokenizer, make_tokenizer, save_tokenizer
from tfdp.system.exits import ConfigError

WORDS = ["return", "self.value", "import", "for", "lambda", "été", "漢字", "😀", "0", "+=", "(", "\n", "\n\t", "\r\n"]

pytestmark = pytest.mark.timeout(240)


def write_jsonl(path: Path, num_bytes: int, seed: int = 0) -> str:
    """Documents of random words, one a line; returns their source."""
    generator = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        while num_bytes > 0:
            text = " ".join(generator.choices(WORDS, k=generator.randint(1, 2000)))
            num_bytes -= len(text.encode())
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    return f"jsonl:{path}"


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "tfdp.prepare", *arguments]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=200)


def digests(folder: Path) -> dict[str, str]:
    """Of all files but the lock, and but what tells times and inodes of the others."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (".lock", "verified.json")
    }


def texts(split: Split, tokenizer: object) -> list[str]:
    """The documents of a split."""
    (row,) = split.read(np.array([0]), np.array([split.num_tokens]), split.num_tokens)
    end = tokenizer.end_of_text  # type: ignore[attr-defined]
    stretches = np.split(row, np.flatnonzero(row == end))
    return [tokenizer.decode(stretch[1:]) for stretch in stretches[1:-1]]  # type: ignore[attr-defined]


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "GROUP_BYTES", 20_000)


def recipe(source: str, tokenizer: str = "bytes", **values: object) -> Recipe:
    return Recipe(source, None, 0.1, tokenizer, **values)  # type: ignore[arg-type]


# --- The same bytes --------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:600"])
def test_parts_and_processes_do_not_show(tmp_path: Path, small_parts: None, tokenizer: str) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", 300_000)
    one = prepare(recipe(source, tokenizer), tmp_path / "one", overlap=True)
    prepare(recipe(source, tokenizer), tmp_path / "two", num_processes=2, overlap=True)
    encoding.GROUP_BYTES = 1 << 30
    prepare(recipe(source, tokenizer), tmp_path / "whole", overlap=True)
    assert digests(tmp_path / "one") == digests(tmp_path / "two") == digests(tmp_path / "whole")
    written = [json.loads(line)["text"] for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    found = texts(one.train, one.tokenizer) + texts(one.validation, one.tokenizer)
    assert sorted(found) == sorted(written)
    assert one.train.num_bytes + one.validation.num_bytes == sum(len(text.encode()) for text in written)
    assert 0 < one.validation.num_bytes <= 0.1 * (one.train.num_bytes + one.validation.num_bytes)


@pytest.mark.slow
def test_five_kills_at_random_moments_change_nothing(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", 35_000_000)
    arguments = ["--source", source, "--tokenizer", "bpe:1000", "--output"]
    assert run(*arguments, str(tmp_path / "still")).returncode == 0
    generator, kills, killed = random.Random(3), 0, tmp_path / "killed"
    while kills < 5:
        with subprocess.Popen(command(*arguments, str(killed)), start_new_session=True) as process:
            time.sleep(generator.uniform(0.5, 4.0))
            if process.poll() is None:
                process.kill()  # this process alone: those that encode for it must end by themselves
                kills += 1
        if (killed / "manifest.json").is_file():  # it was faster than five kills: once more from the beginning
            assert digests(killed) == digests(tmp_path / "still")
            for path in sorted(killed.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
    assert run(*arguments, str(killed)).returncode == 0
    assert digests(killed) == digests(tmp_path / "still")


@pytest.mark.slow
def test_the_processes_of_a_killed_preparation_end(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", 50_000_000)
    output = tmp_path / "out"
    with subprocess.Popen(
        command("--source", source, "--tokenizer", "bpe:500", "--output", str(output), "--num_processes", "2"),
        start_new_session=True,
    ) as process:
        deadline = time.monotonic() + 100
        while len(list(output.glob("parts/*.json"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        process.kill()
    for _ in range(100):
        alive = [path for path in Path("/proc").glob("[0-9]*/stat") if session_of(path) == process.pid]
        if not alive:
            return
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    raise AssertionError(f"still there after 10 s: {alive}")


def session_of(stat: Path) -> int:
    try:
        fields = stat.read_text().rpartition(")")[2].split()
        return int(fields[3]) if fields[0] != "Z" else -1
    except OSError:
        return -1


def test_two_at_once_make_one(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", 3_000_000)
    arguments = command("--source", source, "--tokenizer", "bpe:700", "--output", str(tmp_path / "out"))
    both = [subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=100)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum("training bpe:700" in output for output in outputs) == 1
    run("--source", source, "--tokenizer", "bpe:700", "--output", str(tmp_path / "alone"))
    assert digests(tmp_path / "out") == digests(tmp_path / "alone")


# --- What a folder holds ---------------------------------------------------------------------------


def test_another_that_is_just_beginning_is_not_foreign(tmp_path: Path) -> None:
    """It has the lock, and writes recipe.json; or it died there."""
    source = write_jsonl(tmp_path / "a.jsonl", 20_000)
    folder = tmp_path / "shards"
    folder.mkdir()
    (folder / ".lock").write_text("")
    (folder / ".recipe.json.4711.tmp").write_text('{"sou')
    assert shard_folder.foreign_entries(folder) == []
    prepare(recipe(source), folder)
    assert not list(folder.glob(".recipe*"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / ".notes.json.4711.tmp").write_text("")
    with pytest.raises(
        ConfigError, match=r"must hold only what a preparation writes, but has \.notes\.json\.4711\.tmp"
    ):
        prepare(recipe(source), tmp_path / "other")


def test_the_manifest_tells_what_was_read_and_left_out(tmp_path: Path) -> None:
    lines = [
        "same text",
        "same text",
        "x",
        "  spaced   out  ",
        "spaced out",
        "a longer document" * 20,
        "\uff46ull width",
    ]
    lines += [f"document number {index} of many" for index in range(20)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"body": line}) + "\n" for line in lines))
    cleaning = Cleaning(unicode="NFKC", whitespace=True, min_chars=2, max_chars=100, duplicates=True)
    found = prepare(recipe(f"jsonl:{path}:body", cleaning=cleaning, licence="CC0-1.0"), tmp_path / "out", overlap=True)
    manifest = read_manifest(tmp_path / "out")
    assert manifest["num_documents_read"] == 27
    assert manifest["left_out"] == {"too short": 1, "too long": 1, "duplicate": 2}
    assert manifest["licence"] == "CC0-1.0"
    assert manifest["cleaning"] == {
        "unicode": "NFKC",
        "whitespace": True,
        "min_chars": 2,
        "max_chars": 100,
        "duplicates": True,
    }
    assert manifest["overlap"]["fraction"] == 0.0
    kept = texts(found.train, ByteTokenizer()) + texts(found.validation, ByteTokenizer())
    assert sorted(kept) == sorted({"same text", "spaced out", "full width", *lines[7:]})
    for split in manifest["splits"].values():
        for shard in split["shards"]:
            assert hashlib.sha256((tmp_path / "out" / shard["file"]).read_bytes()).hexdigest() == shard["sha256"]


def test_overlap_counts_what_validation_and_training_share(tmp_path: Path) -> None:
    half, other = "".join(map(chr, range(200, 500))), "".join(map(chr, range(500, 800)))
    (tmp_path / "train.txt").write_text(half + "between")
    (tmp_path / "validation.txt").write_text(other + half)
    shared = Recipe(f"text:{tmp_path}/train.txt", f"text:{tmp_path}/validation.txt", 0.1, "bytes")
    prepare(shared, tmp_path / "out", overlap=True)
    overlap = read_manifest(tmp_path / "out")["overlap"]
    assert overlap["num_windows"] == 1200 - 49
    assert overlap["num_found"] == 600 - 49


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"tokenizer": "bpe:600"}, "tokenizer: bytes-256-eot-255 -> bpe:600"),
        ({"validation_fraction": 0.2}, "validation_fraction: 0.1 -> 0.2"),
        ({"cleaning": Cleaning(whitespace=True)}, "cleaning: {} -> {'whitespace': True}"),
    ],
)
def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, change: dict[str, object], told: str) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", 20_000)
    prepare(recipe(source), tmp_path / "out")
    before = digests(tmp_path / "out")
    with pytest.raises(ConfigError) as caught:
        prepare(Recipe(**{**vars(recipe(source)), **change}), tmp_path / "out")
    assert told in str(caught.value)
    assert digests(tmp_path / "out") == before


def test_a_source_that_changes_on_the_way_is_noticed(
    tmp_path: Path, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", 100_000)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(joining, "joined_index", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(recipe(source), tmp_path / "out")
    write_jsonl(tmp_path / "a.jsonl", 100_000, seed=1)
    with pytest.raises(ConfigError, match="the source has changed since"):
        prepare(recipe(source), tmp_path / "out")


def test_a_trained_vocabulary_serves_another_source(tmp_path: Path) -> None:
    first = prepare(recipe(write_jsonl(tmp_path / "a.jsonl", 50_000), "bpe:400"), tmp_path / "one")
    other = write_jsonl(tmp_path / "b.jsonl", 50_000, seed=9)
    second = prepare(recipe(other, f"bpe:{tmp_path}/one/tokenizer"), tmp_path / "two")
    assert first.tokenizer.fingerprint == second.tokenizer.fingerprint
    assert open_shards(tmp_path / "two").train.num_tokens == second.train.num_tokens


def test_a_sentencepiece_model_prepares_text(tmp_path: Path) -> None:
    import sentencepiece

    path = tmp_path / "lines.txt"
    path.write_text("\n".join(f"the value of line {index} is {index * index}" for index in range(500)))
    sentencepiece.SentencePieceTrainer.Train(
        input=str(path), model_prefix=str(tmp_path / "m"), vocab_size=400, byte_fallback=True, minloglevel=2
    )
    name = f"sentencepiece:{tmp_path}/m.model"
    found = prepare(recipe(f"text:{path}", name), tmp_path / "out", overlap=True)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    text = "the value of line 7 is 漢\n"
    assert make_tokenizer(name).encode(text).tolist() == reference.EncodeAsIds(text)
    assert make_tokenizer(name).decode(reference.EncodeAsIds("the value")) == "the value"
    assert found.tokenizer.end_of_text == reference.eos_id()
    assert found.train.num_bytes + found.validation.num_bytes == path.stat().st_size


# --- Whose a folder is -----------------------------------------------------------------------------


def tree(folder: Path) -> dict[str, bytes | None]:
    """All that lies in a folder, but for the lock."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
        if path.name != ".lock"
    }


@pytest.mark.parametrize(
    ("source", "tokenizer", "output", "told"),
    [
        ("jsonl:corp/parts/*.jsonl", "bytes", "corp", "but has parts/a.jsonl: name a new folder"),
        ("jsonl:corp/parts/*.jsonl", "bytes", "corp/parts", "but has a.jsonl: name a new folder"),
        ("jsonl:corp/parts/*.jsonl", "gpt2:sh/tokenizer", "sh", "but has tokenizer/merges.txt, tokenizer/vocab.json:"),
        ("jsonl:corp/parts/*.jsonl", "bpe:trained/tokenizer", "trained", "but has tokenizer/merges.txt, "),
        ("jsonl:corp/parts/*.jsonl", "bytes", "web", "but has manifest.json: name a new folder"),
        ("jsonl:corp/parts/*.jsonl", "bytes", "numbered", "but has parts/0000000.json: name a new folder"),
        ("jsonl:corp/parts/*.jsonl", "bytes", "linked", "but has train-00000.bin: name a new folder"),
        ("jsonl:corp/parts/*.jsonl", "bytes", "notes", "but has 1.txt, 2.txt, 3.txt and 1 more: name a new folder"),
        ("jsonl:corp/parts/*.jsonl", "bytes", "corp/parts/a.jsonl", "must be a folder that can be written:"),
        ("jsonl:corp/**/*.jsonl", "bytes", "corp/new", "/corp/new/train.documents.jsonl becomes text:"),
        ("jsonl:corp/*/*.jsonl", "bytes", "corp/new", "/corp/new/train.documents.jsonl becomes text:"),
        ("text:**", "bytes", "corp/new", "becomes text: name a folder elsewhere"),
        ("jsonl:corp/parts/a.jsonl", "gpt2:new/tokenizer", "new", "must be a folder with vocabulary.json or "),
    ],
)
def test_what_is_not_its_own_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, tokenizer: str, output: str, told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("corp/parts", "sh/tokenizer", "trained", "web", "numbered/parts", "linked", "notes"):
        Path(name).mkdir(parents=True)
    write_jsonl(Path("corp/parts/a.jsonl"), 3000)
    vocabulary = bpe.train(["a text for a vocabulary"], 270)
    vocabulary.save(Path("sh/tokenizer"))
    Path("sh/tokenizer/vocabulary.json").rename("sh/tokenizer/vocab.json")
    save_tokenizer(vocabulary, Path("trained/tokenizer"))
    Path("web/manifest.json").write_text('{"name": "an app", "version": 4}')
    Path("numbered/parts/0000000.json").write_text("{}")
    Path("precious").write_text("precious")
    Path("linked/train-00000.bin").symlink_to("../precious")
    for number in range(1, 5):
        Path(f"notes/{number}.txt").write_text("a note")
    before = tree(tmp_path)
    with pytest.raises(ConfigError) as caught:
        prepare(recipe(source, tokenizer), Path(output))
    assert told in str(caught.value) and "\n" not in str(caught.value)
    assert tree(tmp_path) == before
    assert not list(tmp_path.rglob(".lock"))


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_a_preparation_knows_its_own_files_at_any_moment(
    tmp_path: Path, small_parts: None, monkeypatch: pytest.MonkeyPatch, tokenizer: str
) -> None:
    source, output = write_jsonl(tmp_path / "a.jsonl", 60_000), tmp_path / "out"

    def stop(*_: object) -> None:
        assert shard_folder.foreign_entries(output) == []
        raise KeyboardInterrupt

    for module, name in ((preparation, "encode_all"), (joining, "join"), (preparation, "remove_scaffold")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, stop)
            with pytest.raises(KeyboardInterrupt):
                prepare(recipe(source, tokenizer), output)
    prepare(recipe(source, tokenizer), output, overlap=True)
    assert shard_folder.foreign_entries(output) == []
    assert not (output / "parts").exists() and not (output / "recipe.json").exists()
    (output / "README").write_text("mine")
    assert shard_folder.foreign_entries(output) == ["README"]
    prepare(recipe(source, tokenizer), output)  # nothing is left to do, so nothing is in the way
    (output / "manifest.json").write_text("damaged")
    with pytest.raises(ConfigError, match="but has README: name a new folder"):
        prepare(recipe(source, tokenizer), output)
    (output / "README").unlink()
    prepare(recipe(source, tokenizer), output, overlap=True)
    prepare(recipe(source, tokenizer), tmp_path / "alone", overlap=True)
    assert digests(output) == digests(tmp_path / "alone")


def test_a_tokenizer_is_not_read_from_the_folder_that_is_made(tmp_path: Path) -> None:
    source, output = write_jsonl(tmp_path / "a.jsonl", 20_000), tmp_path / "out"
    prepare(recipe(source, "bpe:300"), output)
    (output / "manifest.json").write_text("damaged")  # so that it would be made again, tokenizer and all
    before = tree(output)
    with pytest.raises(
        ConfigError, match=r"^output \(.*\) must not be where tokenizer \(.*/tokenizer\) lies: name a new"
    ):
        prepare(recipe(source, f"bpe:{output}/tokenizer"), output)
    assert tree(output) == before


def test_a_link_to_a_folder_is_that_folder(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", 20_000)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    prepare(recipe(source), tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "manifest.json").is_file()


def test_a_cache_inside_of_what_is_read_is_refused(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", 20_000)
    config = DataConfig(source=f"jsonl:{tmp_path}/**/*.jsonl")
    with pytest.raises(ConfigError, match=r"^data\.cache_dir \(.*\) must lie outside of what data\.source \(jsonl:"):
        open_corpus(config, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_bit_that_flips_in_an_unfinished_preparation_does_not_show(
    tmp_path: Path, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output = write_jsonl(tmp_path / "a.jsonl", 100_000), tmp_path / "out"
    prepare(recipe(source), tmp_path / "alone")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    generator = random.Random(5)
    for _ in range(20):
        with monkeypatch.context() as patch:
            patch.setattr(joining, "joined_index", stop)
            with pytest.raises(KeyboardInterrupt):
                prepare(recipe(source), output)
        for path in sorted((output / "parts").iterdir()):
            data = bytearray(path.read_bytes())
            data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
            path.write_bytes(data)
    prepare(recipe(source), output)
    assert digests(output) == digests(tmp_path / "alone")


# --- Few documents, and none -----------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_a_note_beside_one_book_is_not_the_validation_split(tmp_path: Path, small_parts: None, tokenizer: str) -> None:
    (tmp_path / "text").mkdir()
    book = "".join(f"line {number} of été 漢字\n" for number in range(3000))
    (tmp_path / "text" / "book.txt").write_text(book)
    (tmp_path / "text" / "note.txt").write_text("a note")
    found = prepare(recipe(f"text:{tmp_path}/text/*.txt", tokenizer), tmp_path / "out")
    (begin,), (end, note) = texts(found.train, found.tokenizer), texts(found.validation, found.tokenizer)
    assert (begin + end, note) == (book, "a note")
    assert begin.endswith("\n")
    total = found.train.num_bytes + found.validation.num_bytes
    assert total == len(book.encode()) + 6
    assert found.validation.num_bytes == len((end + note).encode()) == pytest.approx(0.1 * total, abs=40)
    assert found.train.documents_between(0, found.train.num_tokens) == ["book.txt"]
    assert found.validation.documents_between(0, found.validation.num_tokens) == ["book.txt", "note.txt"]


def test_one_more_file_leaves_the_validation_split_nearly_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for number in range(3):
        (tmp_path / "text" / f"{number}.txt").write_text(f"book {number}\n" * (10_000 + number))
    before = prepare(recipe(f"text:{tmp_path}/text/*.txt"), tmp_path / "before")
    (tmp_path / "text" / "note.txt").write_text("a note")
    after = prepare(recipe(f"text:{tmp_path}/text/*.txt"), tmp_path / "after")
    assert texts(before.validation, before.tokenizer) == ["book 0\n" * 10_000]
    assert sorted(texts(after.validation, after.tokenizer)) == ["a note", "book 0\n" * 10_000]


def test_a_short_validation_split_is_explained(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text(f"a text of few words, {number}")
    corpus = open_corpus(DataConfig(source=f"text:{tmp_path}/*.txt"), tmp_path / "cache")
    with pytest.raises(ConfigError) as caught:
        corpus.check_lengths(30)
    assert str(caught.value) == (
        f"model.context_length (30) must fit into the validation split, which has 24 tokens (1 of the 3 documents of "
        f"text:{tmp_path}/*.txt; the largest for training has 22 tokens): try data.validation_source, "
        f"a context_length of 23, or more text"
    )
    for number in range(3, 10):
        (tmp_path / f"{number}.txt").write_text(f"a text of few words, {number}")
    prepare(recipe(f"text:{tmp_path}/*.txt"), tmp_path / "out")
    corpus = open_corpus(DataConfig(source=f"tokens:{tmp_path}/out"), tmp_path / "cache")
    with pytest.raises(
        ConfigError, match=r"\): try tfdp.prepare --validation_fraction 0\.3, tfdp.prepare --validation_"
    ):
        corpus.check_lengths(30)


NO_TEXT = {
    "jsonl:none.jsonl": "it holds no documents: name another source",
    "jsonl:none.jsonl.gz": "it holds no documents: name another source",
    "jsonl:none.jsonl.zst": "it holds no documents: name another source",
    "parquet:none.parquet": "it holds no documents: name another source",
    "jsonl:some.jsonl:text:label=x": "3 records read, none with label=x: check the key and its value",
    "parquet:some.parquet:text:label=x": "2 records read, none with label=x: check the key and its value",
    "jsonl:some.jsonl:nothing": "none of its 3 documents holds text: name another source",
    "text:empty.txt": "none of its 1 documents holds text: name another source",
    "jsonl:some.jsonl": "cleaning skipped all 3 documents (2 too short, 1 too long): loosen cleaning, or name another",
    "jsonl:some.jsonl:space": "cleaning skipped all 3 documents (3 too short): loosen cleaning, or name another",
}


def write_sources_without_text() -> None:
    """Into the working directory."""
    import pyarrow
    import pyarrow.parquet
    import zstandard

    Path("none.jsonl").write_text("")
    Path("none.jsonl.gz").write_bytes(gzip.compress(b""))
    Path("none.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(b""))
    Path("empty.txt").write_text("")
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), "none.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"], "label": ["c", "d"]}), "some.parquet")
    records = [{"text": text, "label": "good", "nothing": "", "space": " "} for text in ("one", "two", "3" * 99)]
    Path("some.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n\n")


@pytest.mark.parametrize("source", NO_TEXT)
@pytest.mark.parametrize("key", ["source", "validation_source"])
def test_no_text_is_one_line_and_the_next_command_finds_no_trace_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, key: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_sources_without_text()
    good = write_jsonl(Path("good.jsonl"), 20_000)
    cleaning = Cleaning(min_chars=10, max_chars=50) if NO_TEXT[source].startswith("cleaning") else Cleaning()
    if key == "source":
        wrong = recipe(source, "bpe:300", cleaning=cleaning)
    elif cleaning == Cleaning():
        wrong = Recipe(good, source, 0.1, "bpe:300")
    else:
        Path("good.jsonl").write_text('{"text": "neither short nor long"}\n' * 40)
        wrong = Recipe(good, source, 0.1, "bpe:300", cleaning)
    with pytest.raises(ConfigError) as caught:
        prepare(wrong, Path("out"))
    assert str(caught.value).startswith(f"{key} ({source}) must not be empty: {NO_TEXT[source]}")
    assert "\n" not in str(caught.value)
    assert tree(Path("out")) == {}
    write_jsonl(Path("good.jsonl"), 20_000)
    assert prepare(recipe(good), Path("out")).train.num_bytes > 10_000


def test_only_copies_of_the_training_text_are_no_validation_text(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", 5_000)
    both = Recipe(source, source, 0.1, "bytes", Cleaning(duplicates=True))
    with pytest.raises(ConfigError, match=r"^validation_source \(.*\) must not be empty: .* \(\d+ duplicate\): loosen"):
        prepare(both, tmp_path / "out")


@pytest.mark.parametrize(("text", "split"), [("x", "train"), ("\n", "train")])
def test_a_text_too_short_for_two_splits_is_refused(tmp_path: Path, text: str, split: str) -> None:
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(ConfigError, match=f"must hold text for both splits, and all of its 1 bytes are for {split}: "):
        prepare(recipe(f"text:{tmp_path}/a.txt"), tmp_path / "out")
    assert tree(tmp_path / "out") == {}


def test_a_document_that_cleaning_leaves_alone_is_cut(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a line\n" * 100)
    (tmp_path / "b.txt").write_text("short")
    found = prepare(recipe(f"text:{tmp_path}/*.txt", cleaning=Cleaning(min_chars=10)), tmp_path / "out")
    assert (found.train.num_bytes, found.validation.num_bytes) == (630, 70)


# --- Input as it comes -----------------------------------------------------------------------------


def test_broken_input_is_one_line_that_names_file_and_line(tmp_path: Path) -> None:
    good = json.dumps({"text": "good"}) + "\n"
    packed = gzip.compress((good * 5000).encode())
    (tmp_path / "cut.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    (tmp_path / "broken.jsonl").write_text(good + '{"text": "no end\n')
    (tmp_path / "field.jsonl").write_text(good + '{"body": "x"}\n')
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "folder").mkdir()
    cases = {
        f"jsonl:{tmp_path}/cut.jsonl.gz": "cut.jsonl.gz must be whole and readable, but after line ",
        f"jsonl:{tmp_path}/broken.jsonl": "broken.jsonl, line 2,",
        f"jsonl:{tmp_path}/field.jsonl": "field.jsonl, line 2, must have the field text: it has body",
        f"text:{tmp_path}/latin.txt": "latin.txt must be UTF-8: byte 3 is 0xe9",
        f"text:{tmp_path}/folder": "must match at least one file",
        f"text:{tmp_path}/none*.txt": "must match at least one file",
        "words:x": "must begin with one of",
    }
    for source, told in cases.items():
        with pytest.raises(ConfigError) as caught:
            prepare(recipe(source), tmp_path / "out")
        assert told in str(caught.value), source
        assert "\n" not in str(caught.value)


def test_a_mistake_on_the_command_line_is_exit_code_2(tmp_path: Path) -> None:
    for arguments, told in (
        (["--source", "text:none"], "output (null) must name a folder"),
        (["--output", str(tmp_path / "a"), "--tokenizer", "words"], "tokenizer (words) must be one of bytes"),
        (["--output", str(tmp_path / "a"), "--source", f"text:{tmp_path}/none"], "must match at least one file"),
    ):
        found = run(*arguments)
        assert found.returncode == 2
        assert found.stderr.startswith("error: ") and told in found.stderr and found.stderr.count("\n") == 1


def test_nul_bytes_empty_documents_and_a_long_one_are_kept(tmp_path: Path) -> None:
    contents = {"0.txt": "a\0b\0", "1.txt": "", "2.txt": "\n" * 10, "3.txt": "word " * 400_000, "4.txt": "last"}
    contents["5.txt"] = "another " * 400_000
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
    for tokenizer in ("bytes", "bpe:300"):
        found = prepare(recipe(f"text:{tmp_path}/*.txt", tokenizer), tmp_path / tokenizer.replace(":", "-"))
        kept = texts(found.train, found.tokenizer) + texts(found.validation, found.tokenizer)
        assert sorted(kept) == sorted(contents.values())


@pytest.mark.slow
def test_a_document_of_a_hundred_megabytes_is_kept(tmp_path: Path) -> None:
    line = "a line of text that is like any other, number %d\n"
    (tmp_path / "large.txt").write_text("".join(line % index for index in range(2_000_000)))
    (tmp_path / "small.txt").write_text("small")
    size = (tmp_path / "large.txt").stat().st_size
    assert size > 100_000_000
    found = prepare(recipe(f"text:{tmp_path}/*.txt", "bpe:1000"), tmp_path / "out", num_processes=2)
    assert found.train.num_bytes + found.validation.num_bytes == size + 5
    assert found.train.num_documents + found.validation.num_documents == 3, "the end of the large one is held out"


def test_brackets_in_a_folders_name_do_not_hide_that_the_source_would_read_the_shards(tmp_path: Path) -> None:
    folder = tmp_path / "a[1]"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"text": "some words"}\n' * 4)
    recipe = Recipe(f"jsonl:{folder}/**/*.jsonl", None, 0.3, "bytes")
    with pytest.raises(ConfigError, match="must lie outside of what source"):
        prepare(recipe, folder / "out")
    assert not (folder / "out").exists()
