"""Outputs for many prompts: padded in front, with cached keys and values, as the whole model would write them."""

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from tfdp.config.sections import DecodingConfig, DistributionConfig, ModelConfig, SamplingConfig
from tfdp.data.tokenizers.tokenizer import make_tokenizer
from tfdp.inference.decoding import Decoder, Prompts
from tfdp.inference.hypotheses import Hypotheses
from tfdp.inference.sampling import Sampler
from tfdp.models.gpt import GPT
from tfdp.ops.visibility import ByDocument
from tfdp.parallel import distribution

VOCAB, END = 12, 0
BASE = ModelConfig(
    num_layers=2, num_heads=2, model_dim=16, context_length=24, init_stddev=0.4, zero_init=False, num_kv_heads=1
)
PROMPTS = [[0, 5, 3], [0, 7, 7, 2, 9, 4, 1], [0], [0, 1, 2, 3, 4, 5, 6, 7, 8]]


def prompts(rows: list[list[int]], num_tokens: int, numbers: list[int] | None = None, width: int = 0) -> Prompts:
    width = width or max(map(len, rows))
    tokens = [[3] * (width - len(row)) + row for row in rows]  # what pads is never seen
    padding = [width - len(row) for row in rows]
    of_rows = tf.constant(numbers or list(range(len(rows))), tf.int64)
    return Prompts(tf.constant(tokens), tf.constant(padding), of_rows, tf.fill([len(rows)], num_tokens))


def decode(model: GPT, config: DecodingConfig, given: Prompts) -> list[list[int]]:
    signature = [tf.TensorSpec([None, None], tf.int32), tf.TensorSpec([None], tf.int32)]
    signature += [tf.TensorSpec([None], tf.int64), tf.TensorSpec([None], tf.int32)]
    decoder = Decoder(model, VOCAB, END, config)
    return tf.function(lambda *each: decoder(Prompts(*each)), signature, autograph=False)(*given).numpy().tolist()


def logits_after(model: GPT, prompt: list[int], written: list[int]) -> np.ndarray:
    """Of the whole sequence at once, as in training."""
    tokens = tf.constant([[*prompt, *written]])
    starts = tf.range(tokens.shape[1])[tf.newaxis] == 0
    in_prefix = tf.range(tokens.shape[1])[tf.newaxis] < len(prompt)
    is_whole = model.config.prompt_attention == "whole"
    attention = ByDocument(starts, in_prefix if is_whole else None)
    return model(tokens, attention=attention).numpy()[0, -1, :VOCAB]


def greedy(model: GPT, prompt: list[int], num_tokens: int) -> list[int]:
    written: list[int] = []
    while len(written) < num_tokens and END not in written:
        written.append(int(logits_after(model, prompt, written).argmax()))
    return written + [END] * (num_tokens - len(written))


@pytest.mark.parametrize("attention", ["whole", "causal"])
@pytest.mark.parametrize("position", ["rope", "learned", "sinusoidal"])
def test_padded_prompts_have_the_logits_of_each_alone(attention: Any, position: Any) -> None:
    model = GPT(replace(BASE, prompt_attention=attention, position=position), VOCAB, seed=1)
    given = prompts(PROMPTS, 3, width=11)
    cache = model.empty_cache(len(PROMPTS), 14)
    logits, cache = model.extend(given.tokens, cache, tf.constant(0), given.padding)
    more, _ = model.extend(tf.constant([[4]] * len(PROMPTS)), cache, tf.constant(11), given.padding)
    for row, prompt in enumerate(PROMPTS):
        np.testing.assert_allclose(logits[row, -1], logits_after(model, prompt, []), atol=2e-5)
        np.testing.assert_allclose(more[row, -1], logits_after(model, prompt, [4]), atol=2e-5)


