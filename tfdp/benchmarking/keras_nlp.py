"""`keras_nlp.models.GPT2CausalLM.fit` with AdamW and a global clip norm, as its users run it on one device."""

from typing import Any

from tfdp.benchmarking.pace import Pace
from tfdp.benchmarking.shapes import Shape, windows
from tfdp.system.startup import load_tensorflow

_SHORT_FLOPS = 1e11  # of a step, below which starting it from Python is worth a thought on a CPU


def run(shape: Shape, variant: str, num_replicas: int, pace: Pace) -> None:
    """Trains steps as they are asked for; never returns."""
    load_tensorflow(without_ynn=False)  # as its users run it
    import keras
    import keras_nlp
    import tensorflow as tf

    dtype, _, compiled = variant.partition("+")
    keras.config.set_dtype_policy("mixed_bfloat16" if dtype == "bfloat16" else "float32")
    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        from tfdp.reporting import hardware

        pace.device_memory = hardware.peak_gpu_memory
        for gpu in gpus:
            tf.config.experimental.set_memory_growth(gpu, True)

    several = 10 if gpus or shape.flops_per_token * shape.num_tokens < _SHORT_FLOPS else 1

    class Follow(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            pace.done(several)  # called once per execution

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
        steps_per_execution=several,
    )

    def split(batch: tf.Tensor) -> tuple[dict[str, tf.Tensor], tf.Tensor]:
        inputs = {"token_ids": batch[:, :-1], "padding_mask": tf.ones_like(batch[:, :-1])}
        return inputs, batch[:, 1:]

    rows = windows(shape)
    dataset = tf.data.Dataset.from_tensor_slices(rows).shuffle(len(rows)).repeat()
    dataset = dataset.batch(shape.num_rows, drop_remainder=True).map(split).prefetch(tf.data.AUTOTUNE)
    model.fit(dataset, steps_per_epoch=1 << 40, epochs=1, verbose=0, callbacks=[Follow()])
