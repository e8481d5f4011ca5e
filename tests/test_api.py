"""tfdp from Python, as a newcomer's notebook uses it, and the commands that read prompts from files."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import tfdp
from tfdp.inference.language_model import LanguageModel
from tfdp.system.exits import ConfigError

SIZE = {"num_layers": 1, "num_heads": 2, "model_dim": 16, "context_length": 16}

pytestmark = pytest.mark.timeout(200)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, corpus_dir: Path) -> Path:
    run_dir = tmp_path_factory.mktemp("api") / "run"
    summary = tfdp.train(
        {"run_dir": str(run_dir), "data": {"source": f"text:{corpus_dir}/*.txt", "validation_fraction": 0.2}},
        model=SIZE,
        training={"steps": 20, "global_batch_size": 8, "sample_tokens": 0, "jit_compile": False},
    )
    assert summary["step"] == 20 and summary["validation_loss"] < math.log(256)
    return run_dir


@pytest.fixture(scope="module")
def model(run: Path) -> LanguageModel:
    return tfdp.load(str(run))


def test_a_finished_run_is_not_trained_again_and_a_longer_one_is_resumed(run: Path) -> None:
    assert tfdp.train(run_dir=str(run))["step"] == 20
    with pytest.raises(ConfigError, match=r"^training\.steps \(none\) must be a whole number"):
        tfdp.train(run_dir=str(run), training={"steps": "none"})
    with pytest.raises(ConfigError, match=r"unknown key model\.layers"):
        tfdp.train(model={"layers": 2})


def test_logits_and_scores_agree(model: LanguageModel) -> None:
    ids = model.tokenizer.encode("alpha beta ga").tolist()
    start = model.tokenizer.end_of_text
    logits = model.logits([start, *ids])
    assert logits.shape == (14, 256)
    np.testing.assert_allclose(model.logits([[start, *ids], [start, *ids]])[1], logits, atol=1e-6)
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    expected = sum(log_probabilities[place, token] for place, token in enumerate(ids))
    short, long, greedy = model.score(["alpha beta ga", "alpha beta gamma delta " * 5, ""])
    assert short.log_likelihood == pytest.approx(expected, rel=1e-5)
    assert (short.num_tokens, long.num_tokens) == (13, 23 * 5)
    assert greedy == (0.0, 0, True)
    likeliest = int(logits[5].argmax())
    assert model.likelihoods([([start, *ids[:5]], [likeliest])])[0].is_greedy
    with pytest.raises(ConfigError, match=r"^ids \(\[17\]\) must be of shape"):
        model.logits(np.zeros(17, int))
    with pytest.raises(ConfigError, match=r"^ids \(256\) must hold ids from 0 to 255"):
        model.logits([256])


def test_text_comes_whole_in_pieces_and_as_a_batch(model: LanguageModel) -> None:
    text = model.generate("alpha", num_tokens=30, temperature=0)
    assert "".join(model.stream("alpha", num_tokens=30, temperature=0)) == text
    assert model.generate(["alpha", "b"], num_tokens=30, temperature=0)[0] == text
    stop = text[3:5]
    assert model.generate("alpha", num_tokens=30, temperature=0, stop=[stop]) == text[: text.index(stop)]
    assert model.generate([]) == []
    with pytest.raises(ConfigError, match=r"^temprature \(0\) must be one of num_tokens, temperature"):
        model.generate("alpha", temprature=0)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"num_tokens": 2.5}, r"^num_tokens \(2\.5\) must be a whole number"),
        ({"stop": "et"}, r"^stop \(et\) must be a list of texts"),
        ({"temperature": None}, r"^temperature \(null\) must be a number"),
    ],
)
def test_a_value_of_another_type_is_one_line(model: LanguageModel, keys: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        model.generate("a", **keys)


def test_ids_that_are_none_are_refused(model: LanguageModel, tmp_path: Path) -> None:
    for ids in ([1.5, 2.0], [[1, 2], [3]]):
        with pytest.raises(ConfigError, match=r"^ids "):
            model.logits(ids)
    with pytest.raises(ConfigError, match=r"^context \(\[\]\) must hold one token"):
        model.likelihoods([([], [1, 2])])
    with pytest.raises(ConfigError, match=r"^form \(onnx\) must be one of format, output"):
        model.export(str(tmp_path / "out"), form="onnx")


def test_an_export_is_the_same_model(model: LanguageModel, tmp_path: Path) -> None:
    model.export(str(tmp_path / "exported"))
    again = tfdp.load(str(tmp_path / "exported"))
    ids = list(range(97, 107))
    np.testing.assert_allclose(again.logits(ids), model.logits(ids), atol=1e-5)
    with pytest.raises(ConfigError, match="must not exist, or be an empty folder"):
        model.export(str(tmp_path / "exported"))


def test_a_keras_model_is_fitted_and_read_back(tmp_path: Path, corpus_dir: Path) -> None:
    import keras

    ids = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(256, 8)(ids)
    own = keras.Model(ids, keras.layers.Dense(256)(x))
    before = own.get_weights()
    keys = {"data": {"source": f"text:{corpus_dir}/*.txt", "validation_fraction": 0.2}}
    training = {"steps": 10, "global_batch_size": 8, "sample_tokens": 0, "log_every": 1}
    found = tfdp.fit(own, keys, run_dir=str(tmp_path / "own"), model={"context_length": 16}, training=training)
    rows = [json.loads(line) for line in (tmp_path / "own" / "metrics.jsonl").read_text().splitlines()]
    assert found["step"] == 10 and rows[-2]["loss"] < rows[0]["loss"]
    again = tfdp.load(str(tmp_path / "own"))
    (logits,) = again.logits([[5, 6, 7]])
    weights = [again._model.named_weights()[name].numpy() for name in again._model.named_weights()]
    assert not np.array_equal(weights[0], before[0])
    np.testing.assert_allclose(logits[1], weights[0][6] @ weights[1] + weights[2], atol=1e-5)
    other = keras.Model(ids, keras.layers.Dense(256)(keras.layers.Dense(9)(x)))
    with pytest.raises(ConfigError, match="must be the one that the run was begun with: name another run_dir"):
        tfdp.fit(other, keys, run_dir=str(tmp_path / "own"), model={"context_length": 16}, training=training)
    with pytest.raises(ConfigError, match=r"unknown key training\.step "):
        tfdp.fit(own, keys, run_dir=str(tmp_path / "mistaken"), training={"step": 3})
    assert not list(tmp_path.glob("*mistaken*"))
    with pytest.raises(ConfigError, match="must be a function of a module"):
        tfdp.fit(lambda vocab_size: own)


def test_prompts_of_a_file_are_continued_together(run: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("alpha\nbeta gamma\n\n")
    (tmp_path / "prompts.jsonl").write_text('"alpha"\n{"prompt": "beta\\ngamma"}\n')
    (tmp_path / "bad.jsonl").write_text('"alpha"\n{"text": "beta"}\n')

    def generate(*arguments: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "tfdp.generate", f"--run_dir={run}", "--num_tokens=8", "--temperature=0"]
        return subprocess.run([*line, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=150)

    for name, prompts in (("txt", ["alpha", "beta gamma", ""]), ("jsonl", ["alpha", "beta\ngamma"])):
        done = generate(f"--prompts_file=prompts.{name}", "--rows=2")
        assert done.returncode == 0, done.stderr
        rows = [json.loads(line) for line in done.stdout.splitlines()]
        assert [row["prompt"] for row in rows] == prompts
    alone = generate("--prompt=alpha")
    assert alone.stdout == f"alpha{rows[0]['text']}\n"
    refused = generate("--prompts_file=bad.jsonl")
    assert refused.returncode == 2 and "line 2" in refused.stderr and len(refused.stderr.splitlines()) == 1
