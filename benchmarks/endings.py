"""How long a run takes to end once its summary.json is written: `python benchmarks/endings.py [RUNS OF EACH LAYOUT]`.

One, two and four replicas, two workers, and two workers of two replicas; prints the times of each in seconds. Something
that a run leaves behind for others to wait for, such as a thread of a library, shows here.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

LAYOUTS = {"1x1": (1, 1), "1x2": (1, 2), "1x4": (1, 4), "2x1": (2, 1), "2x2": (2, 2)}  # workers and replicas of each
KEYS = [
    "--model.num_layers=2",
    "--model.model_dim=64",
    "--model.context_length=64",
    "--training.steps=12",
    "--training.global_batch_size=8",
    "--training.sample_tokens=0",
]


def seconds_to_end(folder: Path, num_workers: int, num_replicas: int) -> float:
    """From the moment at which summary.json is written to the exit of the last process."""
    program = ["tfdp.launch", f"--num_workers={num_workers}", "--"] if num_workers > 1 else ["tfdp.train"]
    layout = [f"--run_dir={folder}/run", f"--distribution.num_replicas={num_replicas}"]
    command = [sys.executable, "-m", *program, *layout, *KEYS]
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return time.time() - (folder / "run" / "summary.json").stat().st_mtime


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 8
    slowest = 0.0
    for name, (num_workers, num_replicas) in LAYOUTS.items():
        found = []
        for _ in range(count):
            with tempfile.TemporaryDirectory() as folder:
                found.append(seconds_to_end(Path(folder), num_workers, num_replicas))
        slowest = max(slowest, *found)
        print(f"{name}: {' '.join(f'{seconds:.2f}' for seconds in found)}", flush=True)
    print(f"the slowest of {count * len(LAYOUTS)}: {slowest:.2f} s")


if __name__ == "__main__":
    main()
