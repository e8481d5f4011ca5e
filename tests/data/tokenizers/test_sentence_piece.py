"""SentencePiece models: ids and back, and what is no such model."""

import io
import random
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from tfdp.data.tokenizers.sentence_piece import SentencePieceTokenizer
from tfdp.data.tokenizers.tokenizer import make_tokenizer
from tfdp.system.exits import ConfigError

TEXTS = ["the quick brown fox", "jumps over the lazy dog", "naïve café 漢字"]


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def model(request: pytest.FixtureRequest) -> bytes:
    """A model of 330 pieces, of which 256 are bytes; small, so that damage meets its pieces."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 50),
        model_writer=written,
        vocab_size=330,
        model_type=request.param,
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    return written.getvalue()


def test_texts_come_back(model: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.model").write_bytes(model)
    tokenizer = make_tokenizer(f"sentencepiece:{tmp_path}/a.model")
    for text in [*TEXTS, "☃ unknown"]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.end_of_text not in ids
        assert b"".join(tokenizer.token_bytes[index] for index in ids.tolist()) == b" " + text.encode()


def test_a_damaged_model_is_refused_or_works(model: bytes) -> None:
    rng = random.Random(0)
    num_refused = 0
    for _ in range(400):
        data = bytearray(model)
        start = rng.randrange(len(data))
        if rng.random() < 0.5:
            data[start] ^= 1 << rng.randrange(8)
        elif rng.random() < 0.5:
            del data[start:]
        else:
            data[start : start + 4] = rng.randbytes(4)
        try:
            tokenizer = SentencePieceTokenizer(bytes(data), "data.tokenizer (a.model)")
            assert len(tokenizer.token_bytes) == tokenizer.vocab_size
            assert isinstance(tokenizer.decode(np.arange(tokenizer.vocab_size)), str)
            assert tokenizer.end_of_text not in tokenizer.encode(" ".join(TEXTS))
        except ConfigError as error:
            assert str(error).isprintable()
            num_refused += 1
    assert num_refused > 200


@pytest.mark.parametrize("content", [b"", b"{}", b"\0" * 100, b"not a model " * 100])
def test_what_is_no_model_is_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.model"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        make_tokenizer(f"sentencepiece:{path}")
    assert str(caught.value).startswith(f"data.tokenizer ({path}) must be a SentencePiece model")
    assert str(caught.value).isprintable()
