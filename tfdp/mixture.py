"""Several sources in one order: `0.7 * tokens:web + 0.3 * tokens:code`.

Which source a position of the order belongs to is a function of the position alone. With two sources each stretch of n
positions holds the first one's share of n to less than one position: the Bresenham line, or Euclidean rhythm.
More sources are told apart two groups at a time, so that a stretch is exact to one position per level of that tree.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from tfdp.exits import ConfigError
from tfdp.messages import shown

_TERM = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?|\.[0-9]+)\s+\*\s+(\S.*?)\s*")
_PLUS = re.compile(r"\s+\+\s+(?=(?:[0-9]|\.[0-9])[0-9.]*\s+\*\s)")
_MOST_DIGITS = 1000  # of a weight: Python reads no more than 4,300 as a number
LARGEST_TOTAL = 1 << 30  # of the weights as whole numbers: products with it fit into 64 bits


def parse(source: str, key: str = "data.source") -> list[tuple[str, Fraction]]:
    """The sources that `data.source` names and their weights, which add up to 1; one source alone needs no weight.

    Raises:
      ConfigError: a source without a weight, twice, or with none of the data.
    """
    terms = _PLUS.split(source)
    if len(terms) == 1 and not _TERM.fullmatch(source):
        return [(source, Fraction(1))]
    found = [_TERM.fullmatch(term) for term in terms]
    fewer_digits = ConfigError(f"{key} ({shown(source)}) must have weights with fewer digits: three are enough")
    if any(match and len(match[1]) > _MOST_DIGITS for match in found):
        raise fewer_digits
    named = [(match[2], Fraction(match[1])) for match in found if match]
    names = [name for name, _ in named]
    if len(named) < len(terms) or len(set(names)) < len(names) or any(weight == 0 for _, weight in named):
        raise ConfigError(
            f"{key} ({shown(source)}) must give each source once, with a weight above 0: "
            "0.7 * tokens:A + 0.3 * tokens:B"
        )
    total = sum(weight for _, weight in named)
    weights = [weight / total for _, weight in named]
    if math.lcm(*(weight.denominator for weight in weights)) > LARGEST_TOTAL:
        raise fewer_digits
    return list(zip(names, weights, strict=True))


@dataclass(frozen=True)
class Leaf:
    """One source."""

    source: int


@dataclass(frozen=True)
class Fork:
    """Of each `total` consecutive positions that come here, `left_share` go left, evenly spread."""

    left_share: int
    total: int
    left: "Fork | Leaf"
    right: "Fork | Leaf"


def tree(weights: Sequence[Fraction]) -> Fork | Leaf:
    """The decisions that tell sources apart, for weights that are positive."""
    common = math.lcm(*(weight.denominator for weight in weights))
    return _subtree([int(weight * common) for weight in weights], 0)


def _subtree(shares: list[int], first: int) -> Fork | Leaf:
    if len(shares) == 1:
        return Leaf(first)
    half = len(shares) // 2
    divisor = math.gcd(sum(shares[:half]), sum(shares))
    left, right = _subtree(shares[:half], first), _subtree(shares[half:], first + half)
    return Fork(sum(shares[:half]) // divisor, sum(shares) // divisor, left, right)


def count_left(fork: Fork, position: int) -> int:
    """How many of the positions before this one go left: floor(position * left_share / total + 1/2).

    Written so that whole numbers of 64 bits hold every term; `data.py` computes the same in TensorFlow.
    """
    periods, rest = position // fork.total, position % fork.total
    return periods * fork.left_share + (rest * fork.left_share + fork.total // 2) // fork.total


def counts(node: Fork | Leaf, num_positions: int) -> list[int]:
    """How many of the first positions belong to each source, in the order of the sources."""
    if isinstance(node, Leaf):
        return [num_positions]
    left = count_left(node, num_positions)
    return counts(node.left, left) + counts(node.right, num_positions - left)
