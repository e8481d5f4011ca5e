"""Vocabularies that others made: added tokens, gaps, merges in any order; the ids of `tokenizers`, or one line."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from tfdp.data.tokenizers import bpe
from tfdp.data.tokenizers.tokenizer import make_tokenizer, open_tokenizer, save_tokenizer
from tfdp.data.tokenizers.vocabulary import END_OF_TEXT, byte_characters
from tfdp.system.exits import ConfigError

MAKES_END = "<|endoftext| >"
BYTES = {END_OF_TEXT: 0, **{char: index for index, char in enumerate(byte_characters(), 1)}}


def write(folder: Path, vocabulary: object, merges: list[str]) -> str:
    """A folder of GPT-2's form, as a tokenizer's name."""
    (folder / "vocab.json").write_text(vocabulary if isinstance(vocabulary, str) else json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{merge}\n" for merge in merges), encoding="utf-8")
    return f"gpt2:{folder}"


def random_texts(count: int, seed: int, alphabet: str) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choice(alphabet) for _ in range(rng.randint(0, 30))) for _ in range(count)]


def assert_same_as_reference(tokenizer: bpe.BytePairTokenizer, texts: list[str]) -> None:
    reference = bpe.reference(tokenizer.vocabulary, tokenizer.merges, tokenizer.pattern)
    for text in texts:
        ids = tokenizer.encode(text)
        assert ids.tolist() == reference.encode(text).ids, repr(text)
        assert tokenizer.decode(ids) == text
    for token, index in tokenizer.vocabulary.items():
        if token != END_OF_TEXT:
            assert tokenizer.token_bytes[index].decode("utf-8", "replace") == reference.decode([index]), token
            assert tokenizer.decode(np.array([index])) == reference.decode([index])


@pytest.mark.parametrize("pattern", ["gpt2", "bpe"])
def test_added_tokens_are_never_encoded_to_and_decoded_as_the_reference_does(tmp_path: Path, pattern: str) -> None:
    """Some could be joined of pieces, some are outside of the alphabet of bytes, and ids between them are missing."""
    made = {"ab": 257, "Ġab": 258, "abc": 260}
    added = ["<|pad|>", "<|im_start|>", "cb", "ca", "bc", "a b", " ", "日本", "<｜▁｜>", "", "\n", "Ġ Ġ", "aa"]  # noqa: RUF001
    vocabulary = {**BYTES, **made, **{token: 270 + 3 * index for index, token in enumerate(added)}}
    write(tmp_path, vocabulary, ["a b", "Ġ ab", "ab c"])
    tokenizer = make_tokenizer(f"{pattern}:{tmp_path}")
    assert isinstance(tokenizer, bpe.BytePairTokenizer)
    assert tokenizer._ranks_are_merges
    assert tokenizer.vocab_size == len(tokenizer.token_bytes) == 270 + 3 * 12 + 1
    assert tokenizer.token_bytes[259] == b"" and tokenizer.decode(np.array([259, 257])) == "ab"
    texts = [*random_texts(500, 0, "abc é日本\n"), *added, "<|im_start|>ab<|pad|>", END_OF_TEXT]
    assert_same_as_reference(tokenizer, texts)
    used = {index for text in texts for index in tokenizer.encode(text).tolist()}
    assert not used & {vocabulary[token] for token in added}
    save_tokenizer(tokenizer, tmp_path / "saved")
    assert open_tokenizer(tmp_path / "saved").fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize("kind", ["as made", "shuffled merges", "shuffled ids", "repeated", "random"])
def test_merges_in_any_order_give_the_ids_of_the_reference(kind: str) -> None:
    """tiktoken, which encodes fast, joins pieces by the id of the whole; merges may say otherwise."""
    for seed in range(20):
        rng = random.Random(seed)
        tokens, merges = ["a", "b", "c", "d"], list[str]()
        while len(merges) < 12:
            left, right = rng.choice(tokens), rng.choice(tokens)
            if left + right not in tokens:
                tokens.append(left + right)
                merges.append(f"{left} {right}")
        made = tokens[4:]
        if kind == "shuffled merges":
            rng.shuffle(merges)
        elif kind == "shuffled ids":
            rng.shuffle(made)
        elif kind == "repeated":
            merges += rng.sample(merges, 4)
        elif kind == "random":  # other ways to make the same tokens
            ways = [(token[:cut], token[cut:]) for token in made for cut in range(1, len(token))]
            known = [f"{left} {right}" for left, right in ways if left in tokens and right in tokens]
            merges = rng.sample(known, min(len(known), 14))
        vocabulary = {**BYTES, **{token: index for index, token in enumerate(made, 257)}}
        tokenizer = bpe.BytePairTokenizer(vocabulary, merges, "gpt2")
        assert_same_as_reference(tokenizer, random_texts(100, seed, "abcd "))


@pytest.mark.parametrize(
    ("changes", "merges", "message"),
    [
        ({"ab": 2**20}, ["a b"], "the token ab must have an id below 1,048,576, and has 1048576"),
        ({"ab": 2**31}, ["a b"], "the token ab must have an id below 1,048,576, and has 2147483648"),
        ({"ab": 2**40}, ["a b"], "the token ab must have an id below 1,048,576, and has 1099511627776"),
        (
            {"ab": 10**400},
            ["a b"],
            "the token ab must have an id below 1,048,576, and has a number of about 401 digits",
        ),
        ({"ab": -1}, ["a b"], "vocab.json must map tokens to ids"),
        ({"ab": True}, ["a b"], "vocab.json must map tokens to ids"),
        ({"ab": 257.0}, ["a b"], "vocab.json must map tokens to ids"),
        ({"ab": None}, ["a b"], "vocab.json must map tokens to ids"),
        ({"ab": 66}, ["a b"], "the token ab must have an id of its own, and shares 66 with A"),
        ({"!": BYTES["A"]}, [], "the token A must have an id of its own, and shares 66 with !"),
        ({"x\ny": 0}, [], r"the token x\ny must have an id of its own, and shares 0 with <|endoftext|>"),
        ({"\ud800": 257}, [], r"the token \ud800 must be Unicode: it has half of a surrogate pair"),
        ({"": 257}, [" a"], "merge 0 ( a) must be two tokens that make a third"),
        ({"ab": 257}, ["a b", "ab"], "merge 1 (ab) must be two tokens that make a third"),
        ({"ab": 257}, ["a b", "a b c"], "merge 1 (a b c) must be two tokens that make a third"),
        (
            {"<|endoftext|": 257},
            ["<|endoftext| >"],
            "merge 0 (<|endoftext| >) must not make the end of text: leave it out",
        ),
    ],
)
def test_what_has_no_ids_is_one_line(
    tmp_path: Path, changes: dict[str, object], merges: list[str], message: str
) -> None:
    name = write(tmp_path, {**BYTES, **changes}, merges)
    with pytest.raises(ConfigError) as caught:
        make_tokenizer(name, "tokenizer")
    assert str(caught.value) == f"tokenizer ({tmp_path}): {message}"


@pytest.mark.parametrize(
    ("vocabulary", "message"),
    [
        (json.dumps(BYTES)[:-1] + ', "a": 300}', "the key a stands there twice: remove one"),
        ("[" * 100_000, "its brackets are nested too deeply"),
        ('{"a": ' + "9" * 5000 + "}", "Exceeds the limit"),
    ],
)
def test_a_vocabulary_that_is_no_json_is_one_line(tmp_path: Path, vocabulary: str, message: str) -> None:
    name = write(tmp_path, vocabulary, [])
    with pytest.raises(ConfigError, match=message) as caught:
        make_tokenizer(name, "tokenizer")
    assert str(caught.value).startswith(f"tokenizer ({tmp_path}) must hold a vocabulary in JSON and merges in UTF-8: ")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500
