"""What XLA compiles of a run."""

from dataclasses import dataclass

LARGE_MATRIX = 500_000  # numbers, from which on oneDNN multiplies faster in float32 than XLA's CPU backend


@dataclass(frozen=True)
class Compilation:
    """What XLA compiles.

    Attributes:
      whole: the whole micro-batch.
      parts: what lies between its matrix products, each part by itself.
      update: the update of the weights.
    """

    whole: bool
    parts: bool
    update: bool

    @classmethod
    def choose(cls, choice: bool | str, precision: str, on_gpu: bool, largest: int) -> "Compilation":
        """Resolves `training.jit_compile`: auto is the whole, but on CPUs the parts where oneDNN's products are faster.

        They are in bfloat16, which XLA's CPU backend computes as float32, and in float32 where matrices are large.
        `largest` is how many numbers the largest matrix has.
        """
        if choice != "auto":
            return cls(whole=bool(choice), parts=False, update=bool(choice))
        whole = on_gpu or (precision == "float32" and largest < LARGE_MATRIX)
        return cls(whole=whole, parts=not whole, update=True)

    def __str__(self) -> str:
        return "XLA" if self.whole else "XLA between the products" if self.parts else "no XLA"
