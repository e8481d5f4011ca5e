"""Sums over micro-batches and replicas: as they come, or in one fixed tree whose bits no layout can change.

Floating-point addition is not associative, so the bits of a sum depend on who adds what first. The tree pairs the
terms 0..n-1 level by level, (0, 1), (2, 3), ..., and moves a last one without a partner up as it is. A node of level j
holds the terms i * 2**j .. (i + 1) * 2**j - 1: an owner of 2**j consecutive terms that starts at a multiple of 2**j
adds up its own node, and the nodes of all owners are again the leaves of such a tree.

XLA compiles each sum of the tree, because it keeps the order that is written: TensorFlow's graph optimizer turns nested
additions into one AddN, which adds from left to right.
"""

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

Nest = Any  # a tensor or a structure of tensors
Term = Callable[[int | tf.Tensor], Nest]  # number of a term -> the term; all of one structure and shapes


def running_sum(term: Term, count: int, width: int = 1) -> Nest:
    """Term 0 plus term 1 plus term 2 ..., computed `width` at a time; width + 1 terms are alive at a time.

    The bits do not depend on the width, which divides the count.
    """
    # a plain addition may become part of an AddN, which adds three and more in whatever order saves memory
    add = tf.add if width == 1 or count == 2 else _add_tensors

    def add_group(first: int | tf.Tensor, total: Nest | None) -> Nest:
        for one in [term(first + offset) for offset in range(width)]:
            total = one if total is None else tf.nest.map_structure(add, total, one)
        return total

    total = add_group(0, None)
    if count == width:
        return total
    _, total = tf.while_loop(
        lambda index, _: index < count,
        lambda index, total: (index + width, add_group(index, total)),
        (tf.constant(width), total),
        parallel_iterations=1,
    )
    return total


def tree_sum(term: Term, count: int, width: int = 1) -> Nest:
    """The terms 0..count-1 in the tree, `width` computed at a time: a power of two that divides the count.

    With a width of 1, log2(count) + 2 terms are alive at a time.

    A binary counter: `nodes[j]` waits for its right neighbour of the same level. Term `index` completes one node for
    each 1 that ends the binary digits of `index`.
    """
    term, count = _nodes_of(term, width), count // width
    if count == 1:
        return term(0)
    num_levels = count.bit_length()
    completed = tf.constant([_trailing_ones(index) for index in range(count)])

    def add(index: tf.Tensor, *nodes: Nest) -> tuple[Nest, ...]:
        leaf = term(index)

        def complete(num_completed: int) -> list[Nest]:
            node = leaf
            for level in range(num_completed):
                node = _add_nodes(nodes[level], node)
            return [*nodes[:num_completed], node, *nodes[num_completed + 1 :]]

        branches = [lambda level=level: complete(level) for level in range(num_levels)]
        return (index + 1, *tf.switch_case(completed[index], branches))

    first = term(0)  # which fixes the shapes
    empty = tf.nest.map_structure(tf.zeros_like, first)
    start = (tf.constant(1), first, *[empty] * (num_levels - 1))
    _, *nodes = tf.while_loop(lambda index, *_: index < count, add, start, parallel_iterations=1)
    waiting = [nodes[level] for level in range(num_levels) if count >> level & 1]
    total = waiting[0]
    for node in waiting[1:]:
        total = _add_nodes(node, total)
    return total


def _nodes_of(term: Term, width: int) -> Term:
    """The nodes over `width` consecutive terms each, which are computed at the same time."""
    if width == 1:
        return term

    def node(index: int | tf.Tensor) -> Nest:
        nodes = [term(index * width + offset) for offset in range(width)]
        while len(nodes) > 1:
            nodes = [_add_nodes(left, right) for left, right in zip(nodes[::2], nodes[1::2], strict=True)]
        return nodes[0]

    return node


@tf.function(jit_compile=True, autograph=False)
def _add_nodes(left: Nest, right: Nest) -> Nest:
    return tf.nest.map_structure(tf.add, left, right)


@tf.function(jit_compile=True, autograph=False)
def _add_tensors(left: tf.Tensor, right: tf.Tensor) -> tf.Tensor:
    return left + right


def sum_in_tree(values: Sequence[tf.Tensor]) -> tf.Tensor:
    """The same tree over tensors that are all there."""
    return _add_pairs(*values)


@tf.function(jit_compile=True, autograph=False)
def _add_pairs(*nodes: tf.Tensor) -> tf.Tensor:
    while len(nodes) > 1:
        pairs = [left + right for left, right in zip(nodes[::2], nodes[1::2], strict=False)]
        nodes = (*pairs, *nodes[2 * len(pairs) :])
    return nodes[0]


def fixed_sum(values: tf.Tensor, width: int = 256) -> tf.Tensor:
    """The sum of a tensor in an order that depends on its size alone, not on the number of threads.

    A full reduction outside XLA gives each thread a block; sums of rows that lie in memory do not.
    """
    flat = tf.reshape(values, [-1])
    if flat.shape[0] == 0:
        return tf.zeros([], flat.dtype)
    while flat.shape[0] > 1:
        rows = -(-flat.shape[0] // width)
        padded = tf.pad(flat, [[0, rows * width - flat.shape[0]]])
        flat = tf.reduce_sum(tf.reshape(padded, [rows, width]), axis=1)
    return flat[0]


def _trailing_ones(number: int) -> int:
    return ((number + 1) & -(number + 1)).bit_length() - 1
