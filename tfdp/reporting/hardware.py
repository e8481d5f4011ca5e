"""The peak speed of the devices, and the memory in use."""

import resource
import time
from collections.abc import Callable
from functools import partial

import tensorflow as tf

from tfdp.system.machine import find_gpu


def matrix_peak(precision: str, gpu_names: list[str], num_workers: int = 1, num_parallel: int = 1) -> float:
    """Peak FLOP/s of matrix products: that of the data sheet for known GPUs, all of them together; else measured on
    this
    worker, times the GPUs or workers. On CPUs `num_parallel` products run at the same time."""
    gpu = find_gpu(gpu_names[0]) if gpu_names else None
    if gpu is not None:
        return gpu.matrix_peak(precision) * len(gpu_names)
    return _measured_matrix_peak(precision, num_parallel) * (len(gpu_names) or num_workers)


def _measured_matrix_peak(precision: str, num_parallel: int, size: int = 1024, num_runs: int = 6) -> float:
    """Best of several square products on the first device, plain and under XLA; a few tenths of a second."""
    products = square_products(precision, size, num_parallel)
    return num_parallel * 2 * size**3 / min(_seconds(product) for product in products for _ in range(num_runs))


def square_products(precision: str, size: int, num_parallel: int = 1) -> list[Callable[[], object]]:
    """Functions that multiply (size, size) matrices and wait for it: plain, and under XLA; both are traced."""
    normal = [tf.random.stateless_normal([size, size], seed=(0, index)) for index in range(num_parallel)]
    matrices = [tf.cast(each, tf.as_dtype(precision)) for each in normal]
    products: list[Callable[[], object]] = []
    for jit_compile in (False, True):
        product = tf.function(
            lambda matrix: tf.reduce_sum(tf.matmul(matrix, matrix)[:1]), jit_compile=jit_compile, autograph=False
        )
        product = tf.function(partial(_sum_over, product, matrices), autograph=False)
        products.append(partial(_value, product))
        products[-1]()
    return products


def peak_memory() -> int:
    """Most bytes that this process has held at once: of its GPUs' memory, or of the machine's where it has no GPU."""
    if tf.config.list_logical_devices("GPU"):
        return peak_gpu_memory()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_gpu_memory() -> int:
    """Most bytes that this process has held at once, over its GPUs."""
    gpus = tf.config.list_logical_devices("GPU")
    return sum(tf.config.experimental.get_memory_info(gpu.name.removeprefix("/device:"))["peak"] for gpu in gpus)


def _sum_over(product: Callable[[tf.Tensor], tf.Tensor], matrices: list[tf.Tensor]) -> tf.Tensor:
    return tf.add_n([product(matrix) for matrix in matrices])


def _value(product: Callable[[], tf.Tensor]) -> float:
    return float(product())


def _seconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started
