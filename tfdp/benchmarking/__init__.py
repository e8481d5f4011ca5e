"""What `tfdp.benchmark` measures side by side: this trainer, those its users would pick instead, and the matrix units.

Each system is a module with one function `run(shape, precision, num_replicas, pace)`, which trains steps for as long
as it is asked to; each runs in processes of its own (`python -m tfdp.benchmarking`).
"""

# The systems by name, and the packages that each needs. Those that are measured in both precisions come last: the
# best of the others' variants is found before they take up memory.
SYSTEMS: dict[str, tuple[str, ...]] = {
    "keras_nlp": ("keras_nlp",),
    "pytorch": ("torch", "transformers"),
    "pytorch_ddp": ("torch", "transformers"),
    "tfdp": (),
    "matrix_peak": (),
}


def variants(system: str, num_workers: int, num_replicas: int, gpu: bool) -> tuple[str, ...]:
    """The precisions, compiled or not, in which a system can run a layout; none where it cannot run it at all.

    Over several workers tfdp can send gradients in bfloat16 too ("+wire"), as well as in float32.
    """
    if system == "tfdp":
        return ("float32", "bfloat16", *(("bfloat16+wire",) if num_workers > 1 else ()))
    if system == "pytorch_ddp":
        return ("float32", "bfloat16") if num_workers > 1 and num_replicas == 1 else ()
    if (num_workers, num_replicas) != (1, 1):
        return ()
    if system == "matrix_peak":
        return ("float32", "bfloat16")
    if system == "keras_nlp":
        return ("float32", "float32+jit", "bfloat16", *(("bfloat16+jit",) if gpu else ()))
    return ("float32", "float32+compile", "bfloat16", "bfloat16+compile")
