"""`keras_nlp.models.GPT2CausalLM.fit` with AdamW and a global clip norm, as its users run it on one device."""

from typing import Any

from tfdp.benchmarking.pace import Pace
from tfdp.benchmarking.shapes import Shape, shuffled_windows
from tfdp.system.startup import load_tensorflow


def run(shape: Shape, precision: str, num_replicas: int, pace: Pace) -> None:
    """Trains steps as they are asked for; never returns."""
    load_tensorflow(without_ynn=False)  # as its users run it
    import keras
    import keras_nlp
    import tensorflow as tf

    dtype, _, compiled = precision.partition("+")
    keras.config.set_dtype_policy("mixed_bfloat16" if dtype == "bfloat16" else "float32")
    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        from tfdp.reporting import hardware

        pace.device_memory = hardware.peak_gpu_memory
        for gpu in gpus:
            tf.config.experimental.set_memory_growth(gpu, True)

    class Follow(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            pace.done(1)

    backbone = keras_nlp.models.GPT2Backbone(
        vocabulary_size=shape.vocab_size,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        hidden_dim=shape.model_dim,
        intermediate_dim=4 * shape.model_dim,
        dropout=0.0,
        max_sequence_length=shape.context_length,
    )
    model = keras_nlp.models.GPT2CausalLM(backbone, preprocessor=None)
    model.compile(
        optimizer=keras.optimizers.AdamW(3e-4, weight_decay=0.1, global_clipnorm=1.0),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=compiled == "jit",
    )

    def split(windows: tf.Tensor) -> tuple[dict[str, tf.Tensor], tf.Tensor]:
        inputs = {"token_ids": windows[:, :-1], "padding_mask": tf.ones_like(windows[:, :-1])}
        return inputs, windows[:, 1:]

    signature = tf.TensorSpec([shape.context_length + 1], tf.int32)
    dataset = tf.data.Dataset.from_generator(lambda: shuffled_windows(shape), output_signature=signature)
    dataset = dataset.batch(shape.num_rows, drop_remainder=True).map(split).prefetch(tf.data.AUTOTUNE)
    model.fit(dataset, steps_per_epoch=1 << 40, epochs=1, verbose=0, callbacks=[Follow()])
