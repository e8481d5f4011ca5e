"""Several sources in one order, by their weights.

Which source a position of the order belongs to is a function of the position alone. With two sources each stretch of n
positions holds the first one's share of n to less than one position: the Bresenham line, or Euclidean rhythm.
More sources are told apart two groups at a time, so that a stretch is exact to one position per level of that tree.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction


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

    Written so that whole numbers of 64 bits hold every term; `pipeline.py` computes the same in TensorFlow.
    """
    periods, rest = position // fork.total, position % fork.total
    return periods * fork.left_share + (rest * fork.left_share + fork.total // 2) // fork.total


def counts(node: Fork | Leaf, num_positions: int) -> list[int]:
    """How many of the first positions belong to each source, in the order of the sources."""
    if isinstance(node, Leaf):
        return [num_positions]
    left = count_left(node, num_positions)
    return counts(node.left, left) + counts(node.right, num_positions - left)
