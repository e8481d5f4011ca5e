"""The recipe `seq2seq`: one run in any layout, resumed, evaluated, and used to write outputs."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from commands import assert_refused, losses, summary, tfdp, train_in_layouts, without_tensorflow

KEYS = ["--trainer=seq2seq", "--data.source=jsonl:words.jsonl", "--data.input_field=word"]
KEYS += ["--data.target_field=spelled", "--data.validation_fraction=0.2", "--training.log_every=1"]
SIZE = ["--model.num_layers=2", "--model.num_heads=2", "--model.model_dim=32", "--model.context_length=48"]
SIZE += ["--decoding.max_tokens=16", "--decoding.rows=16", "--decoding.num_examples=40"]
SHORT = ["--training.steps=30", "--training.global_batch_size=8"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Words of one or two letters many times over, and how they are spelled: a task of a few seconds."""
    folder = tmp_path_factory.mktemp("seq2seq")
    generator = np.random.default_rng(0)
    with (folder / "words.jsonl").open("w") as file:
        for number in range(400):
            word = "".join(generator.choice(list("abcd"), int(generator.integers(1, 4))))
            file.write(json.dumps({"id": number, "word": word, "spelled": " ".join(word).upper()}) + "\n")
    return folder


def outputs(folder: Path, run_dir: str, *keys: str) -> list[str]:
    code, out, error = tfdp(folder, "predict", f"--run_dir={run_dir}", "--input=words.jsonl", *keys)
    assert code == 0, error
    found = [json.loads(line) for line in out.splitlines()]
    assert [each["record"] for each in found] == list(range(1, 401))
    return [each["output"] for each in found]


@pytest.mark.slow
@pytest.mark.multiworker
@pytest.mark.timeout(900)
def test_a_run_is_one_run_in_any_layout_and_writes_outputs(folder: Path) -> None:
    keys = [*KEYS, *SIZE, "--metrics=[exact_match, wer, bleu]"]
    keys += ["--distribution.reduction=canonical", "--training.microbatch_size=2"]
    for name in train_in_layouts(folder, "layout", [*keys, "--training.steps=60", SHORT[1]]):
        for key in ("state_sha256", "validation_loss", "validation_exact_match", "validation_wer", "validation_bleu"):
            assert summary(folder / name)[key] == summary(folder / "layout_one")[key]
    found = summary(folder / "layout_one")
    assert found["validation_exact_match"] > 0.5 and "nrefs:1" in found["signature/bleu"]
    half = ["--training.steps=30", "--optimizer.schedule_steps=60", SHORT[1]]
    code, _, error = tfdp(folder, "train", *keys, *half, "--run_dir=half")
    assert code == 0, error
    code, _, error = tfdp(folder, "train", "--run_dir=half", "--training.steps=60")
    assert code == 0, error
    assert summary(folder / "half")["state_sha256"] == found["state_sha256"]

    code, out, error = tfdp(folder, "evaluate", "--run_dir=layout_one", "--checkpoint=newest")
    assert code == 0, error
    evaluated = json.loads(out)
    for name in ("loss", "exact_match", "wer", "bleu"):
        assert evaluated[f"validation_{name}"] == found[f"validation_{name}"]
    more = ["--num_examples=0", "--method=beam", "--beam_size=3", "--distribution.num_replicas=2"]
    code, out, error = tfdp(folder, "evaluate", "--run_dir=layout_one", "--metrics=[chrf, exact_match]", *more)
    assert code == 0 and json.loads(out)["validation_exact_match"] > 0.5, error
    assert json.loads(out)["validation_chrf"] > 50 and "validation_wer" not in json.loads(out)

    right = [json.loads(line)["spelled"] for line in (folder / "words.jsonl").read_text().splitlines()]
    for method in (["--rows=7"], ["--method=beam", "--beam_size=3"]):
        share = np.mean(
            [one == other for one, other in zip(outputs(folder, "layout_one", *method), right, strict=True)]
        )
        assert share > 0.5
    code, _, error = tfdp(folder, "export", "--run_dir=layout_one", "--output=exported")
    assert code == 2 and "format (huggingface) is for a model whose inputs see no later tokens" in error
    code, out, error = tfdp(folder, "replay", "--run_dir=layout_one", "--step=30")
    assert code == 0 and "words.jsonl:" in out, error
    code, _, error = tfdp(folder, "train", "--run_dir=layout_one", "--metrics=[wer]", "--training.steps=70")
    assert code == 2 and "metrics" in error, error


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.multiworker
@pytest.mark.timeout(900)
@pytest.mark.parametrize("attention", ["whole", "causal"])
def test_every_layout_has_the_losses_of_one_replica(folder: Path, attention: str) -> None:
    """At rates at which rounding does not grow; in canonical order there is none, as the test above shows."""
    keys = [*KEYS, *SIZE, *SHORT, f"--model.prompt_attention={attention}"]
    keys += ["--optimizer.learning_rate=0.003", "--optimizer.adam_learning_rate=0.003"]
    names = train_in_layouts(folder, f"fast_{attention}", keys)
    for name in names[1:]:
        np.testing.assert_allclose(losses(folder / name), losses(folder / names[0]), rtol=1e-5)


