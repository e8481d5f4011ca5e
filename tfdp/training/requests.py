"""Requests to end the steps that run, which any thread makes and all workers learn of in a reduction."""

import tensorflow as tf

from tfdp.config.sections import MOST_DEVICES

# What a replica whose worker wants something adds to the sum of the requests: 1 to stop, this to end the run. So many
# replicas of one worker stay below 1, and the one number that is summed tells both.
_END_REQUEST = 0.5 / MOST_DEVICES


class Requests:
    """What this worker asks for; make it under the strategy or outside.

    A sum over all replicas of 1 or more asks to stop; one between 0 and 1 to end the run.
    """

    def __init__(self) -> None:
        self._requested = tf.Variable(0.0, trainable=False, name="stop_requested")

    def value(self) -> tf.Tensor:
        """The term of a replica, inside the graph of a step."""
        return self._requested.read_value()

    def stop(self) -> None:
        self._requested.assign(1.0)

    def end(self) -> None:
        self._requested.assign_add(_END_REQUEST)
