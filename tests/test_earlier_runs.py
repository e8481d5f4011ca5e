"""Runs that earlier versions began: `earlier/` holds what they wrote, by the version that is named there."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tfdp.assembly import train
from tfdp.config.parsing import load_file
from tfdp.inference.trained import TrainedModel
from tfdp.recipe import import_recipe
from tfdp.training.weights import digests_of, snapshot

RUNS = Path(__file__).parent / "earlier"


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """A copy of a run, in a folder of its own with the text that it reads."""
    shutil.copytree(RUNS / request.param, tmp_path / "earlier")
    monkeypatch.chdir(tmp_path / "earlier")
    return Path("run")


# flat_modules: 4 steps of the code before its modules were moved into folders, canonical, with two micro-batches.
EARLIER = pytest.mark.parametrize("run_dir", ["flat_modules"], indirect=True)


@EARLIER
def test_an_earlier_run_is_read_back(run_dir: Path) -> None:
    summary = json.loads((run_dir / "summary.json").read_text())
    trained = TrainedModel.open(str(run_dir), "best", "evaluated")
    assert (trained.step, trained.corpus_sha256) == (summary["step"], summary["corpus_sha256"])
    model = trained.make_model()
    assert digests_of(snapshot(model.named_weights()), {})["weights_sha256"] == summary["weights_sha256"]
    assert model.num_params() == summary["num_params"]


@EARLIER
def test_an_earlier_run_goes_on(run_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    recipe = import_recipe("causal_lm")
    config = replace(load_file(recipe.Config, run_dir / "config.yaml"), run_dir=str(run_dir))
    earlier = (run_dir / "metrics.jsonl").read_text()
    again = train(recipe, config)
    finished = json.loads((run_dir / "summary.json").read_text())
    assert again == {key: value for key, value in finished.items() if key != "crc32"}, "a finished run stays as it is"
    assert (run_dir / "metrics.jsonl").read_text() == earlier

    summary = train(recipe, replace(config, training=replace(config.training, steps=7)))
    assert f"resumed at step 4 from {run_dir}/checkpoints/step_00000004" in capfd.readouterr().out
    assert (summary["step"], summary["sequences_seen"]) == (7, 28)
    assert [entry["from_step"] for entry in summary["history"]] == [0, 4]
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6, 7]
    assert summary["validation_loss"] < again["validation_loss"], "it learns on"
