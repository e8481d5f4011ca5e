"""Runs what gpu_lower.py wrote on the accelerator of a machine with JAX and without TensorFlow: see docs/gpu.md.

`python benchmarks/gpu_run.py FOLDER OUTPUT SECONDS [JOB ...]`. Each job is a process of its own, so that its peak of
memory is its own; none starts after so many seconds. Each prints a line of JSON, which OUTPUT/results.jsonl keeps.
"""

import collections
import functools
import glob
import gzip
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

PEAK = 989e12  # bfloat16 FLOP/s of a H100 SXM or H200, without sparsity, by its data sheet
SAME_BITS = "--xla_gpu_deterministic_ops=true"
JOBS = (  # with flags of XLA after a colon
    "card",
    "default-float32",
    "default-float32-highest",
    "default-bfloat16",
    "gpt2-16",
    "gpt2-8",
    "gpt2-16-chunk-all",
    "attention",
    f"default-float32:{SAME_BITS}",
    f"gpt2-16:{SAME_BITS}",
    "gpt2-16-cudnn-chunk-all",
    "gpt2-16-parts-chunk-all",
    "gpt2-16-chunk-2048",
    "gpt2-8-chunk-all",
    "gpt2-16-one-block",
    "gpt2-16-dropout-chunk-all",
    "gpt2-16-remat",
)
LATER = 10  # as in gpu_lower


def main() -> None:
    folder, output, seconds, *chosen = sys.argv[1:]
    if seconds == "job":
        print("\n" + json.dumps(run_job(Path(folder), Path(output), chosen[0])), flush=True)
        return
    started = time.monotonic()
    for job in chosen or JOBS:
        left = float(seconds) - (time.monotonic() - started)
        if left > 5:
            found = _start(folder, output, job, left)
            line = json.dumps({"job": job, "at": round(time.monotonic() - started, 1), **found})
            print(line, flush=True)
            with open(Path(output, "results.jsonl"), "a", encoding="utf-8") as file:
                file.write(line + "\n")


def _start(folder: str, output: str, job: str, seconds: float) -> dict[str, Any]:
    """Runs a job in a process of its own."""
    flags = [os.environ.get("XLA_FLAGS", ""), *job.split(":")[1:]]
    flags.append(f"--xla_gpu_per_fusion_autotune_cache_dir={tempfile.gettempdir()}")
    environment = {**os.environ, "XLA_FLAGS": " ".join(flags), "TF_CPP_MIN_LOG_LEVEL": "2"}
    command = [sys.executable, __file__, folder, output, "job", job]
    try:
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"error": "no time left"}
    if ended.returncode:
        return {"error": ended.stderr[-1500:]}
    return json.loads(ended.stdout.splitlines()[-1])


def run_job(folder: Path, output: Path, job: str) -> dict[str, Any]:
    import jax

    jax.config.update("jax_enable_x64", True)
    name = job.split(":", maxsplit=1)[0]
    if name == "card":
        return card()
    if name == "attention":
        return attention()
    facts = json.loads((folder / f"{name}.json").read_text())
    found = default_job(folder, name, facts) if name.startswith("default") else gpt2_job(folder, output, job, facts)
    statistics_of_device = jax.devices()[0].memory_stats() or {}
    return {**found, "peak_bytes": statistics_of_device.get("peak_bytes_in_use")}


# ---------------------------------------------------------------------------------------------------
# Programs
# ---------------------------------------------------------------------------------------------------


class Program:
    """A lowered program, compiled for the first device."""

    def __init__(self, path: Path) -> None:
        import jax
        from jaxlib import _jax

        started = time.monotonic()
        module = _module(gzip.decompress(path.read_bytes()))
        device = jax.devices()[0]
        options = _jax.CompileOptions()
        self._loaded = device.client.compile_and_load(module, (device,), options)
        self.compile_seconds = time.monotonic() - started

    def __call__(self, *arguments: Any) -> list[Any]:
        results = self._loaded.execute_sharded(list(arguments))
        return [each[0] for each in results.disassemble_into_single_device_arrays()]

    def memory(self) -> dict[str, int]:
        found = self._loaded.get_compiled_memory_stats()
        return {key: getattr(found, f"{key}_size_in_bytes") for key in ("argument", "output", "temp")}

    def text(self) -> str:
        return self._loaded.hlo_modules()[0].to_string()


