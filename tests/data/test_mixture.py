"""Mixtures: exact shares, one order for every layout, and losses of each source."""

import json
import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from workers import start, tiny_arguments

from tfdp.config import source_syntax
from tfdp.config.sections import DataConfig, DistributionConfig
from tfdp.data import mixture, pipeline
from tfdp.data.sequences import PackedSequences
from tfdp.data.shards import Split
from tfdp.parallel.distribution import make_strategy
from tfdp.system.exits import ConfigError
from trainers import causal_lm
from trainers.causal_lm import Config

CONTEXT = 4
SIZES = (301, 97, 53)  # sequences of each source


def make_order(*weights: str, partition: str = "shuffled") -> pipeline.Order:
    """Sources whose tokens tell them apart: source k has the ids k * 10,000 and up."""
    sequences = []
    for source, size in zip(range(len(weights)), SIZES, strict=False):
        ids = np.arange(source * 10_000, source * 10_000 + size * CONTEXT + 1, dtype=np.uint16)
        sequences.append(PackedSequences(Split([ids], 1, len(ids)), CONTEXT))
    return pipeline.Order(sequences, [Fraction(weight) for weight in weights], partition, 3, 12)  # type: ignore[arg-type]


def locate(node: mixture.Fork | mixture.Leaf, position: int) -> tuple[int, int]:
    """(source, number of the position among those of its source)."""
    while isinstance(node, mixture.Fork):
        before = mixture.count_left(node, position)
        goes_left = mixture.count_left(node, position + 1) > before
        node, position = (node.left, before) if goes_left else (node.right, position - before)
    return node.source, position


def located(order: pipeline.Order, start: int, count: int) -> np.ndarray:
    """(source, sequence) at each of `count` positions."""
    positions = tf.data.Dataset.range(start, start + count).map(order.locate)
    return np.array([(int(source), int(index)) for source, index in positions.as_numpy_iterator()])


# --- Names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("python-stdlib", [("python-stdlib", 1)]),
        ("text:a/*.txt", [("text:a/*.txt", 1)]),
        ("0.7 * text:a*.txt + 0.3 * tokens:b", [("text:a*.txt", Fraction(7, 10)), ("tokens:b", Fraction(3, 10))]),
        ("2 * a + 1 * b + .5 * c", [("a", Fraction(4, 7)), ("b", Fraction(2, 7)), ("c", Fraction(1, 7))]),
        ("text:a + b.txt", [("text:a + b.txt", 1)]),
    ],
)
def test_sources_and_weights_are_read(source: str, expected: list[tuple[str, Fraction]]) -> None:
    assert source_syntax.parse(source) == expected


@pytest.mark.parametrize("source", ["a + 0.3 * b", "0 * a + 1 * b", "0.5 * a + 0.5 * a", "1.00000000001 * a + 1 * b"])
def test_a_mixture_that_cannot_be_is_refused(source: str) -> None:
    with pytest.raises(ConfigError, match=r"^data.source \("):
        DataConfig(source=source)


@pytest.mark.parametrize("weight", ["9" * 400, "0." + "3" * 400, "9" * 5000, "0." + "3" * 5000])
def test_a_weight_of_hundreds_of_digits_is_one_short_line(weight: str) -> None:
    with pytest.raises(ConfigError, match=r"^data.source \(.*\) must have weights with fewer digits") as caught:
        source_syntax.parse(f"{weight} * text:a + 1 * text:b")
    assert len(str(caught.value)) < 300


# --- The order -------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", ["7/10", "1/2", "1/3", "999/1000", "123457/1000000"])
def test_every_stretch_of_a_thousand_has_its_share_to_one(weight: str) -> None:
    fork = mixture.tree([Fraction(weight), 1 - Fraction(weight)])
    sources = np.array([locate(fork, position)[0] for position in range(20_000)])
    counts = np.convolve(sources == 0, np.ones(1000, int), mode="valid")
    assert counts.min() >= math.floor(1000 * Fraction(weight))
    assert counts.max() <= math.ceil(1000 * Fraction(weight))


