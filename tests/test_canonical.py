"""One run, any layout, to the last bit: `distribution.reduction: canonical`."""

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from workers import start, tiny_arguments

from tfdp.config.sections import DistributionConfig, ModelConfig, OptimizerConfig
from tfdp.models.gpt import GPT
from tfdp.optim.optimizer import Optimizer
from tfdp.optim.schedule import make_schedule
from tfdp.parallel import distribution
from tfdp.parallel.batch_layout import BatchLayout
from tfdp.parallel.synchronizer import AllReduce
from tfdp.system.exits import ConfigError
from tfdp.tasks.causal_lm import next_token_loss
from tfdp.training.step import StepRules, TrainStep
from trainers import causal_lm
from trainers.causal_lm import Config

DIGESTS = ("weights_sha256", "state_sha256", "validation_loss", "sequences_seen")
LAYOUTS = {  # name: (workers, replicas of each, threads of each); the global batch has 4 micro-batches
    "1 replica, accumulation 4": (1, 1, 2),
    "2 replicas, accumulation 2": (1, 2, 2),
    "4 replicas": (1, 4, 1),
    "2 workers, accumulation 2": (2, 1, 1),
    "2 workers, 2 replicas": (2, 2, 2),
}


def rows_of(run_dir: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


def summary(run_dir: Path) -> dict[str, object]:
    return json.loads((run_dir / "summary.json").read_text())


def train(tmp_path: Path, corpus: Path, name: str, layout: tuple[int, int, int], **changes: object) -> Path:
    """Runs 50 clipped steps with dropout, in processes of the layout's own threads; XLA writes to programs/."""
    num_workers, num_replicas, num_threads = layout
    settings = {
        "model__num_layers": 2,
        "model__model_dim": 64,
        "model__context_length": 64,
        "model__dropout": 0.2,
        "optimizer__name": "muon",
        "optimizer__learning_rate": 3e-3,
        "optimizer__clip_norm": 0.5,
        "optimizer__schedule_steps": 50,
        "training__steps": 50,
        "training__global_batch_size": 16,
        "training__microbatch_size": 4,
        "training__jit_compile": "auto",
        "distribution__num_replicas": num_replicas,
        "distribution__reduction": "canonical",
        **changes,
    }
    arguments = tiny_arguments(corpus, tmp_path / name, **settings)
    environment = {
        "TF_NUM_INTRAOP_THREADS": str(num_threads),
        "OMP_NUM_THREADS": str(num_threads),
        "XLA_FLAGS": f"--xla_dump_to={programs_folder(tmp_path / name)} --xla_dump_hlo_as_text "
        "--xla_dump_hlo_module_re=.*(microbatch_sums|measure_sums|apply_group).*",
    }
    with start(tmp_path, [arguments] * num_workers, environment=environment) as job:
        codes = job.wait(500)
        assert codes == [0] * num_workers, [job.output(index) for index in range(num_workers)]
    return tmp_path / name


def programs_folder(run_dir: Path) -> Path:
    """Where XLA writes what it compiles for a run: XLA_FLAGS holds no blanks."""
    return run_dir.parent / re.sub(r"\W+", "-", f"programs {run_dir.name}")


def compiled_programs(run_dir: Path) -> set[str]:
    """What XLA made of the programs of a step, without the numbers that it gives to modules."""
    texts = [path.read_text() for path in programs_folder(run_dir).glob("*cpu_after_optimizations.txt")]
    return {re.sub(r"(inference_\w+?_|CustomGradient-|cluster_)\d+", r"\1", text) for text in texts}


def cases() -> list[Any]:
    """The default first; the whole grid of three rules, two precisions, XLA or not, only by hand."""
    grid = [
        (name, p, jit)
        for name in ("muon", "adamw", "lion")
        for p in ("float32", "bfloat16")
        for jit in ("auto", "false")
    ]
    in_ci = [("muon", "float32", "auto"), ("muon", "bfloat16", "auto"), ("adamw", "float32", "false")]
    return [*in_ci, *(pytest.param(*case, marks=pytest.mark.full) for case in grid if case not in in_ci)]


@pytest.mark.slow
@pytest.mark.multiworker
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("optimizer", "precision", "jit_compile"), cases())
def test_five_layouts_are_one_run(
    tmp_path: Path, corpus_dir: Path, optimizer: str, precision: str, jit_compile: str
) -> None:
    changes = {
        "optimizer__name": optimizer,
        "optimizer__learning_rate": 3e-4 if optimizer == "lion" else 3e-3,
        "training__precision": precision,
        "training__jit_compile": jit_compile,
    }
    runs = {name: train(tmp_path, corpus_dir, name, layout, **changes) for name, layout in LAYOUTS.items()}
    first, *others = runs
    reference = rows_of(runs[first])
    assert sum(row["grad_norm"] > 0.5 for row in reference) > 25, "the clip must be active"
    programs = compiled_programs(runs[first])
    assert len(programs) >= 5, "one that measures and four that update at least"
    for name in others:
        for key in DIGESTS:
            assert summary(runs[name])[key] == summary(runs[first])[key], (name, key)
        for key in ("loss", "grad_norm"):
            assert [row[key] for row in rows_of(runs[name])] == [row[key] for row in reference], (name, key)
        assert compiled_programs(runs[name]) == programs, name


