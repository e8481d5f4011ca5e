"""How many words of 4 bytes numbers take in few bits; arithmetic alone, without TensorFlow. See `quantization.py`."""

from typing import Literal

DeltaType = Literal["float32", "bfloat16", "int8", "int4"]
BLOCK = 4096  # numbers of a tensor that share a scale, where they become integers
_PER_WORD = {"float32": 1, "bfloat16": 2, "int8": 4, "int4": 8}


def count_words(size: int, dtype: DeltaType) -> tuple[int, int]:
    """Words of the numbers of a tensor, and of their scales."""
    has_scales = dtype in ("int8", "int4")
    return -(-size // _PER_WORD[dtype]), -(-size // BLOCK) if has_scales else 0