def test_three_sources_are_exact_to_one_a_level() -> None:
    weights = [Fraction(5, 10), Fraction(3, 10), Fraction(2, 10)]
    sources = np.array([locate(mixture.tree(weights), position)[0] for position in range(10_000)])
    for source, weight in enumerate(weights):
        counts = np.convolve(sources == source, np.ones(1000, int), mode="valid")
        assert np.abs(counts - 1000 * weight).max() <= 2
    assert mixture.counts(mixture.tree(weights), 10_000) == np.bincount(sources).tolist()


@pytest.mark.parametrize("start", [0, 12_345, 1 << 40])
@pytest.mark.parametrize("weights", [("7/10", "3/10"), ("1/2", "1/3", "1/6")])
def test_tensorflow_locates_as_python_does(weights: tuple[str, ...], start: int) -> None:
    order = make_order(*weights, partition="row")
    tree = mixture.tree(order.weights)
    for (source, index), position in zip(located(order, start, 200), range(start, start + 200), strict=True):
        expected, number = locate(tree, position)
        assert (source, index) == (expected, number % SIZES[expected])


def test_each_source_is_shuffled_by_itself_and_none_of_it_comes_twice_an_epoch() -> None:
    found = located(make_order("7/10", "3/10"), 0, 1000)
    for source in (0, 1):
        indices = found[found[:, 0] == source, 1]
        size = SIZES[source]
        for epoch in range(len(indices) // size):
            assert sorted(indices[epoch * size : (epoch + 1) * size].tolist()) == list(range(size))
    same = min(SIZES[:2])
    alone = [located(make_order("1"), 0, same)[:, 1], found[found[:, 0] == 1, 1][:same]]
    assert (alone[0] % same == alone[1]).mean() < 0.2, "sources have orders of their own"


@pytest.mark.parametrize("num_replicas", [1, 2, 4])
def test_the_batches_do_not_know_how_many_replicas_there_are(num_replicas: int) -> None:
    order = make_order("7/10", "3/10")
    strategy = make_strategy(DistributionConfig(num_replicas=num_replicas))
    expected = located(order, 24, 36)
    batches = iter(pipeline.train_batches(strategy, order, start_step=2))  # as a run that is resumed at step 2
    for step in range(3):
        batch = next(batches)
        parts = {key: strategy.experimental_local_results(value) for key, value in batch.items()}
        sources = np.concatenate([part.numpy() for part in parts["source"]])
        tokens = np.concatenate([part.numpy() for part in parts["tokens"]])
        here = expected[step * 12 : step * 12 + 12]
        assert sources.tolist() == here[:, 0].tolist()
        assert tokens[:, 0].tolist() == (here[:, 0] * 10_000 + here[:, 1] * CONTEXT).tolist()


@pytest.mark.parametrize("num_replicas", [1, 2])
def test_validation_holds_every_sequence_of_every_source_once(num_replicas: int) -> None:
    order = make_order("7/10", "3/10")
    strategy = make_strategy(DistributionConfig(num_replicas=num_replicas))
    batches, num_batches = pipeline.validation_batches(strategy, order.sequences, 12)
    tokens = []
    for _, batch in zip(range(num_batches), batches, strict=False):
        tokens += [part.numpy() for part in strategy.experimental_local_results(batch["tokens"])]
    targets = np.concatenate(tokens)[:, 1:]
    expected = [np.arange(k * 10_000 + 1, k * 10_000 + SIZES[k] * CONTEXT + 1) for k in (0, 1)]
    assert targets[targets >= 0].tolist() == np.concatenate(expected).tolist()


# --- Partitions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_sequences", [12, 13, 23, 100, 301])
def test_blocks_are_contiguous_and_hold_each_sequence_once_an_epoch(num_sequences: int) -> None:
    num_rows = 12
    for epoch in range(4):
        positions = np.arange(epoch * num_sequences, (epoch + 1) * num_sequences)
        found = np.array([int(pipeline.block_index(int(position), num_sequences, num_rows)) for position in positions])
        assert sorted(found.tolist()) == list(range(num_sequences))
        starts = []
        for row in range(num_rows):
            own = found[positions % num_rows == row]
            assert own.tolist() == list(range(own[0], own[0] + len(own))) if len(own) else True
            starts += own[:1].tolist()
        assert starts == sorted(starts), "the blocks come in the order of the rows"
        for num_replicas in (2, 3, 4):  # the rows of a replica are consecutive, and so are their blocks
            share = num_rows // num_replicas
            for replica in range(num_replicas):
                own = np.sort(found[positions % num_rows // share == replica])
                assert own.tolist() == list(range(own[0], own[-1] + 1))


def test_rows_are_dealt_in_turn() -> None:
    assert located(make_order("1", partition="row"), 0, 700)[:, 1].tolist() == [p % 301 for p in range(700)]


def test_blocks_of_several_sources_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"data.partition \(block\) must be shuffled or row with 2 sources"):
        DataConfig(source="1 * a + 1 * b", partition="block")


# --- A run -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("other")
    for index in range(6):
        (folder / f"{index}.txt").write_text("0123456789 " * 300)
    return folder


def rows_of(run_dir: str | Path | None) -> list[dict[str, float]]:
    return [json.loads(line) for line in (Path(str(run_dir)) / "metrics.jsonl").read_text().splitlines()]


def test_the_metrics_tell_losses_and_tokens_of_each_source(
    tiny_config: Callable[..., Config], corpus_dir: Path, other_dir: Path
) -> None:
    names = (f"text:{corpus_dir}/*.txt", f"text:{other_dir}/*.txt")
    source = f"0.75 * {names[0]} + 0.25 * {names[1]}"
    config = tiny_config("mixed", data={"source": source}, training={"steps": 20, "log_every": 4})
    summary = causal_lm.train(config)
    rows = rows_of(config.run_dir)
    trained = [row for row in rows if "loss" in row]
    assert len(trained) == 5
    for row in trained:
        assert row[f"num_tokens/{names[0]}"] == pytest.approx(3 * row[f"num_tokens/{names[1]}"], rel=0.2)
        assert 0 < row[f"loss/{names[1]}"] < 7
    assert trained[-1][f"loss/{names[1]}"] < trained[-1][f"loss/{names[0]}"], "digits in order are easier"
    (found,) = [row for row in rows if "validation_loss" in row]
    shares = {name: found[f"validation_loss/{name}"] for name in names}
    assert min(shares.values()) < found["validation_loss"] < max(shares.values())
    assert summary["validation_loss"] == found["validation_loss"]


@pytest.mark.multiworker
def test_two_workers_read_one_mixture(
    tiny_config: Callable[..., Config], tmp_path: Path, corpus_dir: Path, other_dir: Path
) -> None:
    source = f"0.7 * text:{corpus_dir}/*.txt + 0.3 * text:{other_dir}/*.txt"
    arguments = tiny_arguments(corpus_dir, tmp_path / "two", data__source=source, training__steps=20)
    with start(tmp_path, [arguments] * 2) as job:
        assert job.wait() == [0, 0], job.output(0)
    one = tiny_arguments(corpus_dir, tmp_path / "one", data__source=source, training__steps=20)
    with start(tmp_path, [one]) as job:
        assert job.wait() == [0], job.output(0)
    for mine, theirs in zip(rows_of(tmp_path / "one"), rows_of(tmp_path / "two"), strict=True):
        for key, value in mine.items():
            if key.startswith("num_tokens"):
                assert theirs[key] == value
            elif "loss" in key:
                assert theirs[key] == pytest.approx(value, rel=1e-5)
