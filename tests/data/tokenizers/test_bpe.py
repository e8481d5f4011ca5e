"""Byte-level BPE: the ids of `tokenizers`, of tiktoken and of keras_nlp, and every text comes back."""

import json
import random
from pathlib import Path

import keras_nlp
import numpy as np
import pytest
import tensorflow as tf

from tfdp.data.tokenizers import bpe
from tfdp.data.tokenizers.tokenizer import make_tokenizer, open_tokenizer, save_tokenizer
from tfdp.system.exits import ConfigError

PIECES = [
    "the quick brown fox jumps over it's we'll they've I'm don't",
    "def f(x):\n\treturn {'a': [1, 2.50, 0x1F]}\n\n\n    # comment  \n",
    "0123456789 ½ ² ٣",
    "漢字仮名交じり文と中文字符。測試。",
    "한국어 조선말 ",
    "😀👩‍👧🎉🇫🇷 é e\u0301",
    "\t\t \r\n \r\n\r\n",
    "\n\n\n   ",
    "!?.,;:'\"()[]{}<>'s't're",
    "\u3000\u00a0\u2009\u202f",
    "привет, мир العربية שלום ",
    "\x0b\x0c\x85\u2003\u2028\x0b\x0b",
]


def mixed_text(num_bytes: int, seed: int = 0) -> list[str]:
    """Documents of random snippets of many scripts, of white space and of emoji."""
    generator = random.Random(seed)
    texts, size = [], 0
    while size < num_bytes:
        parts = []
        for _ in range(generator.randint(1, 400)):
            piece = generator.choice(PIECES)
            start = generator.randrange(len(piece))
            parts.append(piece[start : start + generator.randint(1, 20)])
        texts.append("".join(parts))
        size += len(texts[-1].encode())
    return texts


@pytest.fixture(scope="module")
def tokenizer() -> bpe.BytePairTokenizer:
    return bpe.train(mixed_text(300_000, seed=1), 2000)


def test_the_vocabulary_begins_with_end_of_text_and_the_bytes(tokenizer: bpe.BytePairTokenizer) -> None:
    assert tokenizer.vocab_size == 2000
    assert tokenizer.end_of_text == 0
    assert tokenizer.token_bytes[0] == b""
    assert sorted(tokenizer.token_bytes[1:257]) == [bytes([byte]) for byte in range(256)]
    assert len(set(tokenizer.token_bytes)) == 2000
    assert tokenizer._ranks_are_merges


@pytest.mark.parametrize("num_bytes", [200_000, pytest.param(5_000_000, marks=pytest.mark.slow)])
def test_mixed_text_has_the_ids_of_all_three_libraries(tokenizer: bpe.BytePairTokenizer, num_bytes: int) -> None:
    texts = mixed_text(num_bytes)
    ids = [tokenizer.encode(text) for text in texts]
    reference = bpe.reference(tokenizer.vocabulary, tokenizer.merges, tokenizer.pattern)
    expected = [encoding.ids for encoding in reference.encode_batch(texts)]
    assert [each.tolist() for each in ids] == expected
    assert sum(len(each) for each in ids) > num_bytes / 5
    assert [tokenizer.decode(each) for each in ids] == texts
    keras = keras_nlp.tokenizers.BytePairTokenizer(vocabulary=tokenizer.vocabulary, merges=tokenizer.merges)
    keras._allow_python_workflow = False  # its path outside of a graph gives other ids
    mapped = tf.data.Dataset.from_tensor_slices(texts).map(keras)
    for text, mine, theirs in zip(texts, ids, mapped, strict=True):
        np.testing.assert_array_equal(mine, theirs.numpy(), err_msg=repr(text[:100]))


def test_what_was_saved_is_loaded_by_keras_nlp_with_the_same_ids(
    tokenizer: bpe.BytePairTokenizer, tmp_path: Path
) -> None:
    save_tokenizer(tokenizer, tmp_path / "saved")
    again = open_tokenizer(tmp_path / "saved")
    text = "def f(x):\n    return x  # 漢字\n"
    assert again.fingerprint == tokenizer.fingerprint == make_tokenizer(f"bpe:{tmp_path}/saved").fingerprint
    assert again.encode(text).tolist() == tokenizer.encode(text).tolist()
    folder = tmp_path / "saved"
    keras = keras_nlp.tokenizers.BytePairTokenizer(
        vocabulary=str(folder / bpe.VOCABULARY_FILE), merges=str(folder / bpe.MERGES_FILE)
    )
    keras._allow_python_workflow = False
    assert keras(tf.constant(text)).numpy().tolist() == tokenizer.encode(text).tolist()


