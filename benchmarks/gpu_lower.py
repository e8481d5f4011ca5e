"""Lowers the training step to HLO for a machine with a GPU but without TensorFlow: see docs/gpu.md.

`python benchmarks/gpu_lower.py FOLDER`, on CPUs. Each program is that of `training.step` and `training.update` as they
are compiled on a GPU (XLA for the whole), with the weights as arguments, before any optimisation for a device.
`benchmarks/gpu_run.py FOLDER` runs them.
"""

import gzip
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tfdp.config.sections import TrainingConfig
from tfdp.recipe import import_recipe
from tfdp.system.startup import load_tensorflow

NUM_STEPS = 20  # of the default job, which both machines run
LATER = 10  # steps after which one micro-batch is compared: at the start most gradients are 0
GPT2_VARIANTS = {  # rows, loss_chunk_size, remat, dropout, whether attention takes all queries at once
    "8": (8, None, False, 0.0, False),
    "16": (16, None, False, 0.0, False),
    "8-chunk-all": (8, 0, False, 0.0, False),
    "16-chunk-all": (16, 0, False, 0.0, False),
    "16-chunk-2048": (16, 2048, False, 0.0, False),
    "16-one-block": (16, None, False, 0.0, True),
    "16-dropout": (16, None, False, 0.1, False),
    "16-remat": (16, None, True, 0.0, False),
}


def main() -> None:
    folder = Path(sys.argv[1])
    only = sys.argv[2:]
    folder.mkdir(parents=True, exist_ok=True)
    load_tensorflow()
    for precision in ("float32", "bfloat16"):
        if not only or "default" in only:
            lower_default(folder, precision)
    for name, variant in GPT2_VARIANTS.items():
        if not only or name in only:
            lower_gpt2(folder, name, *variant)


def default_config(precision: str) -> Any:
    """The configuration of `python -m tfdp.train`, compiled as on a GPU."""
    recipe = import_recipe("causal_lm")
    training: Any = {"precision": precision, "jit_compile": True, "parallel_microbatches": 1}
    return recipe.Config(training=TrainingConfig(**training))


def gpt2_config(rows: int, loss_chunk_size: int | None, remat: bool, dropout: float) -> Any:
    """GPT-2 small in bfloat16 on full contexts."""
    from tfdp.benchmarking.own import model_config
    from tfdp.benchmarking.shapes import Shape
    from tfdp.config.sections import OptimizerConfig

    shape = Shape("gpt2", 12, 12, 768, 1024, rows, 50304)
    model = replace(model_config(shape), dropout=dropout)
    training = TrainingConfig(
        global_batch_size=rows,
        precision="bfloat16",
        jit_compile=True,
        parallel_microbatches=1,
        loss_chunk_size=loss_chunk_size,
        remat=remat,
    )
    return import_recipe("causal_lm").Config(model=model, training=training, optimizer=OptimizerConfig(name="adamw"))


def lower_default(folder: Path, precision: str) -> None:
    """Programs of the default job, its first weights and batches, and what TensorFlow computes of them on this CPU."""
    import tensorflow as tf

    components, batches = _built(default_config(precision), None)
    values = _arrays(_variables(components))
    given = [next(batches) for _ in range(NUM_STEPS)]
    found = _reference(components, given[LATER])
    name, later = f"default-{precision}", found.pop("later")
    _lower(folder, name, components, given[0], found)
    if precision == "float32":  # whose products a GPU computes in TF32 unless it is told not to
        tf.config.experimental.enable_tensor_float_32_execution(False)
        _lower(folder, f"{name}-highest", components, given[0], {**found, "arrays": f"{name}.npz"})
        tf.config.experimental.enable_tensor_float_32_execution(True)
    tokens = {f"{key}/{at}": value.numpy() for at, batch in enumerate(given) for key, value in batch.items()}
    arrays = {f"start/{at}": value for at, value in enumerate(values)}
    arrays |= {f"later/{at}": value for at, value in enumerate(later)}
    np.savez_compressed(folder / f"{name}.npz", **tokens, **arrays)


def lower_gpt2(folder: Path, name: str, *variant: Any) -> None:
    """Programs of GPT-2 small, whose weights are drawn where they run."""
    from tfdp.ops import chunking, kernels

    *options, one_block = variant
    components, batches = _built(gpt2_config(*options), 50304)
    kernels.query_blocks = (lambda count: [(0, count)]) if one_block else chunking.query_blocks
    _lower(folder, f"gpt2-{name}", components, next(batches), {}, with_update=name == "16")


def _built(config: Any, vocab_size: int | None) -> tuple[Any, Any]:
    """The components of a run under one device, and its batches; of random ids where a vocabulary is given."""
    import tensorflow as tf

    from tfdp import assembly

    corpus: Any
    if vocab_size is None:
        from tfdp.data import sources

        corpus = sources.open_corpus(config.data, sources.cache_dir(config.data))
    else:
        corpus = _random_corpus(config, vocab_size)
    strategy = tf.distribute.OneDeviceStrategy("CPU:0")
    components = assembly.build(import_recipe("causal_lm"), config, corpus, strategy, 1)
    return components, components.batches_from(0, ())


