"""The texts that a run samples from its own model while it is trained."""

from tfdp.config.sections import SamplingConfig
from tfdp.data.tokenizers.tokenizer import Tokenizer
from tfdp.inference.sampling import CachedModel, Sampler


class Samples:
    """Draws texts of `num_tokens` from the model, and keeps the newest: to draw it again would delay the end.

    Attributes:
      newest: None before the first one.
    """

    newest: str | None = None

    def __init__(self, model: CachedModel, tokenizer: Tokenizer, num_tokens: int) -> None:
        self._sampler, self._config = Sampler(model, tokenizer), SamplingConfig(num_tokens=num_tokens)

    def __call__(self) -> str:
        self.newest = self._sampler.text("", self._config)
        return self.newest
