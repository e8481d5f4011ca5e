"""How long the default job takes to a validation loss: `python benchmarks/time_to_loss.py [SEEDS] [--KEY=VALUE ...]`.

Each seed is a process of its own, timed from its start to the line of metrics.jsonl that tells the loss; imports,
tracing, samples and the evaluations of the job count. 2 to 10 seeds. Keys and values are for the job.
"""

import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TARGET = 1.40  # nats per byte
T_QUANTILES = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}  # 95 %


def seconds_to_target(seed: int, options: list[str]) -> tuple[float, int]:
    """Seconds and steps to the first evaluation at or below the target."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tfdp.train", f"--run_dir={folder}/run", f"--seed={seed}"]
        started = time.monotonic()
        process = subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL)
        metrics = Path(folder, "run", "metrics.jsonl")
        try:
            while True:
                ended = process.poll() is not None
                for line in metrics.read_text().splitlines() if metrics.exists() else []:
                    row = json.loads(line) if line.endswith("}") else {}
                    if row.get("validation_loss", math.inf) <= TARGET:
                        return time.monotonic() - started, row["step"]
                if ended:
                    raise SystemExit(f"seed {seed} ended with {process.returncode} before it came to {TARGET}")
                time.sleep(0.1)
        finally:
            process.kill()
            process.wait()


def main() -> None:
    options = [word for word in sys.argv[1:] if word.startswith("--")]
    counts = [int(word) for word in sys.argv[1:] if not word.startswith("--")]
    times = []
    for seed in range(counts[0] if counts else 5):
        seconds, step = seconds_to_target(seed, options)
        print(f"seed {seed}: {TARGET} after {seconds:.1f} s, at step {step}", flush=True)
        times.append(seconds)
    mean, count = statistics.mean(times), len(times)
    if count in T_QUANTILES:
        half = T_QUANTILES[count] * statistics.stdev(times) / math.sqrt(count)
        print(f"mean {mean:.1f} s, 95 % interval {mean - half:.1f} to {mean + half:.1f} s")


if __name__ == "__main__":
    main()
