"""A GPT as a SavedModel: graphs and weights that TensorFlow alone runs, without tfdp and without Keras.

It has three signatures, which also are functions of the object that `tf.saved_model.load` returns:

    score(tokens)                                       log-probabilities of each token after the first
    logits(tokens)                                      logits of the token that comes next, at each token
    generate(tokens, num_tokens, temperature, seed)     tokens that continue each row

All rows of a batch have the same length. Nothing here encodes text: ids go in and come out.
"""

import importlib
from pathlib import Path

import tensorflow as tf

from tfdp.models.gpt import GPT, Cache
from tfdp.system.exits import ConfigError, require

_OPSET, _MOST_BYTES = 18, 2 * 10**9  # of ONNX
_TOKENS = tf.TensorSpec([None, None], tf.int32, name="tokens")


def write_saved_model(folder: Path, model: GPT, end_of_text: int, vocab_size: int | None = None) -> None:
    """Writes a SavedModel into a folder.

    Args:
      folder: is made where it does not exist.
      model: computes in its own precision; build it with `fuse=False`, or XLA compiles anew for each length of a row.
      end_of_text: the id after which `generate` adds nothing but itself.
      vocab_size: of the tokenizer: rows beyond it are never drawn. None: there are none.
    """
    graphs = _Graphs(model, end_of_text, vocab_size)
    signatures = {"score": graphs.score, "logits": graphs.logits, "generate": graphs.generate}
    tf.saved_model.save(graphs, str(folder), signatures=signatures)


def write_onnx(path: Path, model: GPT, end_of_text: int) -> None:
    """Writes the signature `logits` as an ONNX file, by tf2onnx: tokens int32 (batch, time) to float32 logits.

    Raises:
      ConfigError: tf2onnx is not installed, or the weights are larger than one such file can be.
    """
    try:
        convert = importlib.import_module("tf2onnx.convert")
    except ImportError as error:
        raise ConfigError(f"format (onnx) needs tf2onnx: pip install tf2onnx onnx ({error})") from None
    size = 4 * model.num_params()
    require(size < _MOST_BYTES, "format", "onnx", f"is for weights of at most 2 GB in one file, and has {size:,} bytes")
    graphs = _Graphs(model, end_of_text)
    convert.from_function(graphs.logits, input_signature=[_TOKENS], opset=_OPSET, output_path=str(path))


class _Graphs(tf.Module):
    """What is saved: the functions, and the variables that they read, each once.

    All functions call one graph of the whole model, so that its constants are stored once too. The model itself is no
    attribute: TensorFlow would save Keras's objects with it.
    """

    def __init__(self, model: GPT, end_of_text: int, vocab_size: int | None = None) -> None:
        super().__init__()
        self._vocab_size = vocab_size or model.vocab_size
        self._config, self._dtype, self._end_of_text = model.config, model.compute_dtype, end_of_text
        self.weights = [each.value for each in (model.named_weights() | model.named_frozen_weights()).values()]
        slots = tf.TensorSpec([None, model.config.kv_heads, None, model.config.dim_per_head], model.compute_dtype)
        whole, fraction = tf.TensorSpec([], tf.int32), tf.TensorSpec([], tf.float32)
        specs = [_TOKENS, [(slots, slots)] * model.config.num_layers, whole]
        self._extend = tf.function(model.extend, specs, autograph=False)
        self.logits = tf.function(self._logits, [_TOKENS], autograph=False)
        self.score = tf.function(self._score, [_TOKENS], autograph=False)
        self.generate = tf.function(self._generate, [_TOKENS, whole, fraction, whole], autograph=False)

    def _empty_cache(self, tokens: tf.Tensor, length: tf.Tensor) -> Cache:
        shape = [tf.shape(tokens)[0], self._config.kv_heads, length, self._config.dim_per_head]
        return [(tf.zeros(shape, self._dtype), tf.zeros(shape, self._dtype)) for _ in range(self._config.num_layers)]

    def _logits(self, tokens: tf.Tensor) -> dict[str, tf.Tensor]:
        time = tf.shape(tokens)[1]
        with tf.control_dependencies(_checks(time, self._config.context_length)):
            found, _ = self._extend(tokens, self._empty_cache(tokens, time), 0)
        return {"logits": found}

    def _score(self, tokens: tf.Tensor) -> dict[str, tf.Tensor]:
        found = tf.nn.log_softmax(self._logits(tokens)["logits"][:, :-1])
        return {"log_probabilities": tf.gather(found, tokens[:, 1:], batch_dims=2)}

    def _generate(
        self, tokens: tf.Tensor, num_tokens: tf.Tensor, temperature: tf.Tensor, seed: tf.Tensor
    ) -> dict[str, tf.Tensor]:
        time, end_of_text = tf.shape(tokens)[1], self._end_of_text
        checks = [
            tf.debugging.assert_positive(num_tokens, "num_tokens must be at least 1"),
            tf.debugging.assert_non_negative(temperature, "temperature must not be negative"),
        ]
        with tf.control_dependencies([*_checks(time + num_tokens, self._config.context_length), *checks]):
            cache = self._empty_cache(tokens, time + num_tokens)
        found, cache = self._extend(tokens, cache, 0)
        first = _draw(found[:, -1, : self._vocab_size], temperature, seed, 0)
        is_first = tf.range(num_tokens) == 0  # what is not drawn yet, or never, is end of text
        written = tf.where(is_first, first[:, tf.newaxis], end_of_text)

        def goes_on(step: tf.Tensor, written: tf.Tensor, cache: Cache) -> tf.Tensor:
            return (step < num_tokens) & tf.reduce_any(written[:, step - 1] != end_of_text)

        def add_token(step: tf.Tensor, written: tf.Tensor, cache: Cache) -> tuple[tf.Tensor, tf.Tensor, Cache]:
            last = written[:, step - 1]
            found, cache = self._extend(last[:, tf.newaxis], cache, time + step - 1)
            own = _draw(found[:, -1, : self._vocab_size], temperature, seed, step)
            drawn = tf.where(last == end_of_text, end_of_text, own)
            is_now = tf.range(num_tokens) == step
            return step + 1, tf.where(is_now, drawn[:, tf.newaxis], written), cache

        return {"tokens": tf.while_loop(goes_on, add_token, (1, written, cache))[1]}


def _checks(length: tf.Tensor, context_length: int) -> list[tf.Operation]:
    """Refuse what the model has no positions for: look-ups beyond a table give zeros on some devices, not an error."""
    rule = f"must be at most the context length, {context_length}"
    return [
        tf.debugging.assert_positive(length, "tokens must have at least one column"),
        tf.debugging.assert_less_equal(length, context_length, f"the tokens given and those to generate {rule}"),
    ]


def _draw(logits: tf.Tensor, temperature: tf.Tensor, seed: tf.Tensor, step: tf.Tensor | int) -> tf.Tensor:
    """A token for each row (batch, vocab_size); at temperature 0 the most likely. The same seed draws the same."""
    likeliest = tf.argmax(logits, axis=-1, output_type=tf.int32)
    scaled = logits / tf.where(temperature > 0, temperature, 1.0)
    drawn = tf.random.stateless_categorical(scaled, 1, tf.stack([seed, step]), tf.int32)[:, 0]
    return tf.where(temperature > 0, drawn, likeliest)
