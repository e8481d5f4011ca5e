"""The plan: its keys, and that its bytes are those of the run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SMALL = ["--model.num_heads=2", "--model.context_length=16"]
TINY = [*SMALL, "--model.num_layers=1", "--model.model_dim=32"]


def run(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_bytes_of_a_plan_are_those_of_the_run(tmp_path: Path, corpus_dir: Path) -> None:
    common = [*TINY, f"--data.source=text:{corpus_dir}/*.txt", "--training.steps=2", "--training.sample_tokens=0"]
    run_dir, output = tmp_path / "run", tmp_path / "plan.json"
    found = run("tfdp.plan", *common, "--num_replicas=2", "--rounds=1", f"--output={output}")
    assert found.returncode == 0, found.stderr
    plan = json.loads(output.read_text())
    trained = run("tfdp.train", *common, "--distribution.num_replicas=2", f"--run_dir={run_dir}")
    assert trained.returncode == 0, trained.stderr
    summary = json.loads((run_dir / "summary.json").read_text())
    row = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[0])
    assert plan["num_params"] == summary["num_params"]
    assert plan["num_replicas"] == summary["num_replicas"] == 2
    assert plan["reduction_bytes"] == pytest.approx(row["reduction_bytes"], rel=0.05)
    (checkpoint,) = (run_dir / "checkpoints").iterdir()
    size = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    assert 0 <= size - plan["checkpoint_bytes"] < 20_000  # the headers, which name the tensors
    assert plan["step_seconds"] > 0
    assert plan["peak_memory_bytes"] > 100e6
    assert "measured here" in found.stdout


def test_a_gpu_that_is_not_here_is_reckoned_from_its_data_sheet(tmp_path: Path) -> None:
    output = tmp_path / "plan.json"
    small = ["--device=H100", "--num_workers=2", f"--output={output}", *SMALL, "--training.precision=bfloat16"]
    assert run("tfdp.plan", *small, *TINY[2:]).returncode == 0
    few = json.loads(output.read_text())
    assert run("tfdp.plan", *small, "--model.model_dim=8192", "--model.num_layers=48").returncode == 0
    more = json.loads(output.read_text())
    assert run("tfdp.plan", *small, *TINY[2:], "--training.ema_decay=0.99").returncode == 0
    averaged = json.loads(output.read_text())
    assert (few["average_bytes"], averaged["average_bytes"]) == (0, 4 * few["num_params"])
    for key in ("checkpoint_bytes", "peak_memory_bytes"):
        assert averaged[key] - few[key] == averaged["average_bytes"]
    assert few["reduction_bytes"] == 4 * few["num_params"]
    assert few["peak_memory_bytes"] < few["memory_bytes"] == 80e9 < more["peak_memory_bytes"]
    assert few["step_seconds"] < more["step_seconds"]


@pytest.mark.parametrize("trainer", ["seq2seq", pytest.param("classification", marks=pytest.mark.full)])
def test_recipes_of_examples_are_planned_without_any(trainer: str) -> None:
    small = [*TINY, "--training.global_batch_size=4", "--rounds=1"]
    own = ["--decoding.max_tokens=8"] if trainer == "seq2seq" else ["--labels=[a, b]", "--head=linear"]
    found = run("tfdp.plan", f"--trainer={trainer}", *small, *own)
    assert found.returncode == 0 and "measured here" in found.stdout, found.stderr


def test_micro_batches_at_the_same_time_hold_their_activations_at_the_same_time(tmp_path: Path) -> None:
    found = {}
    for parallel, size in ((1, 2), (2, 2), (1, 4)):
        output = tmp_path / f"{parallel}x{size}.json"
        cut = [f"--training.parallel_microbatches={parallel}", f"--training.microbatch_size={size}"]
        arguments = ["--device=H100", f"--output={output}", *TINY, "--training.global_batch_size=8", *cut]
        assert run("tfdp.plan", *arguments).returncode == 0
        found[parallel, size] = json.loads(output.read_text())["activation_bytes"]
    assert found[2, 2] == found[1, 4] > found[1, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device=H1000"], "device (H1000) must be one of B200"),
        (["--num_workers=0"], "num_workers (0) must be at least 1"),
        (["--num_replicas=3"], "training.global_batch_size (16) must be a multiple of the 3 replicas: try 18"),
        (["--model.num_layer=3"], "unknown key model.num_layer on the command line: did you mean model.num_layers?"),
        (["--data.tokenizer=bpe:/nowhere"], "/nowhere"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str) -> None:
    found = run("tfdp.plan", *arguments)
    assert found.returncode == 2
    assert message in found.stderr
    assert len(found.stderr.splitlines()) == 1


def test_help_shows_the_keys_of_the_plan() -> None:
    found = run("tfdp.plan", "--help")
    assert found.returncode == 0
    assert "--network_gbits" in found.stdout
