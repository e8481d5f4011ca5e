"""TensorFlow and Keras as tfdp loads them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tensorflow as tf

ROOT = Path(__file__).parents[2]

# As a command does: the environment is settled first, then perhaps a recipe imports Keras, then TensorFlow is loaded.
PROGRAM = """
import os, sys
from tfdp.system.exits import run_command
def main():
    if "first" in sys.argv:
        import keras
    from tfdp.system.startup import load_tensorflow
    load_tensorflow()
    import keras
    layer = keras.layers.Dense(2)
    layer.build([None, 3])
    settings = [keras.config.backend(), keras.config.floatx(), keras.config.epsilon(), keras.config.image_data_format()]
    print(*settings, layer.kernel.dtype, os.environ["KERAS_BACKEND"], keras.src.backend.config.keras_home())
sys.exit(run_command(main))
"""


def settings_of_keras(home: Path, *arguments: str, **settings: str) -> tuple[str, subprocess.CompletedProcess[str]]:
    """What Keras computes with, in a process of its own with a home and an environment."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("KERAS_")}
    environment |= {"PYTHONPATH": str(ROOT), "HOME": str(home), **settings}
    command = [sys.executable, "-c", PROGRAM, *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    return result.stdout.strip(), result


def test_keras_runs_on_tensorflow_whatever_the_environment_says(tmp_path: Path) -> None:
    settings = {"KERAS_BACKEND": "jax", "KERAS_MAX_EPOCHS": "many", "KERAS_NNX_ENABLED": "1"}
    found, result = settings_of_keras(tmp_path, **settings)
    assert result.returncode == 0, result.stderr
    assert found == f"tensorflow float32 1e-07 channels_last float32 tensorflow {tmp_path}/.keras"
    assert result.stderr == "note: tfdp runs on TensorFlow: KERAS_BACKEND=jax is not used\n"
    assert list(tmp_path.iterdir()) == [], "the home of its user stays as it is"


@pytest.mark.parametrize(
    ("content", "arguments"),
    [
        ('{"backend": "torch", "floatx": "float64", "epsilon": 1, "image_data_format": "none"}', []),
        ('{"floatx": "float16", "epsilon": 0.5, "image_data_format": "channels_first"}', ["first"]),
    ],
)
def test_keras_json_changes_nothing(tmp_path: Path, content: str, arguments: list[str]) -> None:
    home = tmp_path / ".keras"
    home.mkdir()
    (home / "keras.json").write_text(content)
    found, result = settings_of_keras(tmp_path, *arguments)
    assert result.returncode == 0, result.stderr
    assert found == f"tensorflow float32 1e-07 channels_last float32 tensorflow {home}"
    assert json.loads((home / "keras.json").read_text()) == json.loads(content)


def test_xla_hands_no_sums_to_a_library_that_two_threads_must_not_enter() -> None:
    x = tf.random.stateless_normal([256, 384], seed=[1, 2])

    @tf.function(jit_compile=True, autograph=False)
    def sums(x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return tf.reduce_sum(x, axis=-1), tf.nn.softmax(x)

    program = sums.experimental_get_compiler_ir(x)(stage="optimized_hlo")
    assert "reduce" in program
    assert "ynn" not in program
