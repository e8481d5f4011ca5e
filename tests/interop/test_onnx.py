"""A GPT as an ONNX file: the logits that onnxruntime computes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tfdp.config.sections import ModelConfig
from tfdp.models.gpt import GPT

onnxruntime = pytest.importorskip("onnxruntime", reason="needs pip install 'tfdp[peers]'")
pytest.importorskip("tf2onnx", reason="needs pip install 'tfdp[peers]'")

pytestmark = pytest.mark.peers

OF_GPT2 = {"position": "learned", "norm": "layer_norm", "activation": "gelu", "use_bias": True, "qk_norm": False}


@pytest.mark.parametrize(
    "shape",
    [{}, OF_GPT2, {"sliding_window": 5, "num_kv_heads": 1, "layers_without_rope": (1,), "tie_embeddings": True}],
)
def test_onnxruntime_has_the_logits_of_the_model(shape: dict[str, Any], tmp_path: Path) -> None:
    from tfdp.interop.saved_model import write_onnx

    config = ModelConfig(
        **{"num_layers": 2, "num_heads": 2, "model_dim": 32, "context_length": 16, "zero_init": False, **shape}
    )
    model = GPT(config, 96, seed=1)
    write_onnx(tmp_path / "model.onnx", model, 0)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for size in ((1, 1), (2, 7), (3, 16)):
        tokens = np.random.default_rng(0).integers(0, 96, size).astype(np.int32)
        (found,) = session.run(None, {"tokens": tokens})
        np.testing.assert_allclose(found, model(tokens).numpy(), atol=1e-5)
