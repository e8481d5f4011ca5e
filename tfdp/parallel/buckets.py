"""How the gradients of a step are laid out for the reduction: end to end, cut into packs of one size.

A large tensor in one piece keeps the network idle while it is copied, and many small ones cost a round trip each; packs
of some MiB do neither, and travel beside one another. The last layers come first, as backward finishes them, so a pack
is on its way while the gradients of the earlier layers are still computed (as in PyTorch's DDP, Li et al. 2020).
"""

import math
from collections.abc import Sequence

import tensorflow as tf


class Buckets:
    """Cuts tensors of known shapes into packs, and puts them together again.

    Args:
      shapes: of the tensors, in the order in which the model makes its weights.
      bytes_per_pack: size of a pack; 0: each tensor stays as it is.
      bytes_per_number: of what travels.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], bytes_per_pack: int, bytes_per_number: int = 4) -> None:
        self._shapes = list(shapes)
        sizes = [math.prod(shape) for shape in shapes]
        self._packs: list[list[tuple[int, int, int]]] = []  # of each: (tensor, begin, end) of its pieces
        if bytes_per_pack == 0:
            self._packs = [[(index, 0, sizes[index])] for index in reversed(range(len(sizes)))]
            return
        limit, room = max(1, bytes_per_pack // bytes_per_number), 0
        for index in reversed(range(len(sizes))):
            begin = 0
            while begin < sizes[index]:
                if room == 0:
                    self._packs.append([])
                    room = limit
                end = min(sizes[index], begin + room)
                self._packs[-1].append((index, begin, end))
                room -= end - begin
                begin = end

    @property
    def num_packs(self) -> int:
        return len(self._packs)

    def pack(self, tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """The packs, flat, in the order in which they should leave."""
        flat = [tf.reshape(tensor, [-1]) for tensor in tensors]
        return [_joined([flat[index][begin:end] for index, begin, end in pieces]) for pieces in self._packs]

    def unpack(self, packs: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """The tensors again."""
        pieces: list[list[tf.Tensor]] = [[] for _ in self._shapes]
        for pack, places in zip(packs, self._packs, strict=True):
            sizes = [end - begin for _, begin, end in places]
            parts = tf.split(pack, sizes) if len(sizes) > 1 else [pack]
            for (index, _, _), part in zip(places, parts, strict=True):
                pieces[index].append(part)
        return [tf.reshape(_joined(parts), shape) for parts, shape in zip(pieces, self._shapes, strict=True)]


def _joined(parts: list[tf.Tensor]) -> tf.Tensor:
    return parts[0] if len(parts) == 1 else tf.concat(parts, axis=0)


class Packed:
    """Lays small float32 tensors of known shapes end to end in one vector."""

    def __init__(self, shapes: Sequence[tuple[int, ...]]) -> None:
        self._shapes = list(shapes)
        self._sizes = [math.prod(shape) for shape in self._shapes]
        self.size = sum(self._sizes)

    @staticmethod
    def pack(tensors: Sequence[tf.Tensor]) -> tf.Tensor:
        return tf.concat([tf.reshape(tensor, [-1]) for tensor in tensors], axis=0)

    def unpack(self, vector: tf.Tensor) -> list[tf.Tensor]:
        parts = tf.split(vector, self._sizes)
        return [tf.reshape(part, shape) for part, shape in zip(parts, self._shapes, strict=True)]
