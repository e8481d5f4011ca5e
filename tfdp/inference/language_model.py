"""A trained model for programs: text, logits and scores from a run, or from a folder of another library."""

import functools
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from tfdp.data.chat import ChatTemplate, chat_template
from tfdp.data.tokenizers.tokenizer import Tokenizer
from tfdp.inference.conversation import Conversation
from tfdp.inference.exporting import ExportConfig, export
from tfdp.inference.keys import sampling_of, typed
from tfdp.inference.trained import TrainedModel
from tfdp.system.exits import require
from tfdp.system.startup import load_tensorflow

if TYPE_CHECKING:
    from tfdp.config.sections import SamplingConfig
    from tfdp.inference.sampling import Sampler
    from tfdp.inference.scoring import Likelihood, Scorer


class LanguageModel:
    """A model and its tokenizer; `tfdp.load` makes one. Its weights are read once, at the first use.

    Args:
      trained: what was read back.
      rows: texts that are scored in one forward pass.

    Attributes:
      tokenizer: `encode` and `decode`.
      context_length: the most tokens that a prediction looks back on.
      step: of the checkpoint; 0 for a folder of another library.
    """

    def __init__(self, trained: TrainedModel, rows: int = 16) -> None:
        self._trained, self._rows = trained, rows
        self.tokenizer: Tokenizer = trained.tokenizer
        self.context_length: int = trained.config.model.context_length
        self.step = trained.step

    @overload
    def generate(self, prompts: str, **sampling: Any) -> str: ...

    @overload
    def generate(self, prompts: Sequence[str], **sampling: Any) -> list[str]: ...

    def generate(self, prompts: str | Sequence[str], **sampling: Any) -> str | list[str]:
        """The continuation of a prompt, without the prompt; or of several prompts, computed as one batch.

        Args:
          prompts: text; an empty one begins a document.
          **sampling: the keys of `SamplingConfig`: num_tokens, temperature, top_k, top_p, stop, seed.

        Raises:
          ConfigError: a value that breaks the rule of its key.
        """
        config = sampling_of(sampling)
        if isinstance(prompts, str):
            return self._sampler.text(prompts, config)
        return self._sampler.texts(prompts, config) if len(prompts) else []

    def stream(self, prompt: str, **sampling: Any) -> Iterator[str]:
        """The pieces of what `generate` returns, as they come."""
        return self._sampler.stream(prompt, sampling_of(sampling))

    def chat(self, system: str | None = None, template: str = "auto") -> Conversation:
        """A conversation with the model: `say` and `stream` give its answers.

        Args:
          system: a system prompt, which stands before all turns; None: none.
          template: how messages become a text: chatml, tokenizer, or a text for each role in JSON. "auto": the one that
            the run was trained with, or its shards were made with; for a folder that of its tokenizer, else chatml.

        Raises:
          ConfigError: there is no such template, it refuses the system prompt, or the run learned pairs or has several.
        """

        def continued(ids: Sequence[int], config: "SamplingConfig", ends: Collection[int]) -> Iterator[str]:
            return self._sampler.stream_after(ids, config, ends)

        found, is_run = self._chat_template(template), self._trained.is_run
        made = Conversation(continued, self.tokenizer, found, self.context_length, is_run, system)
        _ = self._sampler  # reads the weights now: what is wrong with them is no mistake of a turn
        return made

    def _chat_template(self, name: str) -> ChatTemplate:
        if name == "auto" and self._trained.is_run:
            ways = self._trained.example_keys
            are_pairs = [each.answer is not None for each in ways]
            rule = "must be named for a run that learned no conversations, but pairs: try chatml, or tfdp.generate"
            require(not ways or not all(are_pairs), "template", name, rule)
            found = [chat_template(each.template, self.tokenizer, "template") for each in ways if each.answer is None]
            is_one = not any(are_pairs) and len({each.fingerprint for each in found}) < 2
            require(is_one, "template", name, "must be named for a run whose shards have several: try chatml")
            name = ways[0].template if ways else name
        return chat_template(name, self.tokenizer, "template")

    def logits(self, ids: Sequence[int] | Sequence[Sequence[int]] | np.ndarray) -> np.ndarray:
        """Logits of the token after each id.

        Args:
          ids: (time,), or (rows, time); time at most context_length.

        Returns:
          float32, (time, vocab_size) or (rows, time, vocab_size).
        """
        try:
            tokens = np.asarray(ids)
        except ValueError:
            tokens = np.zeros(())  # rows of several lengths
        require(tokens.dtype.kind in "iu" or not tokens.size, "ids", tokens.dtype.name, "must be whole numbers")
        tokens = tokens.astype(np.int32)
        is_plain = tokens.ndim in (1, 2) and 1 <= tokens.shape[-1] <= self.context_length
        require(is_plain, "ids", list(tokens.shape), f"must be of shape (time,) or (rows, time {self.context_length})")
        vocab_size = self.tokenizer.vocab_size
        is_known = bool(((tokens >= 0) & (tokens < vocab_size)).all())
        require(is_known, "ids", int(tokens.max()), f"must hold ids from 0 to {vocab_size - 1}")
        found = self._scorer.logits(tokens.reshape(-1, tokens.shape[-1]))
        return found[0] if tokens.ndim == 1 else found

    def score(self, texts: Sequence[str]) -> "list[Likelihood]":
        """How likely each text is as a document of its own: its log-likelihood in nats, and its number of tokens."""
        start = [self.tokenizer.end_of_text]
        return self._scorer.likelihoods([(start, self.tokenizer.encode(text).tolist()) for text in texts])

    def likelihoods(self, requests: Sequence[tuple[Sequence[int], Sequence[int]]]) -> "list[Likelihood]":
        """How likely token ids are after others, which are one at least: see `Scorer.likelihoods`."""
        return self._scorer.likelihoods(requests)

    def export(self, output: str, **keys: Any) -> None:
        """Writes the model for another library.

        Args:
          output: a new folder.
          **keys: the keys of `ExportConfig`: format, dtype, merge, file_megabytes.
        """
        export(self._trained, typed(ExportConfig, {"output": output, **keys}), "tfdp.load(...).export(...)")

    @functools.cached_property
    def _model(self) -> Any:
        load_tensorflow()
        return self._trained.make_model()

    @functools.cached_property
    def _sampler(self) -> "Sampler":
        model = self._model  # loads TensorFlow
        from tfdp.inference.sampling import Sampler

        return Sampler(model, self.tokenizer)

    @functools.cached_property
    def _scorer(self) -> "Scorer":
        whole = getattr(self._trained.config.model, "prompt_attention", "causal") != "causal"
        rule = "must be causal for logits and scores of texts; generate and tfdp.predict work with this model"
        require(not whole, "model.prompt_attention", "whole", rule)
        model = self._model
        from tfdp.inference.scoring import Scorer

        return Scorer(model, self.tokenizer.vocab_size, self._rows)
