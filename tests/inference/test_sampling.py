"""Sampling: the cache against full forward passes, and the draws against their probabilities."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from tfdp.config.sections import ModelConfig, SamplingConfig
from tfdp.data.tokenizers.tokenizer import ByteTokenizer
from tfdp.inference import sampling
from tfdp.inference.sampling import Sampler, draw
from tfdp.models.gpt import GPT
from tfdp.system.exits import ConfigError

CONTEXT = 8
SHAPES = [("learned", None), ("learned", 2), ("sinusoidal", None), ("rope", None), ("rope", 2), ("rope", 1)]


class Letters:
    """Twelve letters and an end of text."""

    name = "letters"
    vocab_size = 13
    end_of_text = 12
    fingerprint = "letters"

    def encode(self, text: str) -> np.ndarray:
        return np.array([ord(letter) - ord("a") for letter in text], np.int64)

    def decode(self, ids: np.ndarray) -> str:
        return "".join(chr(ord("a") + int(token)) for token in ids)


def make_model(**shape: Any) -> GPT:
    default = {"num_layers": 2, "num_heads": 4, "model_dim": 16, "mlp_dim": 24, "context_length": CONTEXT}
    fuse = shape.pop("fuse", False)
    return GPT(
        ModelConfig(**{**default, "init_stddev": 0.3, "zero_init": False, **shape}), Letters.vocab_size, fuse=fuse
    )


def make_endless_model(**shape: Any) -> GPT:
    """A model that gives the end of text 20 nats less than it would, so that it is never drawn."""
    model = make_model(norm="layer_norm", use_bias=True, **shape)
    model.output_norm.bias.assign(20 * np.eye(16)[0])
    table = model.output_embedding.numpy()
    table[:, 0] = np.arange(13) != Letters.end_of_text
    model.output_embedding.assign(table)
    return model


class FullPasses:
    """What sampling is documented to do, by a forward pass over the whole window for each token."""

    def __init__(self, model: GPT) -> None:
        self._forward = tf.function(model)

    def draws(self, prompt: str, config: SamplingConfig) -> Iterator[tuple[np.ndarray, int]]:
        """The logits of each token and what was drawn from them, ends of text included."""
        generator = np.random.Generator(np.random.Philox(config.seed))
        window = [Letters.end_of_text, *Letters().encode(prompt)][-CONTEXT:]
        for _ in range(config.num_tokens):
            padded = window + [0] * (CONTEXT - len(window))  # later tokens move no earlier logit
            logits = self._forward(tf.constant([padded])).numpy()[0, len(window) - 1]
            token = draw(logits, config, generator)
            yield logits, token
            window = [*window, token] if len(window) < CONTEXT else [*window, token][-CONTEXT // 2 :]


@pytest.fixture(scope="module")
def model() -> GPT:
    return make_model()


@pytest.fixture(scope="module")
def sampler(model: GPT) -> Sampler:
    return Sampler(model, Letters())


# ---------------------------------------------------------------------------------------------------
# The cache
# ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("position", "num_kv_heads"), SHAPES)
def test_reading_in_pieces_gives_the_logits_of_one_pass(position: str, num_kv_heads: int | None) -> None:
    model = make_model(position=position, num_kv_heads=num_kv_heads, use_bias=True)
    tokens = tf.constant(np.random.default_rng(0).integers(0, 13, (3, CONTEXT)), tf.int32)
    expected = model(tokens).numpy()
    assert np.abs(expected).max() > 1
    for sizes in ([1] * 8, [3, 1, 4], [8]):
        cache, start, logits = model.empty_cache(3), 0, []
        for size in sizes:
            piece, cache = model.extend(tokens[:, start : start + size], cache, tf.constant(start))
            logits.append(piece)
            start += size
        np.testing.assert_allclose(tf.concat(logits, axis=1), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("position", "num_kv_heads", "fuse"),
    [("learned", None, False), ("sinusoidal", 2, False), ("rope", None, False), ("rope", 2, False), ("rope", 2, True)],
)
def test_sampling_sees_the_logits_of_full_passes_also_when_the_window_moves(
    position: str, num_kv_heads: int | None, fuse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_endless_model(position=position, num_kv_heads=num_kv_heads, fuse=fuse)
    sampler, full_passes = Sampler(model, Letters()), FullPasses(model)
    seen: list[np.ndarray] = []

    def recording_draw(logits: tf.Tensor, *arguments: Any) -> int:
        seen.append(np.asarray(logits))
        return draw(logits, *arguments)

    monkeypatch.setattr(sampling, "draw", recording_draw)
    for prompt in ("", "abc", "abcdefg", "abcdefghijkl"):
        seen.clear()
        config = SamplingConfig(num_tokens=15, temperature=1.0)  # fills the context of 8 at least twice
        tokens = list(sampler.tokens(prompt, config))
        logits, drawn = zip(*full_passes.draws(prompt, config), strict=True)
        np.testing.assert_allclose(seen, logits, atol=1e-5)
        assert tokens == list(drawn)


def test_a_context_of_one_token_reads_on() -> None:
    model = make_model(context_length=1, position="rope")
    successors = tf.argmax(model(tf.range(13)[:, tf.newaxis])[:, 0], axis=-1).numpy()
    expected = [int(successors[Letters.end_of_text])]
    while len(expected) < 5:
        expected.append(int(successors[expected[-1]]))
    tokens = list(Sampler(model, Letters()).tokens("", SamplingConfig(num_tokens=5, temperature=0)))
    assert tokens == expected[: expected.index(12) if 12 in expected else None]


# ---------------------------------------------------------------------------------------------------
# The text
# ---------------------------------------------------------------------------------------------------


def test_greedy_text_is_the_same_for_every_seed_and_call(sampler: Sampler) -> None:
    texts = {sampler.text("abc", SamplingConfig(num_tokens=12, temperature=0, seed=seed)) for seed in (0, 1, 1)}
    assert len(texts) == 1


@pytest.mark.parametrize("changes", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-6}])
def test_the_narrowest_draw_is_greedy(sampler: Sampler, changes: dict[str, Any]) -> None:
    for prompt in ("", "abc", "hgfedcba"):
        greedy = sampler.text(prompt, SamplingConfig(num_tokens=12, temperature=0))
        assert (
            sampler.text(prompt, SamplingConfig(**{"num_tokens": 12, "temperature": 1.0, "seed": 5, **changes}))
            == greedy
        )


def test_a_seed_gives_the_same_text_again_and_another_seed_another(sampler: Sampler) -> None:
    texts = [sampler.text("abc", SamplingConfig(num_tokens=12, temperature=1.0, seed=seed)) for seed in (0, 1, 0)]
    assert texts[0] == texts[2] != texts[1]


def test_text_is_the_decoded_continuation_without_the_prompt(sampler: Sampler) -> None:
    config = SamplingConfig(num_tokens=12, temperature=1.0, seed=4)
    assert sampler.text("abc", config) == Letters().decode(np.array(list(sampler.tokens("abc", config))))


def test_an_end_of_text_ends_the_text(model: GPT, sampler: Sampler) -> None:
    full_passes, lengths = FullPasses(model), []
    for seed in range(8):
        config = SamplingConfig(num_tokens=12, temperature=1.0, seed=seed)
        tokens = list(sampler.tokens("", config))
        assert Letters.end_of_text not in tokens
        drawn = [token for _, token in full_passes.draws("", config)]
        end = drawn.index(Letters.end_of_text) if Letters.end_of_text in drawn else None
        assert tokens == drawn[:end]
        lengths.append(len(tokens))
    assert min(lengths) < 12 == max(lengths)


@pytest.mark.parametrize("num_tokens", [1, 7, 30])
def test_without_an_end_the_text_has_the_length_asked_for(num_tokens: int) -> None:
    tokens = list(Sampler(make_endless_model(), Letters()).tokens("", SamplingConfig(num_tokens=num_tokens, seed=2)))
    assert len(tokens) == num_tokens


def test_bytes_come_out_as_text() -> None:
    model = GPT(
        ModelConfig(num_layers=1, num_heads=2, model_dim=8, context_length=CONTEXT, zero_init=False),
        ByteTokenizer.vocab_size,
    )
    text = Sampler(model, ByteTokenizer()).text("é", SamplingConfig(num_tokens=10, temperature=1.0, seed=1))
    assert isinstance(text, str)
    assert 0 < len(text) <= 10


# ---------------------------------------------------------------------------------------------------
# One draw
# ---------------------------------------------------------------------------------------------------

PROBABILITIES = np.array([0.1, 0.4, 0.05, 0.3, 0.15])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, PROBABILITIES),
        ({"temperature": 0.5}, PROBABILITIES**2 / np.sum(PROBABILITIES**2)),
        ({"temperature": 2.0}, PROBABILITIES**0.5 / np.sum(PROBABILITIES**0.5)),
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7, 0]),
        ({"top_k": 9}, PROBABILITIES),
        ({"top_p": 0.39}, [0, 1, 0, 0, 0]),
        ({"top_p": 0.41}, [0, 4 / 7, 0, 3 / 7, 0]),
        ({"top_p": 0.8}, [0, 4 / 8.5, 0, 3 / 8.5, 1.5 / 8.5]),
        ({"top_p": 1.0}, PROBABILITIES),
        ({"top_k": 3, "top_p": 0.5}, [0, 4 / 7, 0, 3 / 7, 0]),  # 0.4 / 0.85 < 0.5: top_p counts what top_k left
        ({"top_k": 2, "temperature": 0.5}, [0, 16 / 25, 0, 9 / 25, 0]),
        ({"temperature": 0.0}, [0, 1, 0, 0, 0]),
    ],
)
def test_draws_are_as_frequent_as_their_probabilities(changes: dict[str, Any], expected: list[float]) -> None:
    config, generator = SamplingConfig(**{"temperature": 1.0, **changes}), np.random.Generator(np.random.Philox(0))
    logits = tf.constant(np.log(PROBABILITIES) + 7.0, tf.float32)
    num_draws = 2000
    counts = np.bincount([draw(logits, config, generator) for _ in range(num_draws)], minlength=5)
    probabilities = np.asarray(expected, np.float64)
    sigma = np.sqrt(probabilities * (1 - probabilities) / num_draws)
    assert np.all(np.abs(counts / num_draws - probabilities) <= 4 * sigma)


def test_impossible_and_huge_logits_are_no_trouble() -> None:
    generator = np.random.Generator(np.random.Philox(0))
    assert draw(tf.constant([-np.inf, 3e38, -3e38]), SamplingConfig(temperature=1e-3), generator) == 1
    drawn = {draw(tf.constant([-np.inf, 0.0, 0.0]), SamplingConfig(), generator) for _ in range(50)}
    assert drawn == {1, 2}


@pytest.mark.parametrize(
    ("key", "value", "fix"),
    [
        ("num_tokens", 0, "must be at least 1"),
        ("temperature", -0.1, "must not be negative: try 0.8"),
        ("top_k", 0, "must be at least 1: try 40"),
        ("top_p", 0.0, "must lie in (0, 1]: try 0.95"),
        ("top_p", 1.5, "must lie in (0, 1]: try 0.95"),
    ],
)
def test_a_wrong_setting_names_key_value_rule_and_fix(key: str, value: float, fix: str) -> None:
    with pytest.raises(ConfigError) as error:
        SamplingConfig(**{key: value})  # type: ignore[arg-type]
    assert str(error.value) == f"{key} ({value}) {fix}"
