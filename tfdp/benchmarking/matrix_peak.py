"""Nothing but matrix products: the most that the units give, which MFU is a fraction of.

A step is a product of each of a few shapes, those that were fastest at the start. The best product of all counts, over
all rounds: a peak that a training step could beat would be none.
"""

import time
from collections.abc import Callable
from typing import Any

from tfdp.benchmarking.pace import Pace
from tfdp.benchmarking.shapes import Shape
from tfdp.system.startup import load_tensorflow

_NUM_KEPT = 3


def run(shape: Shape, variant: str, num_replicas: int, pace: Pace) -> None:
    """Multiplies as often as is asked for; never returns."""
    load_tensorflow()
    import tensorflow as tf

    squares = (1024, 2048, 8192 if tf.config.list_physical_devices("GPU") else 4096)
    sizes = [(size, size, size) for size in squares]
    sizes.append((shape.num_tokens, shape.model_dim, 4 * shape.model_dim))  # the widest product of a layer
    products = [_product(tf, variant, size, compiled) for size in sizes for compiled in (False, True)]
    kept = sorted(products, key=lambda rate: max(rate() for _ in range(3)))[-_NUM_KEPT:]
    while True:
        pace.flops_per_second = max(pace.flops_per_second, *(rate() for rate in kept))
        pace.done(1)


def _product(tf: Any, dtype: str, size: tuple[int, int, int], compiled: bool) -> Callable[[], float]:
    """A function that multiplies two matrices, waits for it, and returns the FLOP/s; traced already."""
    rows, inner, columns = size
    left, right = (
        tf.cast(tf.random.stateless_normal(matrix, seed=(0, index)), dtype)
        for index, matrix in enumerate([(rows, inner), (inner, columns)])
    )
    multiply = tf.function(lambda a, b: tf.matmul(a, b), jit_compile=compiled, autograph=False)

    def rate() -> float:
        started = time.perf_counter()
        multiply(left, right)[0, 0].numpy()
        return 2 * rows * inner * columns / (time.perf_counter() - started)

    rate()
    return rate
