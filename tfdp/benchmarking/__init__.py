"""What `tfdp.benchmark` compares: this trainer, those its users would pick instead, and the matrix units.

Each system is a module with one function `run(shape, variant, num_replicas, pace)`, which trains steps for as long
as it is asked to; each runs in processes of its own (`python -m tfdp.benchmarking`).
"""

# The systems by name, and the packages that each needs. tfdp and the matrix units have one variant for each row of
# the table; they come last, so that the search for the best variant of the others runs without them in memory.
SYSTEMS: dict[str, tuple[str, ...]] = {
    "keras_nlp": ("keras_nlp",),
    "pytorch": ("torch", "transformers"),
    "pytorch_ddp": ("torch", "transformers"),
    "tfdp": (),
    "matrix_peak": (),
}
PRECISIONS = ("float32", "bfloat16")


def contests(system: str, precision: str, num_workers: int, num_replicas: int) -> list[tuple[str, ...]]:
    """The rows that a system has in a precision and layout: for each the variants, of which the fastest counts.

    A variant is a precision with what else is chosen: `+jit` and `+compile` compile the step, `+wire` sends gradients
    of bfloat16 in bfloat16. Several replicas in one process are for tfdp alone.
    """
    one = (num_workers, num_replicas) == (1, 1)
    if system == "tfdp":
        wire = num_workers > 1 and precision == "bfloat16"
        return [(precision,), *([("bfloat16+wire",)] if wire else [])]
    if system == "matrix_peak":
        return [(precision,)] if one else []
    if system == "keras_nlp":
        return [(precision, f"{precision}+jit")] if one else []
    found = (precision, f"{precision}+compile")
    if system == "pytorch":
        return [found] if one else []
    if num_workers == 1 or num_replicas > 1:
        return []
    return [found, *([("bfloat16+wire", "bfloat16+compile+wire")] if precision == "bfloat16" else [])]
