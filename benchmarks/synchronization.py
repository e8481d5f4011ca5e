"""Ways to synchronise side by side, on equal tokens: `python benchmarks/synchronization.py OUTPUT [--key VALUE ...]`.

Each way is a job of its own, one after the other, of `--workers` processes on this machine: on loopback, or with
`--mbits` and `--delay` on a slow network (`slow_network.py`). Keys of tfdp.train after `--` go to all of them. Writes
OUTPUT/results.json and OUTPUT/loss.png, and prints a table: the validation loss at the end, bytes that a replica hands
over per token, seconds of training, and how long each took to the loss that every_step ended with.

    python benchmarks/synchronization.py sync --islands 4 --every 1 10 30 100 -- --training.steps 300
    python benchmarks/synchronization.py slow --workers 2 --mbits 10 --delay 0.02 --every 30 --types float32 int4
"""

import argparse
import contextlib
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from slow_network import Host, slow_network

_PORT = 23456


def ways(options: argparse.Namespace) -> Iterator[tuple[str, list[str]]]:
    """Names and keys of all ways to compare."""
    if not options.without_every_step:
        yield "every_step", []
    for islands, every, kind, outer in itertools.product(options.islands, options.every, options.types, options.outer):
        keys = {
            "synchronization": "local",
            "num_islands": islands,
            "synchronize_every": every,
            "delta_dtype": kind,
            "outer_optimizer": outer,
        }
        name = f"K {islands}, H {every}, {outer}, {kind}"
        yield name, [f"--distribution.{key}={value}" for key, value in keys.items()]


def run(folder: Path, keys: Sequence[str], hosts: Sequence[Host] | None, num_workers: int) -> None:
    """Trains in `folder`, on hosts of a slow network where there are any."""
    train = [sys.executable, "-u", "-m", "tfdp.train", f"--run_dir={folder}", *keys]
    if hosts is None:
        launch = [sys.executable, "-m", "tfdp.launch", f"--num_workers={num_workers}", "--", *train[4:]]
        subprocess.run(launch, check=True, stdout=subprocess.DEVNULL)
        return
    addresses = [f"{host.address}:{_PORT}" for host in hosts]
    processes = []
    for index, host in enumerate(hosts):
        cluster = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
        threads = str(max(1, (os.cpu_count() or 1) // len(hosts)))
        environment = {
            **os.environ,
            "TF_CONFIG": json.dumps(cluster),
            "TF_NUM_INTRAOP_THREADS": threads,
            "OMP_NUM_THREADS": threads,
        }
        command = ["ip", "netns", "exec", host.name, *train]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL))
    if any(process.wait() for process in processes):
        raise SystemExit(f"{folder} has failed")


def read(folder: Path) -> dict[str, Any]:
    """The curve of a run, and what it cost."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "summary.json").read_text())
    seconds, bytes_sent, tokens, last, curve = 0.0, 0.0, 0, 0, []
    for row in rows:
        if "loss" in row:
            steps = row["step"] - last
            last = row["step"]
            seconds += steps * row["step_seconds"]
            bytes_sent += steps * row["reduction_bytes"]
            tokens += steps * row["num_tokens"]
        elif "validation_loss" in row:
            curve.append((row["step"], seconds, bytes_sent, row["validation_loss"]))
    return {
        "curve": curve,
        "validation_loss": summary["validation_loss"],
        "bytes_per_token": bytes_sent / tokens,
        "seconds": seconds,
    }


def seconds_to(curve: Sequence[Sequence[float]], loss: float) -> float | None:
    """When a curve first reaches a loss, on the line between two evaluations."""
    for before, after in itertools.pairwise(curve):
        if after[3] <= loss:
            part = 0.0 if before[3] <= loss else (before[3] - loss) / (before[3] - after[3])
            return before[1] + part * (after[1] - before[1])
    return None


def draw(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Loss against seconds and against bytes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (by_time, by_bytes) = plt.subplots(1, 2, figsize=(12, 5), sharey=True)
    for name, found in results.items():
        _, seconds, num_bytes, losses = zip(*found["curve"], strict=True)
        by_time.plot(seconds, losses, marker="o", markersize=3, label=name)
        by_bytes.plot([each / 1e6 for each in num_bytes], losses, marker="o", markersize=3, label=name)
    by_time.set(xlabel="seconds of training", ylabel="validation loss, nats per token", xscale="log")
    by_bytes.set(xlabel="MB that a replica has handed over", xscale="log")
    by_time.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--islands", type=int, nargs="+", default=[4])
    parser.add_argument("--every", type=int, nargs="+", default=[10, 30])
    parser.add_argument("--types", nargs="+", default=["float32"])
    parser.add_argument("--outer", nargs="+", default=["nesterov"])
    parser.add_argument("--mbits", type=float, help="rate of each host's link (default: loopback as it is)")
    parser.add_argument("--delay", type=float, default=0.0, help="seconds that each packet is under way")
    parser.add_argument("--without_every_step", action="store_true")
    own, keys = sys.argv[1:], []
    if "--" in own:
        own, keys = own[: own.index("--")], own[own.index("--") + 1 :]
    options = parser.parse_args(own)
    results: dict[str, dict[str, Any]] = {}
    with contextlib.ExitStack() as stack:
        hosts = None
        if options.mbits is not None:
            hosts = stack.enter_context(slow_network(options.workers, options.mbits, options.delay))
        for name, of_way in ways(options):
            folder = options.output / name.replace(", ", "_").replace(" ", "")
            if not (folder / "summary.json").exists():
                run(folder, [*keys, *of_way], hosts, options.workers)
            results[name] = read(folder)
    (options.output / "results.json").write_text(json.dumps(results, indent=1))
    draw(results, options.output / "loss.png")
    goal = results.get("every_step", {}).get("validation_loss")
    print(f"{'way':32} {'valid loss':>10} {'bytes/token':>12} {'seconds':>8} {'to the loss of every_step':>26}")
    for name, found in results.items():
        reached = None if goal is None else seconds_to(found["curve"], goal)
        print(
            f"{name:32} {found['validation_loss']:10.4f} {found['bytes_per_token']:12,.1f} {found['seconds']:8.1f} "
            f"{'never' if reached is None else f'{reached:.1f} s':>26}"
        )


if __name__ == "__main__":
    main()
