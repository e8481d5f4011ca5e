"""How near texts are to what they should be: scores of the libraries that their fields use, by name.

- bleu, chrf: 0 to 100, of the corpus (Papineni et al. 2002; Popović 2015), by sacrebleu (Post 2018).
- rouge1, rouge2, rougeL: 0 to 1, the mean F-measure of the examples (Lin 2004), by rouge-score with its stemmer; its
  words are those of all scripts, not those of the letters a to z alone.
- exact_match: 0 to 1, the share of outputs that equal their reference, apart from space around them.
- squad_exact_match, squad_f1: the same, and the mean F1 of words, as SQuAD normalises them (Rajpurkar et al. 2016).
- wer: the word error rate of the corpus, 0 and more, by jiwer; lower is better.
"""

import functools
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

Texts = Sequence[str]
Score = Callable[[Texts, Texts], float]  # (hypotheses, references), one at least


def score(name: str, hypotheses: Texts, references: Texts) -> float:
    """The score of some outputs; NaN where there are none."""
    return SCORES[name](hypotheses, references) if len(hypotheses) else math.nan


def signature(name: str) -> str | None:
    """What sacrebleu asks to report beside a score; None for a score of another library."""
    if name not in ("bleu", "chrf"):
        return None
    metric = _sacrebleu(name)
    metric.corpus_score(["a"], [["a"]])  # the number of references is part of it
    return str(metric.get_signature())


def _sacrebleu(name: str):  # type: ignore[no-untyped-def]  # the library has no types
    from sacrebleu.metrics import BLEU, CHRF

    return BLEU() if name == "bleu" else CHRF()


def _of_sacrebleu(name: str) -> Score:
    return lambda hypotheses, references: float(
        _sacrebleu(name).corpus_score(list(hypotheses), [list(references)]).score
    )


class _Words:
    """The words of rouge-score, which knows the letters a to z alone, with those of all scripts."""

    def __init__(self) -> None:
        from nltk.stem.porter import PorterStemmer

        self._stem = functools.cache(PorterStemmer().stem)

    def tokenize(self, text: str) -> list[str]:
        words = re.findall(r"[^\W_]+", text.lower())
        return [self._stem(word) if len(word) > 3 and word.isascii() else word for word in words]


def _of_rouge(name: str) -> Score:
    def mean(hypotheses: Texts, references: Texts) -> float:
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer([name], tokenizer=_Words())
        pairs = zip(references, hypotheses, strict=True)
        return sum(scorer.score(*pair)[name].fmeasure for pair in pairs) / len(references)

    return mean


def _exact_match(hypotheses: Texts, references: Texts) -> float:
    pairs = zip(hypotheses, references, strict=True)
    return sum(one.strip() == other.strip() for one, other in pairs) / len(references)


def _squad_exact_match(hypotheses: Texts, references: Texts) -> float:
    return _exact_match(
        [squad_normalised(text) for text in hypotheses], [squad_normalised(text) for text in references]
    )


def _squad_f1(hypotheses: Texts, references: Texts) -> float:
    pairs = zip(hypotheses, references, strict=True)
    words = ((squad_normalised(one).split(), squad_normalised(other).split()) for one, other in pairs)
    return sum(_f1_of_words(*pair) for pair in words) / len(references)


def _f1_of_words(found: list[str], expected: list[str]) -> float:
    if not (found and expected):
        return float(found == expected)
    common = sum((Counter(found) & Counter(expected)).values())
    return 2 * common / (len(found) + len(expected))


def squad_normalised(text: str) -> str:
    """Lower case, without punctuation, articles and more than one space."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _wer(hypotheses: Texts, references: Texts) -> float:
    import jiwer

    single = [[" ".join(text.split()) for text in texts] for texts in (references, hypotheses)]  # it splits at spaces
    return float(jiwer.wer(single[0], single[1]))


SCORES: dict[str, Score] = {
    "bleu": _of_sacrebleu("bleu"),
    "chrf": _of_sacrebleu("chrf"),
    "rouge1": _of_rouge("rouge1"),
    "rouge2": _of_rouge("rouge2"),
    "rougeL": _of_rouge("rougeL"),
    "exact_match": _exact_match,
    "squad_exact_match": _squad_exact_match,
    "squad_f1": _squad_f1,
    "wer": _wer,
}
LOWEST_IS_BEST = frozenset({"wer"})
