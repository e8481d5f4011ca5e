"""A trained model for lm-eval (EleutherAI's Language Model Evaluation Harness): `python -m tfdp.lm_eval` registers it.

Log-likelihoods, rolling log-likelihoods and generation, as its `hf` model gives them for an export of the same run.
"""

from typing import Any

from lm_eval import utils
from lm_eval.api.model import TemplateLM

from tfdp.data.tokenizers.tokenizer import prompt_ids
from tfdp.inference.language_model import LanguageModel
from tfdp.inference.trained import TrainedModel
from tfdp.system.exits import require

NUM_TOKENS = 256  # to generate, where a task does not say


class TfdpLM(TemplateLM):
    """`--model tfdp --model_args path=DIR,checkpoint=best`.

    Args:
      path: directory of a run, or a folder of Hugging Face, PEFT or KerasHub.
      checkpoint: of a run: best, newest, or a step.
      batch_size: texts that are computed together; "auto" is 16.
      max_batch_size, device: have no effect; lm-eval passes them.
    """

    def __init__(
        self,
        path: str,
        checkpoint: str | int = "best",
        batch_size: int | str = 16,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__()
        is_number = str(batch_size).isdigit() and int(batch_size) > 0
        require(is_number or batch_size == "auto", "batch_size", batch_size, "must be at least 1, or auto")
        self._rows = int(batch_size) if is_number else 16
        self._model = LanguageModel(TrainedModel.open(path, str(checkpoint), "read back"), self._rows)

    @property
    def eot_token_id(self) -> int:
        return self._model.tokenizer.end_of_text

    @property
    def tokenizer_name(self) -> str:
        return self._model.tokenizer.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text; as a prompt begins a document, unless special tokens are refused."""
        tokenizer = self._model.tokenizer
        found = tokenizer.encode(string) if add_special_tokens is False else prompt_ids(tokenizer, string)
        return [int(token) for token in found]

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        found = self._model.likelihoods([(context, continuation) for _, context, continuation in requests])
        return [(each.log_likelihood, each.is_greedy) for each in found]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        windows = []
        for index, request in enumerate(requests):
            pieces = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._model.context_length,
                context_len=1,
            )
            windows += [(index, *utils.make_disjoint_window(piece)) for piece in pieces]
        totals = [0.0] * len(requests)
        found = self._model.likelihoods([window[1:] for window in windows])
        for (index, *_), each in zip(windows, found, strict=True):
            totals[index] += each.log_likelihood
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        texts = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):  # with the same keys, together
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(index)
        for members in groups.values():
            sampling = _sampling(requests[members[0]].args[1])
            members.sort(key=lambda each: len(self.tok_encode(requests[each].args[0])))  # a batch reads as its shortest
            for start in range(0, len(members), self._rows):
                share = members[start : start + self._rows]
                for index, text in zip(
                    share, self._model.generate([requests[each].args[0] for each in share], **sampling), strict=True
                ):
                    texts[index] = text
        return texts


def _sampling(keys: dict[str, Any]) -> dict[str, Any]:
    """The keys of a task as ours: greedy unless it asks for draws."""
    until = keys.get("until") or []
    found = {
        "num_tokens": int(keys.get("max_gen_toks", NUM_TOKENS)),
        "stop": tuple([until] if isinstance(until, str) else until),
        "temperature": float(keys.get("temperature", 0.0)) if keys.get("do_sample", "temperature" in keys) else 0.0,
    }
    return found | {key: keys[key] for key in ("top_k", "top_p") if keys.get(key) is not None}
