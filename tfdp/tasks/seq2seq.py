"""Sequence to sequence: what follows an input, which may see itself whole (Raffel et al. 2020: prefix LM)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from tfdp.ops.visibility import ByDocument
from tfdp.tasks.answers import read_examples
from tfdp.tasks.causal_lm import perplexity
from tfdp.tasks.task import Batch, Metric, Output, Rows
from tfdp.tasks.text_scores import LOWEST_IS_BEST, score, signature

_NUM_SHOWN = 12  # outputs
_MARKS = frozenset("\\`*_{}[]()#+-!|<>&~")  # that Markdown or HTML would read


@dataclass(frozen=True)
class Seq2Seq:
    """The target of each example, from its input.

    Attributes:
      names: of the scores of outputs, see `text_scores`; checkpoints are compared by the first, or by the loss.
      sees_whole: whether the tokens of an input see all of it, or those before them alone.
      decoding: how outputs are written, a `DecodingConfig`; None: none are.
    """

    names: Sequence[str]
    sees_whole: bool = True
    decoding: Any = None

    @property
    def best(self) -> str:
        return self.names[0] if self.names else "loss"

    @property
    def best_is_lowest(self) -> bool:
        return self.best == "loss" or self.best in LOWEST_IS_BEST

    @property
    def facts(self) -> dict[str, str]:
        """What has to stand beside the scores."""
        found = {f"signature/{name}": signature(name) for name in self.names}
        how = {} if self.decoding is None else {"decoding": str(self.decoding.describe())}
        return {**how, **{name: each for name, each in found.items() if each is not None}}

    def batch(self, rows: Rows) -> Batch:
        examples = read_examples(rows["tokens"])
        attention = ByDocument(examples.starts, examples.is_prompt if self.sees_whole else None)
        return Batch(examples.inputs, tf.where(examples.is_learned, examples.labels, -1), attention)

    def metrics(self, totals: Mapping[str, Any]) -> dict[str, Metric]:
        loss = totals["loss"] / totals["targets"] if totals["targets"] else math.nan
        found = {
            "loss": Metric(loss, f"loss {loss:.4f}"),
            "perplexity": Metric(perplexity(loss), f"perplexity {perplexity(loss):.2f}", is_recorded=False),
        }
        if "outputs" in totals:
            outputs: Sequence[Output] = totals["outputs"]
            references, hypotheses = [each.reference for each in outputs], [each.hypothesis for each in outputs]
            for name in self.names:
                value, digits = score(name, hypotheses, references), 2 if name in ("bleu", "chrf") else 4
                found[name] = Metric(value, f"{name} {value:.{digits}f}")
            unfinished = sum(not each.has_ended for each in outputs) / max(1, len(outputs))
            found["unfinished"] = Metric(unfinished, f"{unfinished:.1%} unfinished" if unfinished else "")
            found["num_outputs"] = Metric(len(outputs), "")
        return found

    def exhibits(self, totals: Mapping[str, Any]) -> dict[str, str]:
        """A table of some outputs."""
        outputs: Sequence[Output] = totals.get("outputs", ())
        num = min(len(outputs), _NUM_SHOWN)
        chosen = [outputs[index * len(outputs) // num] for index in range(num)]
        lines = ["| input | reference | output |", "|---|---|---|"]
        lines += [f"| {_cell(each.prompt)} | {_cell(each.reference)} | {_cell(each.hypothesis)} |" for each in chosen]
        return {"outputs": "\n".join(lines)} if chosen else {}


def _cell(text: str) -> str:
    """A text as a cell of a Markdown table, in which no character means anything."""
    escaped = "".join(f"&#{ord(each)};" if each in _MARKS else each for each in text)
    return escaped.replace("\r", "").replace("\n", "<br>")
