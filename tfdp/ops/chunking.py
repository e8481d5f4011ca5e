"""How large operations are cut into chunks, to keep the memory in use at once small."""

from itertools import pairwise

LOGITS_BYTES = 128 << 20  # of float32 logits in memory at once, unless training.loss_chunk_size is set


def loss_chunk_size(wanted: int | None, num_tokens: int, vocab_size: int) -> int:
    """Tokens whose logits are in memory at once, from `training.loss_chunk_size`: 0 wants all of them.

    None wants all if their logits in float32 fit into `LOGITS_BYTES`, else a power of two that takes half of that at
    most: each chunk adds to the gradient of the whole table, but its logits and their gradients are soon most of a
    step's memory, in each of the parallel micro-batches.
    """
    if wanted is not None:
        return min(num_tokens, wanted or num_tokens)
    most = LOGITS_BYTES // (4 * vocab_size)
    return num_tokens if num_tokens <= most else 1 << max(0, (most // 2).bit_length() - 1)


def query_blocks(num_queries: int) -> list[tuple[int, int]]:
    """How causal attention takes its queries, (begin, end) of each block: at most 4 of at least 128 each.

    A block is multiplied with the keys up to its end: 5/8 of all products with 4 blocks, 3/4 with 2. Smaller blocks
    would save more products, and cost it again where they are cut and put together.
    """
    count = max(1, min(4, num_queries // 128))
    bounds = [index * num_queries // count for index in range(count + 1)]
    return list(pairwise(bounds))