def test_a_run_of_the_defaults_in_one_process(folder: Path) -> None:
    """Short: the losses fall, a table of outputs is in TensorBoard, and a prompt is continued as it was learned."""
    code, _, error = tfdp(folder, "train", *KEYS, *SIZE, "--run_dir=quick", "--training.steps=4")
    assert code == 0, error
    assert losses(folder / "quick")[-1] < losses(folder / "quick")[0]
    assert {"validation_chrf", "validation_exact_match", "best_validation_chrf"} <= summary(folder / "quick").keys()
    events = b"".join(path.read_bytes() for path in (folder / "quick" / "tensorboard").rglob("events*"))
    assert b"| input | reference | output |" in events
    code, out, error = tfdp(folder, "generate", "--run_dir=quick", "--prompt=ab\n", "--num_tokens=2")
    assert code == 0 and out.startswith("ab"), error
    code, _, error = tfdp(folder, "evaluate", "--run_dir=quick", "--beam_size=8")
    assert code == 2 and "beam_size (8) needs --method beam, and it is greedy" in error, error
    (folder / "long.jsonl").write_text(json.dumps({"word": "a" * 99}) + "\n")
    code, out, error = tfdp(folder, "predict", "--run_dir=quick", "--input=long.jsonl")
    assert code == 0 and json.loads(out)["cut"] is True, error
    assert "note: 1 of 1 inputs were cut at their start: an output needs a part of the context" in error


def refused(folder: Path, message: str, *keys: str) -> None:
    assert_refused(without_tensorflow(folder, "tfdp.train", *KEYS, *SIZE, *keys), message)


def test_mistakes_are_one_line_before_tensorflow_is_loaded(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "words.jsonl", tmp_path / "words.jsonl")
    refused(tmp_path, r"metrics \(\['ter'\]\) must be a list of bleu, chrf, rouge1, .*", "--metrics=[ter]")
    refused(tmp_path, r"metrics \(.*\) must name each once", "--metrics=[wer, wer]")
    refused(tmp_path, r"data.too_long \(cut_end\) must be cut_input, cut_start, .*", "--data.too_long=cut_end")
    rule = r"decoding.max_tokens \(64\) must be below model.context_length \(48\), which holds the input too: try 24"
    assert_refused(without_tensorflow(tmp_path, "tfdp.train", *KEYS, "--model.context_length=48"), rule)
    rule = r"model.prompt_attention \(whole\) must be causal with model.sliding_window 8, .*"
    refused(tmp_path, rule, "--model.sliding_window=8")
    refused(tmp_path, r"decoding.top_p \(0.9\) needs decoding.method sampling, .*", "--decoding.top_p=0.9")
    refused(tmp_path, r"data.template \(.*\) must end with .*", "--data.template={target} <- {input}")
    rule = r"data.messages_field \(word\) must be null: seq2seq learns pairs; .*"
    own = [*KEYS[:2], "--data.messages_field=word"]
    assert_refused(without_tensorflow(tmp_path, "tfdp.train", *own), rule)
    refused(tmp_path, r"decoding.beam_size \(0\) must be at least 1", "--decoding.beam_size=0")
    rule = r"model.prompt_attention \(whole\) must be causal with trainer causal_lm: whole is for seq2seq"
    assert_refused(without_tensorflow(tmp_path, "tfdp.train", "--model.prompt_attention=whole"), rule)
    (tmp_path / "words.jsonl").write_text('{"word": "a", "spelled": "A"}\n{"word": "b", "spelled": " "}\n')
    refused(tmp_path, r"data.source: words.jsonl, line 2, field spelled must not be empty: it is what is learned")
    (tmp_path / "words.jsonl").write_text('{"word": "a", "spelled": "A"}\n{"word": "b"}\n')
    refused(tmp_path, r"data.source: words.jsonl, line 2.*spelled.*")
