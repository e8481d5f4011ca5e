"""Where an example that is too long is cut, by `data.too_long: cut_input`, and a prompt by itself in the same way."""

from collections.abc import Sequence

import numpy as np

from tfdp.data.shards import Split
from tfdp.tasks.flags import UNSCORED

BEFORE_ANSWER = 8  # tokens of a prompt directly before what is learned: the template's, such as a line break


def cut_prompt(ids: Sequence[int], most: int) -> list[int]:
    """At most so many ids of a prompt: its first ones, and the last `BEFORE_ANSWER`; at least one of each fits."""
    if len(ids) <= most:
        return list(ids)
    head, tail = _parts(most)
    return [*ids[:head], *ids[len(ids) - tail :]]


class InputCuts:
    """The examples of a split that have to lose the middle of their text.

    An example keeps what is learned of it, with all that follows, the head of its prompt, and the prompt's last tokens.
    One that has several learned parts, or whose learned part does not fit, cannot be cut so.

    Args:
      split: of examples.
      starts, stops: of each, int64: from the end of text before it to behind the one after it.
      width: of a row.
      room: tokens of a row that a prompt leaves free at least, even where less is learned. So the length of what
        stays of a prompt does not tell how long the answer is.

    Attributes:
      documents: those to cut, ascending.
      heads: of each, the tokens that stay from its start on.
      tails: of each, where in the split the rest that stays begins.
      impossible: documents that are too long and cannot be cut so, ascending.
    """

    def __init__(self, split: Split, starts: np.ndarray, stops: np.ndarray, width: int, room: int = 0) -> None:
        found: list[tuple[int, int, int]] = []
        impossible: list[int] = []
        lengths = stops - starts
        for document in np.flatnonzero(lengths > width - max(room - 1, 0)).tolist():
            start, length = int(starts[document]), int(lengths[document])
            (tokens,) = split.read(np.array([start]), np.array([length]), length, with_flags=True)
            (learned,) = np.nonzero((tokens[1:] & UNSCORED) == 0)  # the end of text before it is no part of it
            is_one = len(learned) > 0 and int(learned[-1] - learned[0]) + 1 == len(learned)
            prompt = int(learned[0]) + 1 if is_one else length
            most = width - max(length - prompt, room)
            if is_one and most >= 1 and prompt > most:
                head, tail = _parts(most)
                found.append((document, head, start + prompt - tail))
            elif length > width:
                impossible.append(document)
        columns = np.array(found, dtype=np.int64).reshape(-1, 3).T
        self.documents, self.heads, self.tails = columns
        self.impossible = np.array(impossible, dtype=np.int64)


def _parts(most: int) -> tuple[int, int]:
    """Tokens of a prompt that stay at its start, one at least, and at its end."""
    tail = min(BEFORE_ANSWER, most - 1)
    return most - tail, tail
