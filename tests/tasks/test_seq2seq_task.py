"""Scores of texts, against values by hand and from the papers' own examples; what a batch of pairs learns and sees."""

import math
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from tfdp.config.sections import DecodingConfig, ModelConfig
from tfdp.data.shards import Split
from tfdp.inference.hypotheses import example_of
from tfdp.models.gpt import GPT
from tfdp.tasks import text_scores
from tfdp.tasks.flags import STARTS, UNSCORED
from tfdp.tasks.seq2seq import Seq2Seq
from tfdp.tasks.task import Metric, Output, row_losses
from tfdp.tasks.text_scores import SCORES, score, signature
from trainers import seq2seq

# Two examples in one row: END 4 5 | 6 7 END and END 8 | 9 END, then nothing
ROW = [0 | STARTS, 4 | UNSCORED, 5 | UNSCORED, 6, 7, 0 | STARTS, 8 | UNSCORED, 9, 0, -1]


@pytest.mark.parametrize(
    ("name", "hypotheses", "references", "expected"),
    [
        ("bleu", ["the cat sat on the mat"], ["the cat sat on the mat"], 100.0),
        # 5/6 words, 3/5 pairs, 2/4 triples, 1/3 fours, as long as the reference
        ("bleu", ["the cat sat on a mat"], ["the cat sat on the mat"], 100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25),
        ("chrf", ["abc"], ["abc"], 100.0),
        ("chrf", ["xyz"], ["abc"], 0.0),
        ("rouge1", ["police kill the gunman"], ["police killed the gunman"], 1.0),  # by their stems
        ("rouge2", ["the gunman kill police"], ["police killed the gunman"], 1 / 3),
        ("rougeL", ["the gunman kill police"], ["police killed the gunman"], 0.5),  # Lin 2004, section 3
        ("exact_match", ["a b ", "c"], ["a b", "C"], 0.5),
        ("squad_exact_match", ["The  Beatles!", "x"], ["beatles", "y"], 0.5),
        ("squad_f1", ["the black cat", "x"], ["a cat", "y"], 0.5 * 2 / 3),
        ("squad_f1", ["the", "a"], ["an", "b"], 0.5),  # nothing is left of the first, and of both
        ("wer", ["a b c", "d"], ["a x c", "d e"], 2 / 5),
        ("wer", ["", "a"], ["x", "a"], 1 / 2),
        ("wer", ["a b"], ["a\nb"], 0.0),
        ("rouge1", ["chats noirs été"], ["chat noir été"], 1.0),
    ],
)
def test_scores_by_hand(name: str, hypotheses: list[str], references: list[str], expected: float) -> None:
    assert score(name, hypotheses, references) == pytest.approx(expected, abs=1e-6)


def test_every_score_of_a_recipe_is_one_of_these() -> None:
    assert seq2seq.Score.__args__ == tuple(SCORES)  # type: ignore[attr-defined]
    assert all(math.isnan(score(name, [], [])) for name in SCORES)
    same = ["the same four words", "слова всех письменностей мира", "所有 文字"]
    best = {name: 100 if name in ("bleu", "chrf") else 0 if name == "wer" else 1 for name in SCORES}
    assert {name: score(name, same, same) for name in SCORES} == pytest.approx(best)


def test_signatures_are_those_of_sacrebleu() -> None:
    bleu = signature("bleu")
    assert bleu is not None and bleu.startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert signature("rougeL") is None
    task = Seq2Seq(["chrf", "wer"])
    assert list(task.facts) == ["signature/chrf"] and "nc:6|nw:0" in task.facts["signature/chrf"]
    searched = Seq2Seq(["wer"], decoding=DecodingConfig(method="beam", beam_size=5))
    assert searched.facts == {"decoding": "beam 5, length penalty 0.6, 64 tokens at most"}
    assert (task.best, task.best_is_lowest) == ("chrf", False)
    assert [(Seq2Seq(names).best, Seq2Seq(names).best_is_lowest) for names in (["wer"], [])] == [
        ("wer", True),
        ("loss", True),
    ]