@pytest.mark.slow
@pytest.mark.multiworker
@pytest.mark.timeout(600)
def test_layouts_are_close_under_fast(tmp_path: Path, corpus_dir: Path) -> None:
    # At three times this rate the rounding of 1e-7 has grown to 6e-5 by step 48: why canonical is there.
    changes = {
        "distribution__reduction": "fast",
        "optimizer__name": "adamw",
        "optimizer__learning_rate": 1e-3,
        "optimizer__clip_norm": 1.0,
        "training__jit_compile": "false",
    }
    chosen = ("1 replica, accumulation 4", "4 replicas", "2 workers, 2 replicas")
    runs = {name: train(tmp_path, corpus_dir, name, LAYOUTS[name], **changes) for name in chosen}
    losses = {name: [row["loss"] for row in rows_of(run)] for name, run in runs.items()}
    for name in chosen:
        np.testing.assert_allclose(losses[name], losses["1 replica, accumulation 4"], rtol=1e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.multiworker
@pytest.mark.timeout(600)
def test_a_run_that_moves_between_workers_keeps_its_bits(tmp_path: Path, corpus_dir: Path) -> None:
    for num_workers, num_steps in ((4, 20), (1, 35), (2, 50)):
        train(tmp_path, corpus_dir, "moved", (num_workers, 1, 1), training__steps=num_steps)
    still = train(tmp_path, corpus_dir, "still", (1, 1, 2))
    for key in DIGESTS:
        assert summary(tmp_path / "moved")[key] == summary(still)[key], key
    assert [row["loss"] for row in rows_of(tmp_path / "moved")] == [row["loss"] for row in rows_of(still)]


# Layouts of 4 micro-batches, by everything that may change from one to another: (replicas, side by side, and the rest).
WAYS: dict[str, tuple[int, int, dict[str, int]]] = {
    "1 replica": (1, 1, {}),
    "2 replicas, one pack": (2, 2, {"bytes_per_pack": 1 << 24}),
    "4 replicas, small packs": (4, 1, {"bytes_per_pack": 1024}),
    "2 replicas, compared at every step": (2, 1, {"verify_every": 1}),
}


def step_programs(
    num_replicas: int,
    side_by_side: int,
    optimizer: str,
    compiled: bool,
    bytes_per_pack: int | None = None,
    verify_every: int = 0,
) -> Counter:
    """The programs of a step as every compiler first sees them, and how often each is there over all replicas."""
    strategy = distribution.make_strategy(DistributionConfig(num_replicas=num_replicas, reduction="canonical"))
    config = OptimizerConfig(name=optimizer)  # type: ignore[arg-type]
    with strategy.scope():
        model = GPT(ModelConfig(num_layers=1, num_heads=2, model_dim=16, context_length=8), 32)
        update = Optimizer(config, model.trainable_variables)
    schedule = make_schedule(config, 10)
    sums = AllReduce(strategy, update.weights, update.state, "canonical", bytes_per_pack=bytes_per_pack)
    rules, cut = StepRules(1.0, "canonical", verify_every), BatchLayout(4, 1, side_by_side)
    step = TrainStep(strategy, next_token_loss(model), update, schedule, cut, rules, compiled, synchronizer=sums)
    rows = {"tokens": np.zeros((4, 9), np.int32), "position": np.arange(4), "source": np.zeros(4, np.int32)}
    dataset = tf.data.Dataset.from_tensor_slices(rows).repeat().batch(4, drop_remainder=True)
    batches = iter(strategy.experimental_distribute_dataset(dataset))
    numbers = (tf.constant(0, tf.int64), tf.constant(1), tf.constant(step.recent_losses), tf.constant(step.scaling))
    library = step._run.get_concrete_function(batches, *numbers).graph.as_graph_def().library.function
    chosen = [each for each in library if re.search("microbatch_sums|measure_sums|apply_group", each.signature.name)]
    for function in chosen:
        assert function.attr["_noinline"].b, "a program that the graph optimizer sees together with its surroundings"
        is_compiled = compiled or "microbatch_sums" not in function.signature.name
        assert function.attr["_XlaMustCompile"].b == is_compiled, function.signature.name
    return Counter(normalised(function) for function in chosen)


def normalised(program: object) -> str:
    """A program without the numbers that TensorFlow gives to functions and to our gradients as it meets them."""
    return re.sub(r"(inference_\w+?_|CustomGradient-)\d+", r"\1", str(program))


@pytest.mark.parametrize(
    ("optimizer", "compiled"), [("muon", True), pytest.param("lion", False, marks=pytest.mark.slow)]
)
def test_a_step_is_the_same_programs_in_every_layout(optimizer: str, compiled: bool) -> None:
    """Equal digests may be luck; equal programs on equal numbers are not."""
    expected: Counter | None = None
    for name, (num_replicas, side_by_side, rules) in WAYS.items():
        found = step_programs(num_replicas, side_by_side, optimizer, compiled, **rules)
        assert sum(found.values()) % num_replicas == 0
        each = Counter({program: count // num_replicas for program, count in found.items()})
        expected = expected or each
        assert each == expected, name


GPT2_LIKE = {"norm": "layer_norm", "use_bias": True, "position": "learned", "tie_embeddings": True, "qk_norm": False}


@pytest.mark.parametrize(
    ("changes", "num_microbatches", "replicas"),
    [
        ({}, 4, (1, 2)),
        pytest.param({}, 4, (1, 2, 4), marks=pytest.mark.slow),
        pytest.param({}, 12, (1, 6), marks=pytest.mark.slow),  # six nodes of two: a tree that is not full
        pytest.param({**GPT2_LIKE, "zero_init": False, "num_layers": 2}, 8, (1, 4), marks=pytest.mark.slow),
    ],
    ids=["two", "four", "twelve", "like GPT-2"],
)
def test_replicas_of_one_process_are_one_run(
    tiny_config: Callable[..., Config], changes: dict[str, object], num_microbatches: int, replicas: tuple[int, ...]
) -> None:
    found, losses = {}, {}
    for count in replicas:
        config = tiny_config(
            f"{count}",
            model={"dropout": 0.2, **changes},
            training={"steps": 12, "microbatch_size": 3, "global_batch_size": 3 * num_microbatches},
            distribution={"num_replicas": count, "reduction": "canonical"},
            optimizer={"clip_norm": 0.5},
        )
        found[count] = causal_lm.train(config)
        losses[count] = [(row["loss"], row["grad_norm"]) for row in rows_of(Path(str(config.run_dir)))]
        assert sum(norm > 0.5 for _, norm in losses[count]) > 6, "the clip must be active"
    for count in replicas[1:]:
        assert losses[count] == losses[1]
        for key in DIGESTS:
            assert found[count][key] == found[1][key], (count, key)


def test_what_canonical_refuses(tiny_config: Callable[..., Config]) -> None:
    with pytest.raises(ConfigError, match=r"^distribution.reduction \(canonical\) needs training.microbatch_size"):
        tiny_config("a", distribution={"reduction": "canonical"})
    config = tiny_config(
        "b", training={"microbatch_size": 1}, distribution={"reduction": "canonical", "num_replicas": 2}
    )
    with pytest.raises(
        ConfigError, match=r"whole subtrees of the 12 micro-batches.* there are 2: try 1, 3, 6, 12 repl"
    ):
        causal_lm.train(config)