def _module(serialised: bytes) -> bytes:
    """StableHLO of a serialised HLO module, as `compile_and_load` takes it."""
    from jaxlib import _jax

    try:
        return _jax.mlir.hlo_to_stablehlo(serialised)
    except (AttributeError, TypeError):
        from jaxlib import _hlo

        return _jax.mlir.xla_computation_to_mlir_module(_hlo.XlaComputation(serialised)).encode()


def parameters(path: Path) -> list[tuple[tuple[int, ...], str]]:
    """Shape and dtype of each argument of a program, from its module."""
    from jaxlib import _hlo

    shapes = _hlo.XlaComputation(gzip.decompress(path.read_bytes())).program_shape().parameter_shapes()
    return [(each.dimensions(), str(np.dtype(each.element_type()))) for each in shapes]


def milliseconds(run: Callable[[], Any], count: int = 20, warm_ups: int = 3) -> dict[str, float]:
    """Of a call that waits for its result: the median, the least and the most."""
    times = []
    for _ in range(warm_ups + count):
        started = time.perf_counter()
        _wait(run())
        times.append(1000 * (time.perf_counter() - started))
    times = times[warm_ups:]
    return {"median_ms": statistics.median(times), "least_ms": min(times), "most_ms": max(times)}


def _wait(values: Any) -> None:
    import jax

    jax.block_until_ready(values)


def _same_bits(left: Sequence[Any], right: Sequence[Any]) -> int:
    """How many of the results differ in any bit."""
    pairs = zip(left, right, strict=True)
    return sum(np.asarray(one).tobytes() != np.asarray(other).tobytes() for one, other in pairs)


# ---------------------------------------------------------------------------------------------------
# Jobs
# ---------------------------------------------------------------------------------------------------


def card() -> dict[str, Any]:
    """The machine, and what a large product and a large copy reach on it."""
    import jax
    import jax.numpy as jnp

    device, size = jax.devices()[0], 8192 if jax.default_backend() == "gpu" else 512
    keys = jax.random.split(jax.random.key(0))
    left, right = (jax.random.normal(key, (size, size), jnp.bfloat16) for key in keys)
    product = milliseconds(functools.partial(jax.jit(jnp.matmul), left, right))
    numbers = jnp.ones((size * size * 8,), jnp.float32)
    copy = milliseconds(functools.partial(jax.jit(lambda x: x + 1), numbers))
    return {
        "jax": jax.__version__,
        "device": device.device_kind,
        "platform": device.client.platform_version,
        "bfloat16_teraflops": 2 * size**3 / product["median_ms"] / 1e9,
        "terabytes_per_second": 2 * numbers.nbytes / copy["median_ms"] / 1e9,
        "memory": (device.memory_stats() or {}).get("bytes_limit"),
    }


def default_job(folder: Path, name: str, facts: dict[str, Any]) -> dict[str, Any]:
    """The default job: one micro-batch beside TensorFlow on a CPU, the same bits or not, and its first steps."""
    import jax

    arrays = np.load(folder / facts.get("arrays", f"{name}.npz"))
    microbatch, update = (Program(folder / f"{name}-{part}.hlo.gz") for part in ("microbatch", "update"))
    num_weights, num_state = facts["num_weights"], facts["num_state"]
    rows = [[jax.device_put(arrays[f"{key}/{at}"]) for key in _ROWS] for at in range(len(facts["losses"]))]
    start = [jax.device_put(arrays[f"start/{at}"]) for at in range(num_weights + num_state)]
    later = [jax.device_put(arrays[f"later/{at}"]) for at in range(num_weights)]
    scale = _number(np.float32(1))
    run = functools.partial(microbatch, *later, *rows[LATER], _step(LATER), scale)
    first, second = run(), run()
    sums = np.asarray(first[-1])
    loss, norm = float(sums[0, 0] / sums[1, 0]), _norm(first[:-1])
    values, statistics_of_steps = start, []
    for at, batch in enumerate(rows):
        *gradients, totals = microbatch(*values[:num_weights], *batch, _step(at), scale)
        *values, found = update(*values, *gradients, totals, _step(at), scale)
        statistics_of_steps.append(np.asarray(found)[:2].tolist())
    losses, norms = zip(*statistics_of_steps, strict=True)
    return {
        "compile_seconds": [microbatch.compile_seconds, update.compile_seconds],
        "loss": loss,
        "loss_difference": loss / facts["later_loss"] - 1,
        "norm": norm,
        "norm_difference": norm / facts["later_norm_of_sum"] - 1,
        "results_of_other_bits": _same_bits(first, second),
        "losses_difference": [one / other - 1 for one, other in zip(losses, facts["losses"], strict=True)],
        "norms_difference": [one / other - 1 for one, other in zip(norms, facts["grad_norms"], strict=True)],
        "last_loss": losses[-1],
        "microbatch": milliseconds(run),
        "update": milliseconds(lambda: update(*values, *gradients, totals, _step(0), scale)),
        "num_tokens": facts["num_tokens"],
    }


