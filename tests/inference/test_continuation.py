"""Several prompts as one batch, text as it comes, and stop strings."""

import pytest

from tests.inference.test_sampling import make_model
from tfdp.config.sections import SamplingConfig
from tfdp.data.tokenizers.tokenizer import ByteTokenizer
from tfdp.inference.sampling import Continuation, Sampler

PROMPTS = ["", "abc", "the longest prompt of all, which is not cut", "xy"]


@pytest.fixture(scope="module")
def sampler() -> Sampler:
    return Sampler(make_model(context_length=64, vocab_size=256), ByteTokenizer())


@pytest.mark.parametrize("config", [SamplingConfig(num_tokens=40, seed=3), SamplingConfig(num_tokens=7, temperature=0)])
def test_each_prompt_of_a_batch_is_continued_as_if_it_were_alone(sampler: Sampler, config: SamplingConfig) -> None:
    """Beyond the context length too, where the newer half is read again."""
    alone = [sampler.text(prompt, config) for prompt in PROMPTS]
    assert sampler.texts(PROMPTS, config) == alone
    assert len(set(alone)) == len(alone)


def test_a_row_beyond_the_tokens_of_the_tokenizer_is_never_drawn() -> None:
    sampler = Sampler(make_model(vocab_size=300), ByteTokenizer())
    tokens = list(sampler.tokens("a", SamplingConfig(num_tokens=200, temperature=50.0)))
    assert max(tokens) < 256


def stream(text: str, stop: tuple[str, ...]) -> tuple[list[str], bool]:
    written, pieces = Continuation(ByteTokenizer(), stop), []
    for byte in text.encode():
        pieces.append(written.add(byte))
        if written.is_stopped:
            break
    return [*pieces, written.end()], written.is_stopped


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one\n\ntwo", ("\n\n",), "one"),
        ("one\ntwo", ("\n\n",), "one\ntwo"),
        ("ends on a\n", ("\n\n",), "ends on a\n"),
        ("aab", ("ab", "aab"), ""),
        ("été\u2028ça", ("ç",), "été\u2028"),
        ("stop", ("stop",), ""),
    ],
)
def test_text_comes_in_whole_characters_and_ends_before_a_stop_string(
    text: str, stop: tuple[str, ...], expected: str
) -> None:
    pieces, is_stopped = stream(text, stop)
    assert "".join(pieces) == expected
    assert is_stopped == (expected != text)
    assert "\ufffd" not in "".join(pieces)


def test_broken_bytes_at_the_end_show_as_such() -> None:
    written = Continuation(ByteTokenizer())
    assert [written.add(token) for token in b"a\xc3"] == ["a", ""]
    assert written.end() == "\ufffd"
