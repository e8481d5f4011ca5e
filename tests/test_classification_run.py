"""A short run of the recipe `classification` in this process: what it counts, shows and cuts, and `tfdp.predict` after.

Long texts begin with the word that tells their class: it stays with `cut_input`, and goes with `cut_start`.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from commands import tfdp

from tfdp.config.sections import DataConfig, ModelConfig, OptimizerConfig, TrainingConfig
from trainers import classification

CONTEXT = 48


def write(path: Path) -> None:
    generator = np.random.default_rng(0)
    with path.open("w") as file:
        for number in range(240):
            text = " ".join([("fine", "poor")[number % 2], *generator.choice(["the", "a", "was", "it"], 20)])
            file.write(json.dumps({"text": text, "mood": ("good", "bad")[number % 2]}) + "\n")


def config_of(folder: Path, too_long: str) -> classification.Config:
    return classification.Config(
        run_dir=str(folder / too_long),
        labels=("good", "bad"),
        head="linear",
        model=ModelConfig(num_layers=1, num_heads=2, model_dim=32, context_length=CONTEXT),
        data=DataConfig(
            source=f"jsonl:{folder / 'texts.jsonl'}",
            input_field="text",
            label_field="mood",
            validation_fraction=0.2,
            sequences="whole",
            document_attention=True,
            too_long=too_long,  # type: ignore[arg-type]
        ),
        optimizer=OptimizerConfig(warmup_steps=2),
        training=TrainingConfig(
            steps=24, global_batch_size=16, log_every=8, evaluate_every=0, sample_tokens=0, jit_compile=False
        ),
    )


def test_the_beginning_of_a_text_tells_its_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "texts.jsonl")
    config = config_of(tmp_path, "cut_input")
    summary = classification.train(config)
    told = capsys.readouterr().out
    assert "cut before what is learned (data.too_long cut_input)" in told
    assert "sequences/s | mfu" in told and "tok/s" not in told  # one target a row
    assert summary["validation_macro_f1"] == 1.0
    rows = [json.loads(line) for line in (tmp_path / "cut_input" / "metrics.jsonl").read_text().splitlines()]
    for row in [*(row for row in rows if "loss" in row), summary]:
        assert row["sequences_per_second"] == pytest.approx(row["tokens_per_second"])  # one target a row
    assert ("confusion", 24) in pictures_in(tmp_path / "cut_input" / "tensorboard" / "validation")

    arguments = ["--run_dir=cut_input", "--input=texts.jsonl", "--output=found.jsonl"]
    code, _, error = tfdp(tmp_path, "predict", *arguments)
    assert code == 0, error
    found = [json.loads(line)["label"] for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    assert found == ["good", "bad"] * 120

    other = classification.train(config_of(tmp_path, "cut_start"))  # what tells the class is gone
    assert other["validation_macro_f1"] < 0.9


def pictures_in(folder: Path) -> set[tuple[str, int]]:
    """Names and steps of the pictures in TensorBoard's files."""
    events = [
        tf.compat.v1.Event.FromString(record.numpy())
        for path in folder.glob("events*")
        for record in tf.data.TFRecordDataset(str(path))
    ]
    values = [(value, event.step) for event in events for value in event.summary.value]
    return {(value.tag, step) for value, step in values if value.metadata.plugin_data.plugin_name == "images"}
