"""The recipe `classification`: one run in any layout, resumed, evaluated and used to predict."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from commands import assert_refused, losses, summary, tfdp, train_in_layouts, without_tensorflow

KEYS = ["--trainer=classification", "--data.source=jsonl:texts.jsonl", "--data.input_field=text"]
KEYS += ["--data.label_field=mood", "--data.validation_fraction=0.2", "--training.log_every=1"]
SIZE = ["--model.num_layers=2", "--model.num_heads=2", "--model.model_dim=32", "--model.context_length=64"]
LABELS = "--labels=[good, bad]"
SHORT = ["--training.steps=30", "--training.global_batch_size=8"]


def write(path: Path) -> None:
    """Texts that are good where they hold a certain word, one in four."""
    generator = np.random.default_rng(0)
    with path.open("w") as file:
        for number in range(400):
            mood = "good" if number % 4 == 0 else "bad"
            words = [*generator.choice(["the", "a", "was", "it"], 4), {"good": "fine", "bad": "poor"}[mood]]
            file.write(json.dumps({"text": " ".join(generator.permutation(words)), "mood": mood}) + "\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classification")
    write(folder / "texts.jsonl")
    return folder


@pytest.mark.slow
@pytest.mark.multiworker
@pytest.mark.timeout(900)
@pytest.mark.parametrize("head", [pytest.param("tokens", marks=pytest.mark.full), "linear"])
def test_a_run_is_one_run_in_any_layout_and_predicts(folder: Path, head: str) -> None:
    keys = [*KEYS, *SIZE, LABELS, f"--head={head}", "--class_weights=balanced"]
    keys += ["--distribution.reduction=canonical", "--training.microbatch_size=2"]
    for name in train_in_layouts(folder, head, [*keys, *SHORT]):
        for key in ("state_sha256", "validation_loss", "validation_macro_f1", "validation_recall/good"):
            assert summary(folder / name)[key] == summary(folder / f"{head}_one")[key]
    assert summary(folder / f"{head}_one")["validation_macro_f1"] > 0.9
    half = ["--training.steps=15", "--optimizer.schedule_steps=30", SHORT[1]]
    code, _, error = tfdp(folder, "train", *keys, *half, f"--run_dir={head}_half")
    assert code == 0, error
    code, _, error = tfdp(folder, "train", f"--run_dir={head}_half", "--training.steps=30")
    assert code == 0, error
    assert summary(folder / f"{head}_half")["state_sha256"] == summary(folder / f"{head}_one")["state_sha256"]

    code, out, error = tfdp(folder, "evaluate", f"--run_dir={head}_one", "--checkpoint=newest")
    assert code == 0, error
    assert json.loads(out)["validation_macro_f1"] == summary(folder / f"{head}_one")["validation_macro_f1"]
    predict = [f"--run_dir={head}_one", "--input=texts.jsonl", f"--output={head}.jsonl"]
    code, out, error = tfdp(folder, "predict", *predict)
    assert code == 0 and out == "", error
    found = [json.loads(line) for line in (folder / f"{head}.jsonl").read_text().splitlines()]
    code, _, error = tfdp(folder, "predict", *predict)
    assert code == 2 and f"output ({head}.jsonl) must not exist: name a new file, or remove it" in error
    moods = [json.loads(line)["mood"] for line in (folder / "texts.jsonl").read_text().splitlines()]
    assert [each["record"] for each in found] == list(range(1, 401))
    assert np.mean([each["label"] == mood for each, mood in zip(found, moods, strict=True)]) > 0.9
    assert all(abs(sum(each["probabilities"].values()) - 1) < 1e-5 for each in found)
    code, _, error = tfdp(folder, "train", f"--run_dir={head}_one", "--labels=[bad, good]", "--training.steps=40")
    assert code == 2 and "labels" in error, error


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.multiworker
@pytest.mark.timeout(900)
def test_every_layout_has_the_losses_of_one_replica(folder: Path) -> None:
    """At rates at which rounding does not grow; in canonical order there is none, as the test above shows."""
    keys = [*KEYS, *SIZE, *SHORT, LABELS, "--optimizer.learning_rate=0.003", "--optimizer.adam_learning_rate=0.003"]
    for name, command, own in (
        ("fast_1", "train", []),
        ("fast_2", "train", ["--distribution.num_replicas=2"]),
        ("fast_w", "launch", ["--num_workers=2", "--"]),
    ):
        code, _, error = tfdp(folder, command, *own, f"--run_dir={name}", *keys)
        assert code == 0, error
        np.testing.assert_allclose(losses(folder / name), losses(folder / "fast_1"), rtol=1e-5)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ([], r"labels \(\[\]\) must name two classes at least: try \[ham, spam\]"),
        (["--labels=[a, a]"], r"labels \(\['a', 'a'\]\) must not name a class twice"),
        (
            [LABELS, "--data.too_long=cut_end"],
            r"data\.too_long \(cut_end\) must be cut_input, cut_start, skip or refuse",
        ),
        ([LABELS, "--data.template={input} {label}."], r'data\.template \(.*\) must end with "{label}"'),
        ([LABELS, "--data.sequences=packed"], r"data\.sequences \(packed\) must be whole or documents"),
    ],
)
def test_a_mistake_is_one_line_before_tensorflow_loads(tmp_path: Path, keys: list[str], message: str) -> None:
    write(tmp_path / "texts.jsonl")
    assert_refused(without_tensorflow(tmp_path, "tfdp.train", "--run_dir=r", *KEYS, *keys), f".*{message}.*")
    assert not (tmp_path / "r").exists()


@pytest.mark.slow
def test_labels_that_no_class_has_are_named(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "texts.jsonl", tmp_path)
    with (tmp_path / "texts.jsonl").open("a") as file:
        file.write('{"text": "so", "mood": "fair"}\n')
    code, _, error = tfdp(tmp_path, "train", *KEYS, *SIZE, *SHORT, LABELS)
    assert code == 2 and "but not that of texts.jsonl:401" in error, error
    code, _, error = tfdp(tmp_path, "train", *KEYS, *SIZE, *SHORT, "--labels=[good, gone]")
    assert code == 2 and "must differ in their first tokens with head tokens" in error, error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], r"input \(null\) must name a file of records: try --input texts\.jsonl"),
        (["--input=a.txt"], r"input \(a\.txt\) must be a file whose name ends in \.jsonl, \.csv, \.tsv, \.parquet, or"),
        (["--input=a.jsonl", "--run_dir=none"], r"run_dir \(none\) must be the directory of a run"),
    ],
)
def test_predict_refuses_mistakes_in_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    assert_refused(without_tensorflow(tmp_path, "tfdp.predict", *arguments), f".*{message}.*")
