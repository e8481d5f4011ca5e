"""Nothing but matrix products: what the units give at best, which MFU is a fraction of.

A step is one product of square matrices; its time is told as that of a step of the shape with as many operations.
"""

import time
from collections.abc import Callable

from tfdp.benchmarking.pace import Pace
from tfdp.benchmarking.shapes import Shape
from tfdp.system.startup import load_tensorflow


def run(shape: Shape, precision: str, num_replicas: int, pace: Pace) -> None:
    """Multiplies as often as is asked for; never returns."""
    load_tensorflow()
    import tensorflow as tf

    from tfdp.reporting import hardware

    size = 8192 if tf.config.list_physical_devices("GPU") else 2048
    products = hardware.square_products(precision, size)
    best = min(products, key=lambda product: min(_seconds(product) for _ in range(5)))
    pace.flops_of_step = 2 * size**3
    while True:
        best()
        pace.done(1)


def _seconds(product: Callable[[], object]) -> float:
    started = time.perf_counter()
    product()
    return time.perf_counter() - started
