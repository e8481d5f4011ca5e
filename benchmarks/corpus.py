"""What a large corpus costs: `python benchmarks/corpus.py [MEGABYTES] [STEPS]`.

Makes a corpus of so many megabytes (1,000) and one of 10, from random stretches of lines of the standard library;
prepares both with `python -m tfdp.prepare --tokenizer bpe:8192`, and trains the tiny model on each. Prints the
megabytes per second of the preparation and the peak memory of all its processes, the peak resident memory of both
trainings, and how long a step waits for its input: steps on the real pipeline against steps on one batch that is there
already, interleaved.
"""

import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MODEL = {"num_layers": 4, "num_heads": 4, "model_dim": 128, "context_length": 64}
BATCH = 12


def main() -> None:
    megabytes = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    num_steps = int(sys.argv[2]) if len(sys.argv) > 2 else 300
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        peaks = {}
        for size in (10, megabytes):
            write_corpus(folder / f"{size}.jsonl", size * 1_000_000)
            prepare(folder / f"{size}.jsonl", folder / f"{size}.shards", size)
            peaks[size] = train(folder / f"{size}.shards", folder / f"{size}.run", num_steps)
        small, large = peaks[10], peaks[megabytes]
        print(
            f"training: peak resident memory {small:,.0f} MB, with {megabytes} MB {large:,.0f} MB: {large / small:.3f}"
        )
        input_wait(folder / f"{megabytes}.shards")


def write_corpus(path: Path, num_bytes: int) -> None:
    from tfdp.data.corpus import documents

    generator = random.Random(0)
    texts = [document.text.split("\n") for document in documents("python-stdlib") if document.text]
    with path.open("w", encoding="utf-8") as file:
        while num_bytes > 0:
            lines = generator.choice(texts)
            start = generator.randrange(len(lines))
            text = "\n".join(lines[start : start + generator.randint(20, 400)]) + f"\n# {generator.random()}\n"
            num_bytes -= len(text.encode())
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")


def prepare(source: Path, output: Path, megabytes: int) -> None:
    started = time.monotonic()
    command = [sys.executable, "-m", "tfdp.prepare", "--source", f"jsonl:{source}", "--output", str(output)]
    peak = run_and_watch([*command, "--tokenizer", "bpe:8192"], "Pss:")
    seconds = time.monotonic() - started
    print(
        f"prepare:  {megabytes} MB in {seconds:.1f} s, {megabytes / seconds:.1f} MB/s, peak {peak:,.0f} MB", flush=True
    )


def train(shards: Path, run_dir: Path, num_steps: int) -> float:
    command = [sys.executable, "-m", "tfdp.train", "--data.source", f"tokens:{shards}", "--run_dir", str(run_dir)]
    keys = {f"model.{key}": value for key, value in MODEL.items()}
    keys |= {"training.steps": num_steps, "training.global_batch_size": BATCH, "training.sample_tokens": 0}
    keys |= {"training.evaluate_every": 0, "checkpoint.every_steps": 0}
    # The validation split grows with the corpus, and one pass over 2 % of a large one takes longer than the training.
    command += [part for key, value in keys.items() for part in (f"--{key}", str(value))]
    return run_and_watch(command, "Rss:", until=run_dir / "metrics.jsonl", rows=num_steps // 20)


def run_and_watch(command: list[str], kind: str, until: Path | None = None, rows: int = 0) -> float:
    """Runs a command, or its first rows of metrics; the peak in MB of the memory of its processes together."""
    peak = 0.0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            peak = max(peak, sum(memory(pid, kind) for pid in descendants(process.pid)))
            if until is not None and until.exists() and until.read_text().count("\n") >= rows:
                process.kill()
            time.sleep(0.2)
    return peak


def descendants(pid: int) -> list[int]:
    found = [pid]
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += descendants(int(child))
    except OSError:
        pass
    return found


def memory(pid: int, kind: str) -> float:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith(kind)) / 1000


def input_wait(shards: Path, num_rounds: int = 15, num_steps: int = 20) -> None:
    """Prints how much longer steps take on the real pipeline than on one batch that is there already."""
    from tfdp.system.startup import load_tensorflow

    load_tensorflow()
    import tensorflow as tf

    from tfdp import assembly
    from tfdp.config.sections import DataConfig, DistributionConfig, ModelConfig, TrainingConfig
    from tfdp.data import pipeline
    from tfdp.data.sources import open_corpus
    from tfdp.parallel.distribution import make_strategy
    from trainers import causal_lm

    config = causal_lm.Config(
        model=ModelConfig(**MODEL),
        data=DataConfig(source=f"tokens:{shards}"),
        training=TrainingConfig(steps=10_000, global_batch_size=BATCH, spike_threshold=None),
    )
    corpus = open_corpus(config.data, Path("unused"))
    parallel = assembly.parallel_microbatches(causal_lm, config, corpus, num_workers=1)
    strategy = make_strategy(DistributionConfig(), parallel_microbatches=parallel)
    components = assembly.build(causal_lm, config, corpus, strategy, parallel)
    batches = components.batches_from(0, ())
    batch = next(iter(pipeline.train_batches(strategy, components.order, 0)))
    same = iter(strategy.experimental_distribute_dataset(tf.data.Dataset.from_tensors(batch).repeat()))
    components.train_step(batches, 0, num_steps), components.train_step(same, 0, num_steps)
    seconds: dict[str, list[float]] = {"pipeline": [], "one batch": []}
    for _ in range(num_rounds):
        for name, each in (("pipeline", batches), ("one batch", same)):
            started = time.perf_counter()
            components.train_step(each, 100, num_steps)
            seconds[name].append((time.perf_counter() - started) / num_steps)
    ratios = [one / other for one, other in zip(seconds["pipeline"], seconds["one batch"], strict=True)]
    print(
        f"input:    {1e3 * statistics.median(seconds['pipeline']):.2f} ms a step, with one batch "
        f"{1e3 * statistics.median(seconds['one batch']):.2f} ms, median ratio {statistics.median(ratios):.3f}"
    )


if __name__ == "__main__":
    main()
