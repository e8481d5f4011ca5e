"""Metrics that a task of one's own names: told, compared by, and wrong."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from tfdp.system.exits import ConfigError
from tfdp.tasks.causal_lm import CausalLM
from tfdp.tasks.task import Metric
from tfdp.training.checkpoint import CheckpointFolder
from trainers import causal_lm
from trainers.causal_lm import Config


class Hits(CausalLM):
    """Counts what falls with the loss, so that a run is best where it is lowest, or where the count is highest."""

    best: ClassVar[str] = "hits"
    best_is_lowest: ClassVar[bool] = False

    def metrics(self, totals: Mapping[str, float]) -> dict[str, Metric]:
        metrics = super().metrics(totals)
        hits = -round(1000 * metrics["loss"].value)
        return {"hits": Metric(hits, f"{hits} hits"), **metrics, "extra": Metric(np.float32(0.5), "extra")}


class Wrong(CausalLM):
    best: ClassVar[str] = "accuracy"


def learning(monkeypatch: pytest.MonkeyPatch, task: CausalLM) -> None:
    monkeypatch.setattr(causal_lm, "make_task", lambda _config, _corpus: task)


def with_steps(config: Config, steps: int) -> Config:
    return replace(config, training=replace(config.training, steps=steps))


def test_a_run_is_told_and_compared_by_the_metrics_of_its_task(
    tiny_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    learning(monkeypatch, Hits())
    config = tiny_config(training={"steps": 6, "evaluate_every": 2}, checkpoint={"keep": 1})
    summary = causal_lm.train(config)
    folder = CheckpointFolder(Path(str(config.run_dir), "checkpoints"))
    rows = [json.loads(line) for line in Path(str(config.run_dir), "metrics.jsonl").read_text().splitlines()]
    hits = {row["step"]: row["validation_hits"] for row in rows if "validation_hits" in row}
    assert list(hits) == [2, 4, 6]
    assert summary["best_validation_hits"] == max(hits.values()) and summary["validation_extra"] == 0.5
    assert hits[folder.best_step()] == max(hits.values())
    assert f"validation {round(hits[6])} hits | loss " in capfd.readouterr().out

    learning(monkeypatch, CausalLM())  # goes on by another metric: the best by the one before counts no more
    summary = causal_lm.train(with_steps(config, 8))
    assert summary["best_validation_loss"] == summary["validation_loss"]
    assert folder.best_step() == 8


def test_a_task_without_its_best_metric_is_one_line(
    tiny_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    learning(monkeypatch, Wrong())
    with pytest.raises(ConfigError) as refused:
        causal_lm.train(tiny_config())
    assert str(refused.value) == (
        "trainer (causal_lm) must have a task whose best (accuracy) is one of its metrics: loss, perplexity, "
        "bits_per_byte"
    )


def test_rows_without_a_target_have_no_loss() -> None:
    metrics = CausalLM().metrics({"loss": 0.0, "targets": 0, "bytes": 10})
    assert np.isnan(metrics["loss"].value) and metrics["bits_per_byte"].value == 0
