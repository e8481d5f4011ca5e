"""Text to ids and back."""

import numpy as np
import pytest

from tfdp.exits import ConfigError
from tfdp.tokenizer import ByteTokenizer, make_tokenizer, size_to_train

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
        ConfigError, match=r"^data.tokenizer \(words\) must be one of bytes, bpe:SIZE, bpe:FOLDER, gpt2:FOLDER or "
    ):
        make_tokenizer("words")


@pytest.mark.parametrize("name", ["bpe:²", "bpe:٣", "bpe:" + "9" * 5000, "bpe:", "gpt2:300"])
def test_a_size_is_ascii_digits(name: str) -> None:
    assert size_to_train("bpe:300") == 300
    assert size_to_train(name) is None