def _random_corpus(config: Any, vocab_size: int) -> Any:
    from fractions import Fraction

    from tfdp.benchmarking.own import _Ids, _Shards
    from tfdp.data.shards import Split
    from tfdp.data.sources import Corpus, Source

    length = 4 * config.training.global_batch_size * config.model.context_length + 1
    split = Split([np.random.default_rng(0).integers(0, vocab_size, length, np.int32)], 1, length)
    shards: Any = _Shards(split, split)
    tokenizer: Any = _Ids(vocab_size)
    return Corpus([Source("ids", Fraction(1), shards)], tokenizer)


def _variables(components: Any) -> list[Any]:
    return [*components.optimizer.weights, *components.optimizer.state]


def _arrays(variables: Sequence[Any]) -> list[np.ndarray]:
    return [np.array(variable.numpy()) for variable in variables]


def _reference(components: Any, batch: Any) -> dict[str, Any]:
    """Losses and norms of the first steps on this CPU; the weights after `LATER` steps, and a micro-batch with them."""
    import tensorflow as tf

    step, batches = components.train_step, components.batches_from(0, ())
    first = step(batches, 0, LATER)
    later = _arrays(components.optimizer.weights)
    program = tf.function(step._microbatch_sums, jit_compile=True, autograph=False)
    gradients, sums = program(batch, tf.constant(LATER, tf.int64), tf.constant(1.0))
    square = sum(float(np.sum(np.square(each.numpy().astype(np.float64)))) for each in gradients)
    rest = step(batches, LATER, NUM_STEPS - LATER)
    return {
        "later": later,
        "later_loss": float(sums[0, 0] / sums[1, 0]),
        "later_norm_of_sum": square**0.5,
        "losses": [*first.loss.tolist(), *rest.loss.tolist()],
        "grad_norms": [*first.grad_norm.tolist(), *rest.grad_norm.tolist()],
    }


def _lower(
    folder: Path, name: str, components: Any, batch: Any, facts: dict[str, Any], with_update: bool = True
) -> None:
    """Writes the programs and a description of their arguments."""
    import tensorflow as tf

    weights, state = components.optimizer.weights, components.optimizer.state
    step, scale = tf.constant(0, tf.int64), tf.constant(1.0)
    values = [tf.convert_to_tensor(weight.value) for weight in weights]
    kept = [tf.convert_to_tensor(variable.value) for variable in state]
    program, gradients = _microbatch_program(components.train_step, weights)
    _write(folder / f"{name}-microbatch", program, (values, dict(batch), step, scale))
    if with_update:
        specs = [tf.zeros(shape, dtype) for shape, dtype in gradients(values, dict(batch), step, scale)]
        update = _update_program(components, weights, state)
        _write(folder / f"{name}-update", update, (values, kept, specs, tf.ones([2, 1]), step, scale))
    config = components.layout
    facts = {
        **facts,
        "num_weights": len(weights),
        "num_state": len(state),
        "num_tokens": config.microbatch_size * (batch["tokens"].shape[1] - 1),
        "flops_per_token": components.model.flops_per_token(),
        "model": components.model.describe(),
        "names": [weight.path for weight in weights],
    }
    (folder / f"{name}.json").write_text(json.dumps(facts), encoding="utf-8")


def _microbatch_program(train_step: Any, weights: Sequence[Any]) -> tuple[Any, Callable[..., Any]]:
    """Weights and rows to gradients and sums; and a function that tells shapes and dtypes of the gradients."""
    import keras
    import tensorflow as tf

    def compute(values: Any, rows: Any, step: Any, scale: Any) -> Any:
        with keras.StatelessScope(state_mapping=list(zip(weights, values, strict=True))):
            return train_step._microbatch_sums(rows, step, scale)

    program = tf.function(compute, jit_compile=True, autograph=False)

    def gradients(*arguments: Any) -> list[tuple[Any, Any]]:
        found, _sums = program.get_concrete_function(*arguments).structured_outputs
        return [(each.shape, each.dtype) for each in found]

    return program, gradients


def _update_program(components: Any, weights: Sequence[Any], state: Sequence[Any]) -> Any:
    """Weights, state, gradients and sums to new weights and state, and the statistics of a step."""
    import tensorflow as tf

    from tfdp.training.step_statistics import StepStatistics
    from tfdp.training.update import _scaled

    optimizer, update = components.optimizer, components.train_step._update
    (group,) = optimizer.groups(1)

    def compute(values: Any, kept: Any, gradients: Any, sums: Any, step: Any, scale: Any) -> Any:
        limit = tf.constant(float("inf"))
        found, factor, _good = update._measure_sums(gradients, sums[0], sums[1], step, limit, scale)
        rate = StepStatistics.from_vector(found).learning_rate
        scaled = [_scaled(each, factor) for each in gradients]
        return (*optimizer.update(group, values, kept, scaled, rate, step), found)

    return tf.function(compute, jit_compile=True, autograph=False)


def _write(path: Path, program: Any, arguments: tuple[Any, ...]) -> None:
    """The program as a serialised HLO module, compressed."""
    generate = program.experimental_get_compiler_ir(*arguments)
    text = generate(stage="hlo", platform_name="GPU")
    calls = sorted(set(re.findall(r'custom_call_target="([^"]+)"', text)))
    precisions = sorted(set(re.findall(r"operand_precision=\{[^}]*\}", text)))
    path.with_suffix(".hlo.gz").write_bytes(gzip.compress(generate(stage="hlo_serialized", platform_name="GPU")))
    dots = len(re.findall(r" dot\(", text))
    print(f"{path.name}: {len(text):,} characters, {dots} products, precision {precisions}, custom calls {calls}")


if __name__ == "__main__":
    main()