_ROWS = ("position", "source", "tokens")  # as TensorFlow orders the arguments


def _step(number: int) -> Any:
    return _number(np.int64(number))


def _number(value: Any) -> Any:
    import jax

    return jax.device_put(value)


def _norm(gradients: Sequence[Any]) -> float:
    return math.sqrt(sum(float(np.sum(np.square(np.asarray(each).astype(np.float64)))) for each in gradients))


def gpt2_job(folder: Path, output: Path, job: str, facts: dict[str, Any]) -> dict[str, Any]:
    """GPT-2 small: times, memory, where the time goes; with the update where there is one."""
    import jax.numpy as jnp

    name = job.split(":", maxsplit=1)[0]
    path = folder / f"{name}-microbatch.hlo.gz"
    program, count = Program(path), facts["num_weights"]
    arguments = _drawn(parameters(path), facts["names"])
    run = functools.partial(program, *arguments)
    first = run()
    sums = np.asarray(first[-1])
    found: dict[str, Any] = {"compile_seconds": program.compile_seconds, "loss": float(sums[0, 0] / sums[1, 0])}
    found["norm"] = math.sqrt(sum(float(jnp.sum(jnp.square(each.astype(jnp.float32)))) for each in first[:-1]))
    found["results_of_other_bits"] = _same_bits(first, run())
    found["microbatch"] = milliseconds(run)
    seconds = found["microbatch"]["median_ms"] / 1000
    text = program.text()
    found |= {
        "tokens_per_second": facts["num_tokens"] / seconds,
        "mfu": facts["num_tokens"] * facts["flops_per_token"] / seconds / PEAK,
        "program_bytes": program.memory(),
        "large": large_buffers(text),
        "kernels": kernels(run, text),
    }
    if job in ("gpt2-16", "gpt2-16-chunk-all", "gpt2-16-cudnn-chunk-all", "gpt2-16-parts-chunk-all"):
        (output / f"{name}.txt.gz").write_bytes(gzip.compress(text.encode()))
    of_update = folder / f"{name}-update.hlo.gz"
    if of_update.exists():
        del program
        found["update"] = _update_times(of_update, arguments[:count], first)
    return found


def _update_times(path: Path, weights: Sequence[Any], results: Sequence[Any]) -> dict[str, Any]:
    program, shapes = Program(path), parameters(path)
    state = [abs(each) for each in _drawn(shapes[len(weights) : len(shapes) - len(results) - 2])]
    run = functools.partial(program, *weights, *state, *results, _step(0), _number(np.float32(1)))
    return {**milliseconds(run), "compile_seconds": program.compile_seconds, "program_bytes": program.memory()}


def _drawn(shapes: Sequence[tuple[tuple[int, ...], str]], names: Sequence[str] = ()) -> list[Any]:
    """Arguments of those shapes: weights of deviation 0.02, gains of 1, ids below 50304; step 0 and scale 1.

    Args:
      shapes: with dtypes.
      names: of the first of them.
    """
    import jax
    import jax.numpy as jnp

    values = []
    for index, (shape, dtype) in enumerate(shapes):
        key = jax.random.fold_in(jax.random.key(0), index)
        if dtype == "int32" and len(shape) == 2:
            values.append(jax.random.randint(key, shape, 0, 50304, jnp.int32))
        elif dtype.startswith("int"):
            values.append(jnp.arange(math.prod(shape), dtype=dtype).reshape(shape) % 2)
        elif len(shape) < 2:
            is_bias = index < len(names) and names[index].endswith("bias")
            values.append(jnp.full(shape, 0 if is_bias else 1, dtype))
        else:
            values.append(0.02 * jax.random.normal(key, shape, dtype))
    _wait(values)
    return values


_BYTES = {"f32": 4, "bf16": 2, "s32": 4, "u32": 4, "pred": 1, "f16": 2, "f64": 8, "s64": 8}


