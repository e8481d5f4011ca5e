"""Scores of the yardsticks, each with a 95 % interval: error rates, exact match, SQuAD's F1, ROUGE.

A score is a ratio of two sums over the examples. Its interval is the percentile bootstrap (Efron 1979) over examples:
1,000 drawings of as many examples with replacement, from a fixed seed, so that the same predictions give the same line.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np
from splits import refuse

NUM_DRAWINGS = 1000
Parts = list[tuple[float, float]]


def interval(parts: Parts) -> tuple[float, float, float]:
    """Sum of the first numbers over sum of the second, and the ends of its 95 % interval."""
    sums = np.asarray(parts, np.float64).reshape(-1, 2)
    if not len(sums) or sums[:, 1].sum() == 0:
        raise ValueError("nothing to score")
    generator = np.random.default_rng(0)
    ratios = []
    for _ in range(NUM_DRAWINGS):
        above, below = sums[generator.integers(0, len(sums), len(sums))].sum(0)
        ratios.append(above / below if below else 0.0)
    low, high = np.percentile(ratios, [2.5, 97.5])
    above, below = sums.sum(0)
    return float(above / below), float(low), float(high)


def report(name: str, parts: Parts) -> float:
    """Prints a score in percent with its interval; the score."""
    score, low, high = interval(parts)
    print(f"{name:20} {100 * score:6.2f} %   95 % interval {100 * low:.2f} to {100 * high:.2f}   n {len(parts):,}")
    return score


def edit_distance(one: Sequence[str], other: Sequence[str]) -> int:
    """The fewest insertions, deletions and substitutions that make one of the other (Levenshtein 1966)."""
    row = list(range(len(other) + 1))
    for number, left in enumerate(one, 1):
        before, row[0] = row[0], number
        for at, right in enumerate(other, 1):
            before, row[at] = row[at], min(row[at] + 1, row[at - 1] + 1, before + (left != right))
    return row[-1]


def closest(output: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[int, int]:
    """Distance to the closest reference, and its length; of several equally close ones the first."""
    distances = [(edit_distance(output, reference), len(reference)) for reference in references]
    return min(distances, key=lambda pair: pair[0])


def normalised_answer(text: str) -> str:
    """SQuAD's normal form (Rajpurkar et al. 2016): lower case, no punctuation, no articles, single spaces."""
    bare = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def exact_match(output: str, answer: str) -> float:
    return float(normalised_answer(output) == normalised_answer(answer))


def squad_f1(output: str, answer: str) -> float:
    """The harmonic mean of precision and recall of the words of an answer, as SQuAD counts them."""
    found, wanted = normalised_answer(output).split(), normalised_answer(answer).split()
    if not found or not wanted:
        return float(found == wanted)
    shared = sum((Counter(found) & Counter(wanted)).values())
    return 2 * shared / (len(found) + len(wanted))


def rouge(outputs: list[str], references: list[str]) -> dict[str, Parts]:
    """ROUGE-1, ROUGE-2 and ROUGE-L (Lin 2004) of each pair: F-measures of the package rouge-score, without stemming."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        refuse("ROUGE needs the package rouge-score: pip install rouge-score")
    kinds = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(kinds, use_stemmer=False)
    found = [scorer.score(reference, output) for reference, output in zip(references, outputs, strict=True)]
    return {kind: [(score[kind].fmeasure, 1.0) for score in found] for kind in kinds}
