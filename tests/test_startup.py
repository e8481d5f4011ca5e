"""TensorFlow as tfdp loads it."""

import tensorflow as tf


def test_xla_hands_no_sums_to_a_library_that_two_threads_must_not_enter() -> None:
    x = tf.random.stateless_normal([256, 384], seed=[1, 2])

    @tf.function(jit_compile=True, autograph=False)
    def sums(x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return tf.reduce_sum(x, axis=-1), tf.nn.softmax(x)

    program = sums.experimental_get_compiler_ir(x)(stage="optimized_hlo")
    assert "reduce" in program
    assert "ynn" not in program
