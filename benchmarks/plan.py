"""`tfdp.plan` beside the runs that it plans, for three sizes: `python benchmarks/plan.py [NAME ...]`.

Each size is planned, then trained for a while as tfdp.train does, with a checkpoint and an evaluation. The last columns
are planned / measured.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

SIZES = {
    "default": "",
    "baby": "--model.num_layers=6 --model.num_heads=6 --model.model_dim=384 --model.context_length=256 "
    "--training.global_batch_size=8 --training.precision=bfloat16 --optimizer.name=adamw",
    "gpt2": "--model.num_layers=12 --model.num_heads=12 --model.model_dim=768 --model.context_length=256 "
    "--training.global_batch_size=2 --training.precision=bfloat16 --optimizer.name=adamw "
    "--data.tokenizer=bpe:8192 --model.tie_embeddings=true",
    "replicas": "--distribution.num_replicas=2",
}
STEPS = {"gpt2": 24}


def compare(name: str, folder: Path) -> str:
    common = [*SIZES[name].split(), f"--training.steps={STEPS.get(name, 60)}", "--data.validation_fraction=0.001"]
    run_dir, output = folder / name, folder / f"{name}.json"
    train = [f"--run_dir={run_dir}", "--training.log_every=4", f"--checkpoint.every_steps={STEPS.get(name, 60) // 2}"]
    subprocess.run([sys.executable, "-m", "tfdp.plan", *common, f"--output={output}"], check=True)
    subprocess.run([sys.executable, "-m", "tfdp.train", *common, *train], check=True, stdout=subprocess.DEVNULL)
    planned, summary = json.loads(output.read_text()), json.loads((run_dir / "summary.json").read_text())
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "step_seconds" in row]
    checkpoint = max((run_dir / "checkpoints").iterdir())
    measured = {
        "checkpoint_bytes": sum(file.stat().st_size for file in checkpoint.iterdir()),
        "reduction_bytes": steps[-1]["reduction_bytes"],
        "peak_memory_bytes": summary["peak_memory_bytes"],
        "step_seconds": statistics.median(row["step_seconds"] for row in steps[1:]),
    }
    ratios = {key: planned[key] / value if value else float(planned[key] == value) for key, value in measured.items()}
    return f"{name:<10}" + "".join(
        f" {key} {planned[key]:,.3f} / {measured[key]:,.3f} = {ratio:.3f};" for key, ratio in ratios.items()
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        print("\n".join([compare(name, Path(folder)) for name in sys.argv[1:] or SIZES]))


if __name__ == "__main__":
    main()
