"""200 flipped bits in each kind of file of a run directory: found, refused, or without effect and why.

tensorboard/ is not among them: nothing reads it but TensorBoard. metrics.jsonl is in test_rows.py.
"""

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tfdp.config.parsing import load_file, to_yaml
from tfdp.config.run_config import differing_keys, with_run_config
from tfdp.data.tokenizers.tokenizer import open_tokenizer
from tfdp.inference.trained import TrainedModel, open_own_tokenizer, refuse_other_keys
from tfdp.system.exits import ConfigError
from tfdp.training.checkpoint import Checkpoint, CheckpointFolder, DamagedCheckpoint
from tfdp.training.run_directory import RunDirectory
from trainers import causal_lm
from trainers.causal_lm import Config

FLIPS = 200


def flipped(path: Path, count: int = FLIPS) -> Iterator[int]:
    """The number of each bit, while it is flipped in the file; the file is as it was afterwards."""
    whole, generator = path.read_bytes(), random.Random(path.name)
    for _ in range(count):
        data, bit = bytearray(whole), generator.randrange(8 * len(whole))
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        yield bit
    path.write_bytes(whole)


def is_same(found: Checkpoint | None, expected: Checkpoint) -> bool:
    assert found is not None
    pairs = ((found.weights, expected.weights), (found.optimizer, expected.optimizer))
    same = all(a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a) for a, b in pairs)
    return same and found.state == expected.state


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, corpus_dir: Path) -> RunDirectory:
    """A run of the default optimizer with two checkpoints and a BPE vocabulary."""
    from tfdp.config.sections import DataConfig, ModelConfig, TrainingConfig

    path = tmp_path_factory.mktemp("flips") / "run"
    config = Config(
        run_dir=str(path),
        model=ModelConfig(num_layers=1, num_heads=2, model_dim=16, context_length=16),
        data=DataConfig(f"text:{corpus_dir}/*.txt", validation_fraction=0.2, tokenizer="bpe:300"),
        training=TrainingConfig(
            steps=4, global_batch_size=4, log_every=1, evaluate_every=2, sample_tokens=0, jit_compile=False
        ),
    )
    causal_lm.train(config)
    return RunDirectory(path)


# --- Checkpoints -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "state.json", "SHA256SUMS"])
def test_each_flipped_bit_of_a_checkpoint_is_found_and_the_one_before_is_taken(run: RunDirectory, name: str) -> None:
    folder = run.checkpoints()
    first, last = folder.steps()
    before, whole = folder.load(first), folder.state(last)
    for bit in flipped(folder.path(last) / name):
        found, warnings = folder.load_newest()
        assert is_same(found, before), bit
        (warning,) = warnings
        assert str(folder.path(last)) in warning and "falling back" in warning and "\n" not in warning, bit
        folder.path(last).with_suffix(".damaged").rename(folder.path(last))
        states, damaged = folder.states()  # who looks at the facts alone is told of it, or gets those that were saved
        assert len(states) + len(damaged) == 2 and states.get(last, whole) == whole, bit
        assert damaged or name != "state.json", bit


def old_checkpoints(run: RunDirectory, folder: Path) -> CheckpointFolder:
    """Those of a run as versions before SHA256SUMS wrote them."""
    import json

    shutil.copytree(run.path / "checkpoints", folder)
    for path in folder.iterdir():
        (path / "SHA256SUMS").unlink()
        state = json.loads((path / "state.json").read_text())
        for key in ("format", "history", "config"):
            del state[key]
        (path / "state.json").write_text(json.dumps(state, indent=1))
    return CheckpointFolder(folder)


def test_a_checkpoint_of_before_there_were_sums_is_read_with_its_own_checks(run: RunDirectory, tmp_path: Path) -> None:
    folder = old_checkpoints(run, tmp_path / "checkpoints")
    first, last = folder.steps()
    found, warnings = folder.load_newest()
    assert found is not None and (found.step, warnings) == (last, [])
    assert folder.best_step() == run.checkpoints().best_step()
    for _ in flipped(folder.path(last) / "state.json"):
        found, warnings = folder.load_newest()  # an older one, or this one: never an error that is no line
        assert found is not None and found.step == (first if warnings else last)
        if warnings:
            folder.path(last).with_suffix(".damaged").rename(folder.path(last))


@pytest.mark.parametrize(
    "content",
    [
        '{"step": 2, "files": {"": "0"}}',
        '{"step": 2, "files": []}',
        '{"step": 2, "files": {"../../etc/passwd": "0"}}',
        '{"step": 50, "files": {}}',
        '{"files": {}}',
        "[" * 100_000,
        "[]",
        "null",
        "\xff",
        "",
    ],
)
def test_whatever_is_wrong_inside_falls_back_to_the_checkpoint_before(
    run: RunDirectory, tmp_path: Path, content: str
) -> None:
    folder = old_checkpoints(run, tmp_path / "checkpoints")
    first, last = folder.steps()
    (folder.path(last) / "state.json").write_bytes(content.encode("latin1"))
    found, warnings = folder.load_newest()
    assert found is not None and (found.step, len(warnings)) == (first, 1)


