"""Sequences of whole documents, and documents that do not see each other in packed ones."""

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from tfdp.config.sections import ModelConfig
from tfdp.data.pipeline import Order
from tfdp.data.sequences import DocumentSequences, PackedSequences, sequences_of
from tfdp.data.shards import ABSENT, Split
from tfdp.models.gpt import GPT
from tfdp.ops.visibility import ByDocument, within_documents
from tfdp.tasks.causal_lm import next_token_loss
from trainers import causal_lm
from trainers.causal_lm import Config

END = 0


def make_split(folder: Path, lengths: list[int]) -> Split:
    """Documents of the ids 1, 2, 3 ... of these lengths, with the end of text around."""
    ids, starts, next_id = [END], [], 1
    for length in lengths:
        starts.append(len(ids))
        ids += [*range(next_id, next_id + length), END]
        next_id += length
    np.save(folder / "starts.npy", np.array(starts, dtype=np.int64))
    (folder / "names.jsonl").write_text("".join(f'"{index}"\n' for index in range(len(lengths))))
    tokens = np.array(ids, dtype=np.uint16)
    return Split([tokens], len(lengths), len(ids), (folder / "starts.npy", folder / "names.jsonl"))


@pytest.mark.parametrize("context_length", [1, 4, 20])
def test_sequences_know_how_many_tokens_a_model_computes(tmp_path: Path, context_length: int) -> None:
    split = make_split(tmp_path, [2, 4, 3, 0, 9, 30])
    for form in ("packed", "documents", "whole"):
        for rule in ("cut_start", "cut_end", "skip"):
            sequences = sequences_of(split, context_length, form, rule)  # type: ignore[arg-type]
            rows = sequences.rows(np.arange(sequences.num_sequences))
            assert sequences.num_inputs == np.sum(rows[:, 1:] != ABSENT)


def test_a_mixture_has_the_mean_of_its_sources(tmp_path: Path) -> None:
    split = make_split(tmp_path, [2, 4, 3, 0, 9, 30])
    sources = [sequences_of(split, 4, "packed"), sequences_of(split, 9, "documents")]
    assert [(each.num_inputs, each.num_sequences) for each in sources] == [(54, 14), (54, 10)]
    order = Order(sources, [Fraction(3, 4), Fraction(1, 4)], "shuffled", 0, 4)
    assert order.tokens_per_sequence == pytest.approx(0.75 * 54 / 14 + 0.25 * 54 / 10)


# --- One document a sequence -----------------------------------------------------------------------


def test_a_document_begins_a_sequence_and_a_longer_one_takes_several(tmp_path: Path) -> None:
    sequences = DocumentSequences(make_split(tmp_path, [2, 4, 3, 0, 9]), context_length=4)
    assert sequences.rows(np.arange(sequences.num_sequences)).tolist() == [
        [END, 1, 2, END, ABSENT],
        [END, 3, 4, 5, 6],
        [6, END, ABSENT, ABSENT, ABSENT],
        [END, 7, 8, 9, END],
        [END, END, ABSENT, ABSENT, ABSENT],
        [END, 10, 11, 12, 13],
        [13, 14, 15, 16, 17],
        [17, 18, END, ABSENT, ABSENT],
    ]
    named = [sequences.documents_of(index) for index in range(sequences.num_sequences)]
    assert named == [["0"], ["1"], ["1"], ["2"], [], ["4"], ["4"], ["4"]]


@pytest.mark.parametrize("context_length", [1, 3, 4, 16, 100])
def test_both_forms_predict_every_token_but_the_first_once(tmp_path: Path, context_length: int) -> None:
    split = make_split(tmp_path, [5, 1, 30, 0, 16, 3])
    expected = [*split.read(np.array([0]), np.array([split.num_tokens]), split.num_tokens)[0, 1:].tolist()]
    for form in ("packed", "documents"):
        sequences = sequences_of(split, context_length, form)  # type: ignore[arg-type]
        targets = sequences.rows(np.arange(sequences.num_sequences))[:, 1:]
        assert targets[targets != ABSENT].tolist() == expected


# --- Documents apart -------------------------------------------------------------------------------


def test_positions_and_sight_start_anew_at_each_document() -> None:
    starts = tf.constant([[False, False, True, False, False, True], [True, False, False, False, False, False]])
    positions, visible = within_documents(starts)
    assert positions.numpy().tolist() == [[0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5]]
    seen = [[np.flatnonzero(row).tolist() for row in each] for each in visible.numpy()[:, 0]]
    assert seen[0] == [[0], [0, 1], [2], [2, 3], [2, 3, 4], [5]]
    assert seen[1] == [list(range(index + 1)) for index in range(6)]


@pytest.mark.parametrize("position", ["rope", "learned", "sinusoidal"])
@pytest.mark.parametrize("num_kv_heads", [None, 2])
def test_logits_of_a_packed_document_are_those_of_the_document_alone(position: str, num_kv_heads: int | None) -> None:
    config = ModelConfig(
        num_layers=2,
        num_heads=4,
        num_kv_heads=num_kv_heads,
        model_dim=32,
        context_length=24,
        position=position,  # type: ignore[arg-type]
        zero_init=False,
        init_stddev=0.3,
    )
    model = GPT(config, vocab_size=40, seed=1)
    generator = np.random.default_rng(0)
    documents = [np.concatenate([[END], generator.integers(1, 40, length)]) for length in (6, 0, 9, 5)]
    packed = np.concatenate(documents)[None, :24].astype(np.int32)
    found = model(tf.constant(packed), attention=ByDocument(tf.constant(packed == END))).numpy()[0]
    start = 0
    for document in documents:
        alone = np.zeros((1, 24), np.int32)
        alone[0, : len(document)] = document
        expected = model(tf.constant(alone)).numpy()[0, : len(document)]
        np.testing.assert_allclose(found[start : start + len(document)], expected, rtol=1e-5, atol=1e-5)
        start += len(document)
    together = model(tf.constant(packed)).numpy()[0]
    assert np.abs(together[7:] - found[7:]).max() > 0.01, "without it documents see those before them"


def test_the_loss_of_packed_documents_is_the_sum_of_their_own(tmp_path: Path) -> None:
    split = make_split(tmp_path, [6, 2, 9, 3])
    config = ModelConfig(num_layers=1, num_heads=2, model_dim=16, context_length=24, zero_init=False)
    model = GPT(config, vocab_size=40, seed=1)
    loss, step = next_token_loss(model, None, document_start=END), tf.constant(0, tf.int64)
    sums = []
    for sequences in (PackedSequences(split, 24), DocumentSequences(split, 24)):
        rows = sequences.rows(np.arange(sequences.num_sequences))
        loss_sum, count = loss({"tokens": tf.constant(rows)}, step)
        assert int(count[0]) == split.num_tokens - 1
        sums.append(float(loss_sum[0]))
    assert sums[0] == pytest.approx(sums[1], rel=1e-6)


@pytest.mark.parametrize(
    "data",
    [
        {"document_attention": True},
        {"sequences": "documents"},
        pytest.param({"partition": "block"}, marks=pytest.mark.slow),
    ],
)
def test_a_run_of_each_form_does_not_know_its_layout(
    tiny_config: Callable[..., Config], data: dict[str, object]
) -> None:
    losses = []
    for num_replicas in (1, 2):
        config = tiny_config(f"{num_replicas}", data=data, distribution={"num_replicas": num_replicas})
        summary = causal_lm.train(config)
        losses.append((summary["train_loss"], summary["validation_loss"]))
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    assert losses[0][0] < 4.5