def test_a_prompt_that_sees_itself_whole_has_other_logits() -> None:
    whole, causal = (GPT(replace(BASE, prompt_attention=each), VOCAB, seed=1) for each in ("whole", "causal"))
    difference = logits_after(whole, PROMPTS[1], []) - logits_after(causal, PROMPTS[1], [])
    assert np.abs(difference).max() > 0.01


@pytest.mark.parametrize("attention", ["whole", "causal"])
def test_greedy_outputs_are_those_of_each_prompt_alone(attention: Any) -> None:
    model = GPT(replace(BASE, prompt_attention=attention), VOCAB, seed=1)
    found = decode(model, DecodingConfig(max_tokens=8), prompts(PROMPTS, 8))
    assert found == [greedy(model, prompt, 8) for prompt in PROMPTS]
    assert any(END in row for row in found) and any(END not in row for row in found)
    # Fewer than max_tokens, as where the context ends: what is left is end of text
    assert decode(model, DecodingConfig(max_tokens=8), prompts(PROMPTS, 2)) == [[*row[:2], *[END] * 6] for row in found]


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_beams_that_keep_everything_find_the_best_output(penalty: float) -> None:
    """Against all outputs of up to three tokens of a vocabulary of five, one by one."""
    vocab, longest = 5, 3
    model = GPT(replace(BASE, prompt_attention="whole", init_stddev=0.25), vocab, seed=5)
    config = DecodingConfig(method="beam", beam_size=vocab**longest, max_tokens=longest, length_penalty=penalty)
    given = [[0, 3, 1], [0, 4, 2, 1], [0, 2]]
    decoder = Decoder(model, vocab, END, config)
    found = decoder(prompts(given, longest)).numpy().tolist()
    for prompt, output in zip(given, found, strict=True):
        scores = {}
        for length in range(1, longest + 1):
            for inner in itertools.product(range(1, vocab), repeat=length - 1):
                written = [*inner, END]
                tokens = tf.constant([[*prompt, *written]])
                places = tf.range(tokens.shape[1])[tf.newaxis]
                logits = model(tokens, attention=ByDocument(places == 0, places < len(prompt)))
                likely = tf.nn.log_softmax(logits)[0, len(prompt) - 1 : -1].numpy()
                total = sum(row[token] for row, token in zip(likely, written, strict=True))
                scores[tuple(written + [END] * (longest - length))] = total / ((5 + length) / 6) ** penalty
                if length == longest:  # nor need it end there
                    for last in range(1, vocab):
                        unfinished = total - likely[-1][END] + likely[-1][last]
                        scores[(*inner, last)] = unfinished / ((5 + length) / 6) ** penalty
        assert tuple(output) == max(scores, key=lambda each: scores[each])


def beam_search(model: GPT, prompt: list[int], size: int, longest: int, penalty: float) -> list[int]:
    """Step by step, each beginning by itself."""
    begun: list[tuple[float, list[int]]] = [(0.0, [])]
    ended: list[tuple[float, list[int]]] = []
    for length in range(1, longest + 1):
        candidates = []
        for total, written in begun:
            likely = tf.nn.log_softmax(logits_after(model, prompt, written)).numpy()
            candidates += [(total + float(likely[token]), [*written, token]) for token in range(VOCAB)]
        candidates = sorted(candidates, key=lambda each: -each[0])[: 2 * size]
        scale = ((5 + length) / 6) ** penalty
        ended += [(total / scale, written) for total, written in candidates if written[-1] == END]
        ended = sorted(ended, key=lambda each: -each[0])[:size]
        begun = [each for each in candidates if each[1][-1] != END][:size]
    scale = ((5 + longest) / 6) ** penalty
    ended += [(total / scale, written) for total, written in begun]  # unfinished, and maybe better all the same
    found = max(ended, key=lambda each: each[0])[1]
    return found + [END] * (longest - len(found))