@pytest.mark.parametrize("name", ["weights.safetensors", "state.json", "SHA256SUMS", ""])
def test_a_checkpoint_whose_file_is_missing_or_a_folder_is_damaged(
    run: RunDirectory, tmp_path: Path, name: str
) -> None:
    shutil.copytree(run.path / "checkpoints", tmp_path / "checkpoints")
    folder = CheckpointFolder(tmp_path / "checkpoints")
    first, last = folder.steps()
    for make in (Path.mkdir, Path.touch):
        path = folder.path(last) / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        if name:
            with pytest.raises(DamagedCheckpoint):
                folder.load(last)
        make(path)
        with pytest.raises(DamagedCheckpoint):
            folder.load(last)
    assert folder.load_newest()[0].step == first  # type: ignore[union-attr]


def test_a_checkpoint_under_the_name_of_another_step_is_damaged(run: RunDirectory, tmp_path: Path) -> None:
    for make in (lambda path: shutil.copytree(run.path / "checkpoints", path), lambda path: old_checkpoints(run, path)):
        shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
        make(tmp_path / "checkpoints")
        folder = CheckpointFolder(tmp_path / "checkpoints")
        first, last = folder.steps()
        folder.path(last).rename(folder.path(last + 16))
        found, warnings = folder.load_newest()
        assert found is not None and found.step == first
        assert f"it says that it is of step {last}" in warnings[0]


# --- What evaluate, generate and replay read besides -----------------------------------------------


@pytest.mark.parametrize("count", [20, pytest.param(FLIPS, marks=pytest.mark.slow)])
def test_each_flipped_bit_of_the_configuration_is_refused_or_told(
    run: RunDirectory, capsys: pytest.CaptureFixture[str], count: int
) -> None:
    state = list(run.checkpoints().states()[0].values())[-1]
    config = load_file(Config, run.config_path)
    counts = dict.fromkeys(("refused", "told", "the same"), 0)
    for bit in flipped(run.config_path, count):
        capsys.readouterr()
        try:
            found = load_file(Config, run.config_path)
            assert with_run_config(["--run_dir", str(run.path)])
            refuse_other_keys(run, found, state)
        except ConfigError as error:
            assert "\n" not in str(error), bit
            counts["refused"] += 1
            continue
        if found == config:  # white space, or another way to write a value
            counts["the same"] += 1
            continue
        assert capsys.readouterr().err.startswith(f"warning: {run.config_path} is not that of the newest"), bit
        assert differing_keys(state["config"], to_yaml(found)), bit  # which a resume tells, and keeps in the history
        counts["told"] += 1
    assert counts["refused"] > count / 2 and counts["the same"] < count / 10, counts


def test_another_model_in_the_configuration_is_refused(run: RunDirectory) -> None:
    text = run.config_path.read_text()
    run.config_path.write_text(text.replace("norm_epsilon: 1.0e-05", "norm_epsilon: 1.0e-04"))
    assert run.config_path.read_text() != text
    expected = r"holds a config\.yaml that is not the run's: model\.norm_epsilon: 1e-05 -> 0\.0001$"
    try:
        with pytest.raises(ConfigError, match=expected):
            TrainedModel.open(str(run.path), "newest", "read back")
    finally:
        run.config_path.write_text(text)


@pytest.mark.parametrize("name", ["vocabulary.json", "merges.txt", "tokenizer.tfdp.json"])
def test_each_flipped_bit_of_the_tokenizer_is_refused_or_gives_the_same_ids(run: RunDirectory, name: str) -> None:
    whole, state = open_tokenizer(run.tokenizer_path), run.checkpoints().state(run.checkpoints().steps()[-1])
    refused = 0
    for bit in flipped(run.tokenizer_path / name):
        try:
            found = open_own_tokenizer(run, state)
        except ConfigError as error:
            assert "\n" not in str(error), bit
            refused += 1
            continue
        assert found.fingerprint == whole.fingerprint, bit  # which holds all ids, merges and the pattern
        assert found.token_bytes == whole.token_bytes, bit
    assert refused > 100


def test_each_flipped_bit_of_the_summary_is_found(run: RunDirectory) -> None:
    """Nothing but a finished run that is named again reads it, which then makes it anew from the checkpoint."""
    whole = run.read_summary()
    num_found = 0
    for bit in flipped(run.summary_path):
        found = run.read_summary()
        num_found += found == {}
        # the name of the checksum was hit, and nothing else
        assert found == {} or {key: found[key] for key in whole} == whole, bit
    assert num_found > 180


def test_a_damaged_checkpoint_is_told_of_where_the_best_is_chosen(
    run: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(run.path, tmp_path / "run")
    folder = RunDirectory(tmp_path / "run").checkpoints()
    first, last = folder.steps()
    assert folder.best_step() == last
    (folder.path(last) / "state.json").write_text("{}")
    assert TrainedModel.open(str(tmp_path / "run"), "best", "read back").step == first
    assert f"warning: checkpoint {folder.path(last)}/state.json is damaged" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="is damaged"):
        TrainedModel.open(str(tmp_path / "run"), "newest", "read back")