def test_metrics_need_outputs_and_their_table_is_one() -> None:
    task = Seq2Seq(["chrf", "exact_match"])
    totals = {"loss": 2.0, "targets": 4, "bytes": 9}
    assert list(task.metrics(totals)) == ["loss", "perplexity"]
    outputs = [Output("a|b\nc", "d", "d"), Output("<e>", "*f*", "g", has_ended=False)]
    found = task.metrics({**totals, "outputs": outputs})
    assert found["exact_match"].value == 0.5 and found["chrf"].text.startswith("chrf ")
    assert found["unfinished"] == Metric(0.5, "50.0% unfinished") and found["num_outputs"].value == 2
    assert task.metrics({**totals, "outputs": outputs[:1]})["unfinished"].text == ""
    table = task.exhibits({"outputs": outputs})["outputs"].splitlines()
    assert table[2:] == ["| a&#124;b<br>c | d | d |", "| &#60;e&#62; | &#42;f&#42; | g |"]
    many = [Output(str(number), "", "") for number in range(23)]
    shown = task.exhibits({"outputs": many})["outputs"].splitlines()[2:]
    assert [line.split()[1] for line in shown] == ["0", "1", "3", "5", "7", "9", "11", "13", "15", "17", "19", "21"]
    assert task.exhibits(totals) == {}


def test_targets_alone_are_learned_and_examples_are_apart() -> None:
    batch = Seq2Seq([]).batch({"tokens": tf.constant([ROW])})
    assert batch.inputs.numpy().tolist() == [[0, 4, 5, 6, 7, 0, 8, 9, 0]]
    assert batch.targets.numpy().tolist() == [[-1, -1, 6, 7, 0, -1, 9, 0, -1]]
    assert batch.attention.in_prefix.numpy().tolist() == [[True] * 3 + [False] * 2 + [True] * 2 + [False] * 2]


def test_pairs_in_one_row_learn_what_each_learns_alone() -> None:
    config = ModelConfig(
        num_layers=2, num_heads=2, model_dim=16, context_length=9, zero_init=False, prompt_attention="whole"
    )
    model = GPT(config, 10)
    losses = row_losses(Seq2Seq([]), model)
    alone = [ROW[:5] + [0] + [-1] * 4, [0 | STARTS, *ROW[6:9]] + [-1] * 6]

    def total(rows: list[list[int]]) -> float:
        given = {"tokens": tf.constant(rows), "position": tf.range(len(rows), dtype=tf.int64)}
        sums, counts = losses(given, tf.constant(0, tf.int64))
        assert counts.numpy().sum() == 5
        return float(tf.reduce_sum(sums))

    assert total([ROW]) == pytest.approx(total(alone), rel=1e-6)


def test_a_second_prompt_is_no_part_of_the_first() -> None:
    """A conversation: what is seen after an answer sees what is before it, as the answer does."""
    row = [0 | STARTS, 4 | UNSCORED, 5 | UNSCORED, 6, 7, 8 | UNSCORED, 9 | UNSCORED, 3, 0]
    batch = Seq2Seq([]).batch({"tokens": tf.constant([row])})
    assert batch.attention.in_prefix.numpy().tolist() == [[True] * 3 + [False] * 5]
    assert batch.targets.numpy().tolist() == [[-1, -1, 6, 7, -1, -1, 3, 0]]


def test_examples_of_a_split(tmp_path: Path) -> None:
    """Whole, whatever rows make of them; of a conversation the first answer."""
    ids = [0, 4 | UNSCORED, 5 | UNSCORED, 6, 7, 0, 8 | UNSCORED, 9, 0, 3, 2 | UNSCORED, 5, 0]
    np.save(tmp_path / "starts.npy", np.array([1, 6, 9], dtype=np.int64))
    (tmp_path / "names.jsonl").write_text('"0"\n"1"\n"2"\n')
    index = (tmp_path / "starts.npy", tmp_path / "names.jsonl")
    split = Split([np.array(ids, np.uint32)], 3, 9, index, has_flags=True)
    found = [tuple(part.tolist() for part in example_of(split, number)) for number in range(3)]
    assert found == [([0, 4, 5], [6, 7]), ([0, 8], [9]), ([0], [3])]
    assert text_scores.squad_normalised("  An  apple, the A-team's ") == "apple ateams"