@pytest.mark.parametrize("penalty", [0.0, 0.6])
def test_few_beams_are_those_of_a_search_step_by_step(penalty: float) -> None:
    model = GPT(replace(BASE, prompt_attention="whole", init_stddev=0.25), VOCAB, seed=3)
    config = DecodingConfig(method="beam", beam_size=3, length_penalty=penalty, max_tokens=5)
    found = decode(model, config, prompts(PROMPTS, 5))
    assert found == [beam_search(model, prompt, 3, 5, penalty) for prompt in PROMPTS]
    assert found != [greedy(model, prompt, 5) for prompt in PROMPTS]


def test_what_is_drawn_depends_on_the_example_and_the_seed_alone() -> None:
    model = GPT(replace(BASE, prompt_attention="whole", init_stddev=0.1), VOCAB, seed=2)
    config = DecodingConfig(method="sampling", max_tokens=8, seed=4)
    together = decode(model, config, prompts(PROMPTS, 8, [10, 11, 12, 13]))
    alone = [decode(model, config, prompts([PROMPTS[row]], 8, [10 + row], width=12))[0] for row in range(4)]
    assert together == alone
    assert together != decode(model, config, prompts(PROMPTS, 8, [20, 21, 22, 23]))
    assert together != decode(model, replace(config, seed=5), prompts(PROMPTS, 8, [10, 11, 12, 13]))
    greedy_rows = [greedy(model, prompt, 8) for prompt in PROMPTS]
    assert decode(model, replace(config, top_k=1), prompts(PROMPTS, 8)) == greedy_rows
    assert decode(model, replace(config, top_p=1e-6), prompts(PROMPTS, 8)) == greedy_rows


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    model, prompt, num = GPT(BASE, VOCAB, seed=2), PROMPTS[1], 4000
    config = DecodingConfig(method="sampling", max_tokens=1, temperature=2.0, top_k=6, top_p=0.9)
    found = decode(model, config, prompts([prompt] * num, 1))
    chances = tf.nn.softmax(logits_after(model, prompt, []) / 2.0).numpy().astype(np.float64)
    order = np.argsort(-chances)[:6]
    kept = chances[order] / chances[order].sum()
    kept = np.where(np.cumsum(kept) - kept < 0.9, kept, 0)
    expected = np.zeros(VOCAB)
    expected[order] = kept / kept.sum()
    shares = np.bincount(np.ravel(found), minlength=VOCAB) / num
    assert set(np.flatnonzero(shares)) <= set(np.flatnonzero(expected))
    np.testing.assert_allclose(shares, expected, atol=4 * np.sqrt(0.25 / num))


@pytest.mark.parametrize(
    "method", ["greedy", *(pytest.param(each, marks=pytest.mark.slow) for each in ("beam", "sampling"))]
)
def test_outputs_are_the_same_on_any_number_of_replicas(method: Any) -> None:
    """And in the order of the prompts; the last passes have rows without a prompt."""
    tokenizer = make_tokenizer("bytes", "data.tokenizer")
    generator = np.random.default_rng(0)
    texts = ["".join(generator.choice(list("abcdef"), length)) for length in generator.integers(0, 40, 21)]
    given = [[tokenizer.end_of_text, *tokenizer.encode(text).tolist()] for text in texts]
    found = []
    for num_replicas, parallel in ((1, 2), (2, 1), (4, 1)):
        strategy = distribution.make_strategy(DistributionConfig(num_replicas=num_replicas))
        with strategy.scope():
            model = GPT(replace(BASE, prompt_attention="whole", context_length=42), tokenizer.vocab_size, seed=3)
        config = DecodingConfig(method=method, rows=4, max_tokens=6, beam_size=2)
        made = Hypotheses(strategy, model, tokenizer, config, parallel)(given, range(len(given)))
        found.append([each.text for each in made])
    assert all(each == found[0] for each in found[1:])
    assert len(set(found[0])) >= 5
    end = tokenizer.end_of_text
    decoder = Decoder(model, tokenizer.vocab_size, end, config)
    for text, output in zip(given, found[0], strict=True):
        if method != "sampling" and len(text) <= 36:  # what is longer has less room
            ids = decoder(prompts([text], 6)).numpy()[0].tolist()
            assert tokenizer.decode(np.array([*ids, end][: [*ids, end].index(end)])) == output