@pytest.mark.parametrize("pattern", ["keras", "gpt2"])
def test_ten_thousand_random_strings_come_back(tokenizer: bpe.BytePairTokenizer, pattern: str) -> None:
    generator = np.random.default_rng(0)
    same = bpe.BytePairTokenizer(tokenizer.vocabulary, tokenizer.merges, pattern)
    reference = bpe.reference(tokenizer.vocabulary, tokenizer.merges, pattern)
    for _ in range(10_000):
        highest = int(generator.choice([0x80, 0x800, 0x3100, 0x110000]))
        codes = generator.integers(0, highest, int(generator.integers(0, 40)))
        text = "".join(chr(code) for code in codes.tolist() if not 0xD800 <= code < 0xE000)
        ids = same.encode(text)
        assert same.decode(ids) == text
        assert ids.tolist() == reference.encode(text).ids, repr(text)


def test_end_of_text_in_a_text_is_text(tokenizer: bpe.BytePairTokenizer) -> None:
    ids = tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.end_of_text not in ids
    assert tokenizer.decode(ids) == "a<|endoftext|>b"
    assert tokenizer.decode(np.concatenate([ids, [0], ids])) == "a<|endoftext|>b\n\na<|endoftext|>b"


@pytest.mark.parametrize("unit", [" ", "\n", "a", "!", "ab cd\n"])
def test_a_text_of_millions_of_characters_comes_back(tokenizer: bpe.BytePairTokenizer, unit: str) -> None:
    """tiktoken alone gives up on a million white spaces in a row."""
    text = unit * (2_200_000 // len(unit)) + "end"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_text_may_be_cut_into_segments_anywhere_that_it_is(tokenizer: bpe.BytePairTokenizer) -> None:
    for text in mixed_text(200_000, seed=2):
        whole = tokenizer.encode(text).tolist()
        for size in (1, 5, 100):
            parts = list(bpe.segments(text, size))
            assert "".join(parts) == text
            assert [index for part in parts for index in tokenizer.encode(part).tolist()] == whole


def test_a_vocabulary_of_gpt2s_form_is_read_from_its_own_files(tmp_path: Path) -> None:
    """The bytes come first and the end of text last, as in GPT-2's files."""
    trained = bpe.train(mixed_text(100_000, seed=3), 600)
    names = sorted(trained.vocabulary, key=lambda token: trained.vocabulary[token])[1:]
    vocabulary = {token: index for index, token in enumerate([*names, bpe.END_OF_TEXT])}
    (tmp_path / "encoder.json").write_text(json.dumps(vocabulary))
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\n" + "\n".join(trained.merges) + "\n", encoding="utf-8")
    found = make_tokenizer(f"gpt2:{tmp_path}")
    assert (found.vocab_size, found.end_of_text) == (600, 599)
    reference = bpe.reference(vocabulary, trained.merges, "gpt2")
    for text in mixed_text(200_000, seed=4):
        ids = found.encode(text)
        assert ids.tolist() == reference.encode(text).ids
        assert found.decode(ids) == text


def test_ids_in_another_order_than_the_merges_are_encoded_all_the_same(tokenizer: bpe.BytePairTokenizer) -> None:
    names = list(tokenizer.vocabulary)
    shuffled = bpe.BytePairTokenizer(
        {name: len(names) - 1 - index for index, name in enumerate(names)}, tokenizer.merges, "keras"
    )
    assert not shuffled._ranks_are_merges
    for text in mixed_text(50_000, seed=5):
        assert shuffled.encode(text).tolist() == (len(names) - 1 - tokenizer.encode(text).astype(int)).tolist()


@pytest.mark.parametrize("size", [256, 0, 1 << 21])
def test_a_size_that_cannot_be_is_refused(size: int) -> None:
    with pytest.raises(ConfigError, match=rf"tokenizer \(bpe:{size}\) must name 257 to"):
        bpe.train(["text"], size)


@pytest.mark.parametrize(
    ("vocabulary", "merges", "message"),
    [
        ("{", "", "must hold a vocabulary in JSON"),
        ("[]", "", "must map tokens to ids"),
        ('{"a": 1}', "", "must have the token <|endoftext|>"),
        ('{"<|endoftext|>": 0}', "", "must have all 256 bytes"),
        (None, "a b\n", "must be two tokens that make a third"),
    ],
)
def test_broken_files_are_named(
    tmp_path: Path, tokenizer: bpe.BytePairTokenizer, vocabulary: str | None, merges: str, message: str
) -> None:
    if vocabulary is None:
        vocabulary = json.dumps({name: index for name, index in tokenizer.vocabulary.items() if index < 257})
    (tmp_path / "vocab.json").write_text(vocabulary)
    (tmp_path / "merges.txt").write_text(merges)
    with pytest.raises(ConfigError) as caught:
        make_tokenizer(f"bpe:{tmp_path}")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_without_files_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"must be a folder with vocabulary.json or vocab.json or encoder.json"):
        make_tokenizer(f"gpt2:{tmp_path}")