def large_buffers(text: str, least: int = 32 << 20) -> dict[str, int]:
    """Shapes of at least so many bytes that instructions outside of fusions write, and how many write each."""
    found: collections.Counter[str] = collections.Counter()
    inside = False
    for line in text.splitlines():
        if re.match(r"(ENTRY )?%?[\w.-]+ \(.*\{$", line):
            inside = re.match(r"%?\S*(fus|triton|wrapped)", line) is not None
        match = re.match(r"\s+(?:ROOT )?%?[\w.-]+ = (.*?) (\w[\w-]*)\(", line)
        if inside or match is None or match[2] in ("parameter", "get-tuple-element", "tuple", "bitcast", "while"):
            continue
        for dtype, dims in re.findall(r"(\w+)\[([\d,]+)\]", match[1]):
            size = _BYTES.get(dtype, 0) * math.prod(map(int, dims.split(",")))
            if size >= least:
                found[f"{match[2]} {dtype}[{dims}]"] += 1
    return dict(found.most_common(40))


def kernels(run: Callable[[], Any], text: str, count: int = 3) -> dict[str, Any]:
    """Milliseconds of a run by the kind of its kernels, those of the longest ones, and how often each ran."""
    import jax

    try:
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                for _ in range(count):
                    _wait(run())
            (path,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
            return _by_kernel(jax.profiler.ProfileData.from_file(path), count, _names_of_kernels(text))
    except Exception as error:
        return {"error": repr(error)[:300]}


def _by_kernel(profile: Any, count: int, names: dict[str, str]) -> dict[str, Any]:
    total: collections.Counter[str] = collections.Counter()
    times: collections.Counter[str] = collections.Counter()
    for plane in profile.planes:
        for line in plane.lines:
            if "/device:GPU" not in plane.name or "Stream" not in line.name:
                continue
            for event in line.events:
                name = names.get(event.name) or re.sub(r"\d+", "#", event.name)[:60]
                total[name] += event.duration_ns / 1e6 / count
                times[name] += 1
    return {
        "all": sum(total.values()),
        "longest": [[name, round(value, 3), times[name] // count] for name, value in total.most_common(30)],
    }


def _names_of_kernels(text: str) -> dict[str, str]:
    """What each fusion computes, by the name of its kernel: the operation of TensorFlow, without numbers of blocks."""
    found = {}
    for name, operation in re.findall(r"%?([\w.-]+) = .* fusion\(.*op_name=\"([^\"]+)\"", text):
        operation = re.sub(r"_\d+(?=/|$)|block_\d+(_\d+)?/", "", operation)
        found[re.sub(r"[.-]", "_", name)] = f"{re.sub(r'[._0-9-]+$', '', name)}: {operation}"[:110]
    return found


def attention() -> dict[str, Any]:
    """Attention alone, forward and backward, of GPT-2 small with 16 rows: in blocks as tfdp has it, and by JAX."""
    import jax
    import jax.numpy as jnp

    rows, length = (16, 1024) if jax.default_backend() == "gpu" else (1, 128)
    keys = jax.random.split(jax.random.key(0), 3)
    given = [jax.random.normal(key, (rows, length, 12, 64), jnp.bfloat16) for key in keys]
    forms: dict[str, Callable[..., Any]] = {"blocks": _in_blocks}
    for name in ("xla", "cudnn"):
        forms[name] = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation=name)
    found: dict[str, Any] = {}
    for name, form in forms.items():

        def loss(*given: Any, form: Any = form) -> Any:
            return jnp.sum(form(*given).astype(jnp.float32) ** 2)

        try:
            run = functools.partial(jax.jit(jax.value_and_grad(loss, (0, 1, 2))), *given)
            found[name] = {"value": float(run()[0]), **milliseconds(run)}
        except Exception as error:
            found[name] = repr(error)[:300]
    return found


def _in_blocks(queries: Any, keys: Any, values: Any) -> Any:
    """The operations of `Kernels.attention`, four blocks of queries; (rows, time, heads, dim)."""
    import jax
    import jax.numpy as jnp

    queries, keys, values = (each.transpose(0, 2, 1, 3) for each in (queries, keys, values))
    length, mixed = queries.shape[2], []
    visible = jnp.tril(jnp.ones((length, length), bool))
    for begin in reversed(range(0, length, length // 4)):
        end = begin + length // 4
        keys, values, visible = keys[:, :, :end], values[:, :, :end], visible[:end, :end]
        scores = jnp.einsum("bhqd,bhkd->bhqk", queries[:, :, begin:end], keys) * 0.125
        weights = jax.nn.softmax(jnp.where(visible[begin:end], scores.astype(jnp.float32), -jnp.inf))
        mixed.append(jnp.einsum("bhqk,bhkd->bhqd", weights.astype(values.dtype), values))
    return jnp.concatenate(mixed[::-1], axis=2).transpose(0, 2, 1, 3)


if __name__ == "__main__":
    main()
