"""What a config.json means, and what in it is refused."""

import pytest

from tfdp.interop.architectures import model_keys
from tfdp.system.exits import ConfigError

GPT2 = {"model_type": "gpt2", "vocab_size": 9, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 4}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale_attn_weights": False}, "here must have scale_attn_weights true in its config.json, but has false"),
        (
            {"activation_function": "relu"},
            'must have activation_function "gelu_new" in its config.json, but has "relu"',
        ),
        ({"logit_scale": 0}, "whose effect tfdp does not know: logit_scale 0"),
        ({"vocab_size": None}, "here must have vocab_size in its config.json"),
        ({"n_layer": None}, "here must have n_layer in its config.json"),
    ],
)
def test_what_changes_the_model_unseen_is_refused(changes: dict[str, object], message: str) -> None:
    assert model_keys(GPT2, "here")["position"] == "learned"
    with pytest.raises(ConfigError) as caught:
        model_keys({**GPT2, **changes}, "here")
    assert message in str(caught.value)


def test_what_is_off_or_empty_is_no_reason_to_refuse() -> None:
    off = {"add_cross_attention": False, "quantization_config": None, "extra": {}, "others": []}
    assert model_keys({**GPT2, **off}, "here") == model_keys(GPT2, "here")
