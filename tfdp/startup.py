"""Loads TensorFlow without its notes about itself, and without a fault of its compiler.

Entry points call this once they know what to run.
"""

import importlib
import os
import re
import sys
import tempfile

# "I0000 00:00:1795384365.191366    3059 port.cc:153] oneDNN custom operations are on. ..."
_NOTE = re.compile(rb"(I\d{4} \d\d:\d\d:[\d.]+ .*|WARNING: All log messages before absl::InitializeLog.*)\n?")

# XLA's CPU backend hands sums to YNNPACK, and makes what runs them anew while another thread does the same: both write
# to one vector (EmitYnnSubgraph, TensorFlow 2.21). Micro-batches side by side died of it, about one run in thirty.
_YNN_FLAG = "--xla_cpu_experimental_ynn_fusion_type"


def load_tensorflow(without_ynn: bool = True) -> None:
    """Imports tensorflow and keras; what they write to stderr beyond informational notes is passed on.

    Args:
      without_ynn: whether to take sums away from YNNPACK, unless XLA_FLAGS says something of it.

    TensorFlow 2.21 writes the notes of its start from C++, before any log level is read, so for the time of
    the import stderr is a file. Later notes obey TF_CPP_MIN_LOG_LEVEL, which a user's own setting overrides.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if without_ynn and _YNN_FLAG not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {_YNN_FLAG}=".strip()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if "tensorflow" in sys.modules:
        return
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as written:
        os.dup2(written.fileno(), 2)
        try:
            importlib.import_module("tensorflow")
            importlib.import_module("keras")
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            written.seek(0)
            sys.stderr.write(b"".join(line for line in written if not _NOTE.fullmatch(line)).decode(errors="replace"))
