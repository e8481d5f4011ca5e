"""Several sources in one value: `0.7 * tokens:web + 0.3 * tokens:code`."""

import math
import re
from fractions import Fraction

from tfdp.system.exits import ConfigError
from tfdp.system.messages import shown

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
