"""Loads TensorFlow, without its start-up notes and around a bug of its compiler, and Keras on top of it.

Entry points call `load_tensorflow` once they know what to run.
"""

import contextlib
import importlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator

# "I0000 00:00:1795384365.191366    3059 port.cc:153] oneDNN custom operations are on. ..."
_NOTE = re.compile(rb"(I\d{4} \d\d:\d\d:[\d.]+ .*|WARNING: All log messages before absl::InitializeLog.*)\n?")

# XLA's CPU backend gives sums to YNNPACK. Where two threads run one program, both build what runs the sum, and write to
# one vector (EmitYnnSubgraph, TensorFlow 2.21). It crashed about one run in thirty with parallel micro-batches.
_YNN_FLAG = "--xla_cpu_experimental_ynn_fusion_type"


def load_tensorflow(without_ynn: bool = True) -> None:
    """Imports tensorflow and keras; what they write to stderr beyond informational notes is passed on.

    Args:
      without_ynn: whether to keep sums from YNNPACK, unless XLA_FLAGS mentions it.

    TensorFlow 2.21 writes its start-up notes from C++, before it reads any log level, so stderr is a file during the
    import. Later notes obey TF_CPP_MIN_LOG_LEVEL, which a user's own setting overrides.
    """
    if "tensorflow" in sys.modules and "keras" in sys.modules:
        _settle_environment(without_ynn)  # XLA reads its flags when it first compiles
    else:
        with importing(without_ynn):
            importlib.import_module("tensorflow")
            importlib.import_module("keras")
    if (keras := sys.modules["keras"]) is not None:  # a recipe may have imported it first, with its user's settings
        keras.config.set_floatx("float32")
        keras.config.set_epsilon(1e-7)
        keras.config.set_image_data_format("channels_last")


@contextlib.contextmanager
def importing(without_ynn: bool = True) -> Iterator[None]:
    """Wraps imports that load TensorFlow and Keras, or may do so, such as that of a user's recipe.

    Args:
      without_ynn: as `load_tensorflow` has it.
    """
    _settle_environment(without_ynn)
    with _without_notes(), _without_keras_settings():
        yield


def _settle_environment(without_ynn: bool) -> None:
    flags = os.environ.get("XLA_FLAGS", "")
    if without_ynn and _YNN_FLAG not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {_YNN_FLAG}=".strip()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    choose_keras()


def choose_keras() -> None:
    """Sets the backend of Keras for this process and those that it starts, with a note where the user had another."""
    chosen = os.environ.get("KERAS_BACKEND")
    if chosen not in (None, "", "tensorflow"):
        print(f"note: tfdp runs on TensorFlow: KERAS_BACKEND={chosen} is not used", file=sys.stderr, flush=True)
    os.environ["KERAS_BACKEND"] = "tensorflow"


@contextlib.contextmanager
def _without_notes() -> Iterator[None]:
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as written:
        os.dup2(written.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            written.seek(0)
            sys.stderr.write(b"".join(line for line in written if not _NOTE.fullmatch(line)).decode(errors="replace"))


@contextlib.contextmanager
def _without_keras_settings() -> Iterator[None]:
    """Lets Keras start from its own defaults: no KERAS_* but the backend, and an empty home instead of ~/.keras.

    Its settings are another program's: `floatx`, say, changes what every layer computes, and a keras.json that Keras
    does not understand ends its import. It also writes one where there is none.
    """
    settings = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("KERAS_")}
    home = settings.get("KERAS_HOME") or os.path.join(os.path.expanduser("~"), ".keras")
    try:
        with tempfile.TemporaryDirectory() as empty:
            os.environ["KERAS_HOME"] = empty
            yield
    finally:
        del os.environ["KERAS_HOME"]
        os.environ.update(settings)
    if sys.modules.get("keras") is not None:
        # Where Keras keeps what a user's recipe downloads; it reads its home at import only.
        setattr(importlib.import_module("keras.src.backend.config"), "_KERAS_DIR", home)  # noqa: B010
