"""Reading the time inside a graph, between the parts of a step."""

import tensorflow as tf

from tfdp.parallel import collectives

PHASES = ("input", "forward_backward", "reduction", "optimizer")  # of a step's time


def clock(*tensors: tf.Tensor) -> tf.Tensor:
    """The time in seconds since the epoch, float64, at which the tensors are ready; inside a graph.

    It adds up one number of each, because TensorFlow drops a control dependency when it inlines a function; and a GPU
    runs behind the host, so fetching the sum waits for the work.

    Only the first replica of a process has a clock, the others get 0 at once: TensorFlow runs all clock readings of a
    graph one after the other, in the order of its replicas, and would make the replicas wait for one another.
    """
    if collectives.is_first_replica():
        one_of_each = [tf.cast(tf.reshape(tensor, [-1])[0], tf.float32) for tensor in tensors]
        with tf.device("CPU:0"), tf.control_dependencies([tf.reduce_sum(tf.stack(one_of_each))]):
            return tf.timestamp()
    return tf.zeros([], tf.float64)


def after(clock: tf.Tensor, value: tf.Tensor) -> tf.Tensor:
    """The value, once the clock has been read: what comes next does not overtake it."""
    with tf.control_dependencies([clock]):
        return tf.identity(value)
