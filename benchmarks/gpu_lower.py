"""Lowers the training step to HLO for a machine with a GPU but without TensorFlow: see docs/gpu.md.

`python benchmarks/gpu_lower.py FOLDER`, on CPUs. Each program is that of `training.step` and `training.update` as they
are compiled on a GPU (XLA for the whole), with the weights as arguments, before any optimisation for a device.
`benchmarks/gpu_run.py FOLDER` runs them.
"""

import contextlib
import gzip
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tfdp.config.sections import TrainingConfig
from tfdp.recipe import import_recipe
from tfdp.system.startup import load_tensorflow

NUM_STEPS = 20  # of the default job, which both machines run
LATER = 10  # steps after which one micro-batch is compared: at the start most gradients are 0
GPT2_VARIANTS: dict[str, dict[str, Any]] = {  # of rows, keys of `training`, and what is done otherwise than tfdp does
    "8": {"rows": 8},
    "16": {"rows": 16},
    "8-chunk-all": {"rows": 8, "loss_chunk_size": 0},
    "16-chunk-all": {"rows": 16, "loss_chunk_size": 0},
    "16-chunk-2048": {"rows": 16, "loss_chunk_size": 2048},
    "16-remat": {"rows": 16, "remat": True},
    "16-one-block": {"rows": 16, "attention": "one_block"},
    "16-parts-chunk-all": {"rows": 16, "loss_chunk_size": 0, "attention": "parts"},
    "16-cudnn-chunk-all": {"rows": 16, "loss_chunk_size": 0, "attention": "cudnn"},
    "16-dropout-chunk-all": {"rows": 16, "loss_chunk_size": 0, "dropout": 0.1},
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
            lower_gpt2(folder, name, **variant)


def default_config(precision: str) -> Any:
    """The configuration of `python -m tfdp.train`, compiled as on a GPU."""
    recipe = import_recipe("causal_lm")
    training: Any = {"precision": precision, "jit_compile": True, "parallel_microbatches": 1}
    return recipe.Config(training=TrainingConfig(**training))


def gpt2_config(rows: int, dropout: float, **options: Any) -> Any:
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
        **options,
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
    everything: dict[str, Any] = {**tokens, **arrays}
    np.savez_compressed(folder / f"{name}.npz", **everything)


def lower_gpt2(folder: Path, name: str, rows: int, attention: str = "", dropout: float = 0.0, **options: Any) -> None:
    """Programs of GPT-2 small, whose weights are drawn where they run."""
    components, batches = _built(gpt2_config(rows, dropout, **options), 50304)
    with _otherwise(attention, dropout > 0):
        _lower(folder, f"gpt2-{name}", components, next(batches), {}, with_update=name == "16")


@contextlib.contextmanager
def _otherwise(attention: str, small_ranges: bool) -> Iterator[None]:
    """Puts another form of attention, and of the numbers of elements in dropout, into tfdp meanwhile."""
    from unittest import mock

    import tensorflow as tf

    from tfdp.models.dropout import KeyedDropout
    from tfdp.ops import kernels

    def in_parts(_self: Any, queries: Any, keys: Any, values: Any, visible: Any, scale: float, _causal: bool) -> Any:
        blocks = kernels.query_blocks(queries.shape[2])
        return kernels._attention_in_parts(queries, keys, values, visible, scale, blocks)

    with contextlib.ExitStack() as stack:
        if attention == "one_block":
            stack.enter_context(mock.patch.object(kernels, "query_blocks", lambda count: [(0, count)]))
        if attention == "parts":
            stack.enter_context(mock.patch.object(kernels.Kernels, "attention", in_parts))
            stack.enter_context(mock.patch.object(kernels, "_product_mean", tf.reduce_mean))
        if attention == "cudnn":
            stack.enter_context(mock.patch.object(kernels.Kernels, "attention", _cudnn_attention))
        if small_ranges:
            stack.enter_context(mock.patch.object(KeyedDropout, "mask", _mask_of_small_ranges))
        yield


def _mask_of_small_ranges(self: Any, keys: Any, time: Any, dim: Any) -> Any:
    """`KeyedDropout.mask`, whose numbers of elements TensorFlow would compute and write into the program, 3 MB each."""
    import tensorflow as tf

    from tfdp.ops.hashing import mix, uint32

    row = mix(keys ^ uint32(self.layer_key))[:, tf.newaxis, tf.newaxis]
    nothing = tf.cast(keys[0] - keys[0], tf.int32)  # which TensorFlow does not know to be 0
    elements = (tf.range(time) * dim + nothing)[:, tf.newaxis] + tf.range(dim)[tf.newaxis]
    return mix(mix(tf.cast(elements, tf.uint32))[tf.newaxis] ^ row) >= uint32(int(self.rate * 2**32))


# ---------------------------------------------------------------------------------------------------
# Attention by cuDNN
# ---------------------------------------------------------------------------------------------------


def _cudnn_attention(
    _self: Any, queries: Any, keys: Any, values: Any, _visible: Any, scale: float, _causal: bool
) -> Any:
    """Causal `Kernels.attention` as XLA hands it to cuDNN: scores never stand in memory."""
    import tensorflow as tf
    from tensorflow.compiler.tf2xla.ops.gen_xla_ops import xla_custom_call_v2

    rows, heads, length, dim = queries.shape

    def call(name: str, operands: Any, results: Any) -> Any:
        return xla_custom_call_v2(
            operands=operands,
            call_target_name=f"__cudnn$fmhaSoftmax{name}",
            backend_config=_cudnn_config([rows, heads, length, length], scale, bool(name)),
            has_side_effect=False,
            result_dtypes=[dtype for dtype, _ in results],
            result_shapes=[tf.TensorShape(shape) for _, shape in results],
        )

    like = (queries.dtype, (rows, heads, length, dim))
    workspace = (tf.uint8, (0,))

    @tf.custom_gradient
    def attend(queries: Any, keys: Any, values: Any) -> Any:
        given = [tf.transpose(each, [0, 2, 1, 3]) for each in (queries, keys, values)]
        output, sums, _ = call("", given, [like, (tf.float32, (rows, heads, length)), workspace])

        def gradients(upstream: Any) -> Any:
            others = [tf.transpose(each, [0, 2, 1, 3]) for each in (upstream, output)]
            return call("Backward", [*given, sums, *others], [like, like, like, workspace])[:3]

        return output, gradients

    return attend(queries, keys, values)


def _cudnn_config(shape: Sequence[int], scale: float, is_backward: bool) -> str:
    """What XLA wants to know of attention: (rows, time, heads, dim) in, (rows, heads, time, dim) out."""

    def product(left: int, right: int, left_batch: int, right_batch: int) -> dict[str, list[str]]:
        return {
            "lhs_contracting_dimensions": [str(left)],
            "rhs_contracting_dimensions": [str(right)],
            "lhs_batch_dimensions": ["0", str(left_batch)],
            "rhs_batch_dimensions": ["0", str(right_batch)],
        }

    forward = {"bmm1": product(3, 3, 2, 2), "bmm2": product(3, 1, 1, 2)}
    backward = {
        "bmm1_grad_gemm1": product(2, 1, 1, 2),
        "bmm1_grad_gemm2": product(3, 1, 1, 2),
        "bmm2_grad_gemm1": product(2, 1, 1, 2),
        "bmm2_grad_gemm2": product(3, 3, 2, 2),
    }
    products = backward if is_backward else forward
    config = {
        "algorithm": {
            "algo_id": "0",
            "math_type": "TENSOR_OP_MATH",
            "tuning_knobs": {"17": "1", "4": "0"},
            "is_cudnn_frontend": True,
            "workspace_size": "0",
        },
        "fmha_scale": scale,
        "intermediate_tensor_shape": {
            "element_type": "BF16",
            "dimensions": [str(size) for size in shape],
            "layout": {"minor_to_major": ["3", "2", "1", "0"]},
            "is_dynamic_dimension": [False] * 4,
        },
        "is_flash_attention": True,
        "mask_type": "CAUSAL",
        **{f"{name}_dot_dimension_numbers": value for name, value in products.items()},
        "dropout_rate": 0.0,
        "seed": 42,
        "sliding_window_length": 0,
        "max_seg_per_batch": 1,
        "is_paged_attention": False,
    }
    return json.dumps({"operation_queue_id": "0", "cudnn_fmha_backend_config": config})


# ---------------------------------------------------------------------------------------------------
# Components and programs
# ---------------------------------------------------------------------------------------------------


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
