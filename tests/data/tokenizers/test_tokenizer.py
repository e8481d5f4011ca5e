"""Text to ids and back."""

import os
from pathlib import Path

import numpy as np
import pytest

from tfdp.data.tokenizers.tokenizer import ByteTokenizer, make_tokenizer, save_tokenizer, size_to_train
from tfdp.system.exits import ConfigError

TEXTS = {
    "empty": "",
    "ascii": "def f(x):\n\treturn x\n",
    "emoji": "👩‍👩‍👧‍👦 🇺🇳 ☕",
    "scripts": "naïve Привет 你好 שלום नमस्ते",
    "NUL": "a\0b\0",
    "line ends": "a\r\nb\rc\n\u2028d\x85",
    "combining": "e\u0301 é \ufeff",
    "edges": "\x7f\x80\u07ff\u0800\uffff\U00010000\U0010ffff",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_bytes_round_trip(text: str) -> None:
    tokenizer = make_tokenizer("bytes")
    ids = tokenizer.encode(text)
    assert ids.tolist() == list(text.encode())
    assert ids.dtype == np.uint8
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids.astype(np.int32)) == text


def test_ids_are_the_utf8_bytes() -> None:
    assert ByteTokenizer().encode("é\r\n").tolist() == [0xC3, 0xA9, 13, 10]


def test_the_end_of_text_never_occurs_in_utf8() -> None:
    tokenizer = ByteTokenizer()
    scalars = (chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000)
    present = np.bincount(tokenizer.encode("".join(scalars)), minlength=256) > 0
    assert not present[tokenizer.end_of_text]
    assert tokenizer.end_of_text < tokenizer.vocab_size == 256
    assert np.flatnonzero(~present).tolist() == [0xC0, 0xC1, *range(0xF5, 0x100)]


def test_the_end_of_text_reads_as_a_blank_line() -> None:
    tokenizer = ByteTokenizer()
    ids = np.concatenate([tokenizer.encode("é"), [tokenizer.end_of_text], tokenizer.encode("b")])
    assert tokenizer.decode(ids) == "é\n\nb"


@pytest.mark.parametrize(
    ("ids", "text"),
    [
        ([0x80], "\ufffd"),
        ([0x61, 0xC3], "a\ufffd"),
        ([0xC3, 0x61], "\ufffda"),
        ([0xF0, 0x9F, 0x98], "\ufffd"),
        ([0xC3, 0xFF, 0xA9], "\ufffd\n\n\ufffd"),
        ([], ""),
    ],
)
def test_broken_utf8_decodes_to_replacement_characters(ids: list[int], text: str) -> None:
    assert ByteTokenizer().decode(np.array(ids)) == text


def test_an_unknown_tokenizer_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"^data.tokenizer \(words\) must be one of bytes, bpe:SIZE, bpe:FOLDER, gpt2:FOLDER, "
    ):
        make_tokenizer("words")


@pytest.mark.parametrize("name", ["vocabulary.json", "merges.txt", "tokenizer.tfdp.json"])
@pytest.mark.timeout(60)
def test_a_pipe_in_a_tokenizers_folder_is_refused_at_once(tmp_path: Path, name: str) -> None:
    (tmp_path / "vocabulary.json").write_text("{}")
    (tmp_path / "merges.txt").write_text("")
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(ConfigError, match="it is a pipe, not a regular file"):
        make_tokenizer(f"bpe:{tmp_path}")


@pytest.mark.parametrize("size", ["0", "256", "1048577", "9" * 400, "9" * 5000, "0" * 5000])
def test_a_size_that_cannot_be_is_one_short_line(size: str) -> None:
    for find in (make_tokenizer, size_to_train):
        with pytest.raises(ConfigError, match=r"^tokenizer \(bpe:.*\) must name 257 to 1,048,576 tokens") as caught:
            find(f"bpe:{size}")
        assert len(str(caught.value)) < 300


@pytest.mark.parametrize("name", ["bpe:²", "bpe:٣٠٠", "bpe:-5", "bpe:" + "a" * 300, "bpe:a\0b", "gpt2:" + "a/" * 3000])
def test_what_is_no_size_is_a_folder_that_is_not_there(name: str) -> None:
    assert size_to_train(name) is None
    with pytest.raises(ConfigError, match=r"^data.tokenizer \(.*\) must be a folder with vocabulary.json") as caught:
        make_tokenizer(name)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", "{}", '{"kind": "none"}', '{"kind": "bpe"}', '{"kind": "bpe", "pattern": []}']
)
def test_a_folder_that_says_nothing_of_its_tokenizer_is_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.tfdp.json").write_text(content)
    with pytest.raises(ConfigError, match="must be a tokenizer that tfdp wrote, but ") as caught:
        make_tokenizer(f"bpe:{tmp_path}")
    assert str(caught.value).isprintable()


def test_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tokenizer(ByteTokenizer(), tmp_path / "saved")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert make_tokenizer("bpe:~/saved").fingerprint == ByteTokenizer.fingerprint