def test_a_prompt_leaves_room_and_what_is_cut_or_unfinished_is_told() -> None:
    tokenizer = make_tokenizer("bytes", "data.tokenizer")
    model = GPT(replace(BASE, prompt_attention="whole"), tokenizer.vocab_size, seed=3)  # of 24 tokens
    config = DecodingConfig(max_tokens=10, rows=2)
    texts = ["abc", "a" * 17, "b" * 18, "c" * 60]
    given = [[tokenizer.end_of_text, *tokenizer.encode(text).tolist()] for text in texts]
    found = Hypotheses(tf.distribute.get_strategy(), model, tokenizer, config)(given, range(4))
    assert [each.is_cut for each in found] == [False, False, True, True]  # a quarter of 24 is left, at least
    assert [each.has_ended for each in found] == [False] * 4
    cutting = Hypotheses(tf.distribute.get_strategy(), model, tokenizer, config, too_long="cut_input")
    assert [each.is_cut for each in cutting(given, range(4))] == [False, False, True, True]
    kept = [*given[3][:10], *given[3][-8:]]  # 18 tokens: how it begins, and what stands before the answer
    assert cutting(given[3:], [3])[0].text == decode_bytes(model, tokenizer, [kept], 6)[0]
    # The second has the last place of its context, and no token beyond it
    alone = decode_bytes(model, tokenizer, [given[1], given[3][-18:]], 6)
    assert [found[1].text, found[3].text] == alone


def decode_bytes(model: GPT, tokenizer: Any, rows: list[list[int]], num_tokens: int) -> list[str]:
    decoder = Decoder(model, tokenizer.vocab_size, tokenizer.end_of_text, DecodingConfig(max_tokens=num_tokens))
    return [tokenizer.decode(ids) for ids in decoder(prompts(rows, num_tokens)).numpy()]


def test_what_is_drawn_goes_by_the_number_of_an_example() -> None:
    tokenizer = make_tokenizer("bytes", "data.tokenizer")
    model = GPT(replace(BASE, prompt_attention="whole"), tokenizer.vocab_size, seed=3)
    config = DecodingConfig(method="sampling", max_tokens=6, rows=2)
    hypotheses = Hypotheses(tf.distribute.get_strategy(), model, tokenizer, config)
    given = [[tokenizer.end_of_text, 65]] * 5
    together = hypotheses(given, [3, 4, 5, 6, 3])
    assert together[0] == together[4] and len({each.text for each in together}) == 4
    assert [hypotheses(given[:1], [number])[0] for number in (3, 4, 5, 6)] == together[:4]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_compiled_kernels_write_the_same(precision: str) -> None:
    config = DecodingConfig(max_tokens=4)
    plain, fused = (
        GPT(replace(BASE, prompt_attention="whole"), VOCAB, seed=1, precision=precision, fuse=fuse)
        for fuse in (False, True)
    )
    assert decode(plain, config, prompts(PROMPTS, 4)) == decode(fused, config, prompts(PROMPTS, 4))


def test_a_model_that_sees_prompts_whole_is_sampled_as_it_was_trained() -> None:
    tokenizer = make_tokenizer("bytes", "data.tokenizer")
    model = GPT(replace(BASE, prompt_attention="whole"), tokenizer.vocab_size, seed=3)
    sampler = Sampler(model, tokenizer)
    config = SamplingConfig(num_tokens=50, temperature=0)
    texts = ["ab", "xyzuvw"]
    given = [[tokenizer.end_of_text, *tokenizer.encode(text).tolist()] for text in texts]
    room = [25 - len(ids) for ids in given]  # it ends with the context: its own text is no prompt
    alone = [decode_bytes(model, tokenizer, [ids], num)[0] for ids, num in zip(given, room, strict=True)]
    assert sampler.texts(texts, config) == alone
