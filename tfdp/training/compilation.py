"""What XLA compiles of a run."""

from dataclasses import dataclass

LARGE_MATRIX = 500_000  # numbers, from which on oneDNN multiplies faster in float32 than XLA's CPU backend


@dataclass(frozen=True)
class Compilation:
    """What XLA compiles.

    Attributes:
      whole: the whole micro-batch.
      kernels: what lies between its matrix products, each kernel by itself.
      update: the update of the weights.
    """

    whole: bool
    kernels: bool
    update: bool

    @classmethod
    def choose(cls, choice: bool | str, precision: str, on_gpu: bool, largest: int) -> "Compilation":
        """Resolves `training.jit_compile`: auto is the whole, but on CPUs the kernels alone where oneDNN's products are
        faster.

        oneDNN is faster in bfloat16, which XLA's CPU backend computes as float32, and in float32 where matrices are
        large.
        Narrow float32 models stay one XLA program: launching many small ones costs more. `largest` is how many numbers
        the largest matrix has.
        """
        if choice != "auto":
            return cls(whole=bool(choice), kernels=False, update=bool(choice))
        whole = on_gpu or (precision == "float32" and largest < LARGE_MATRIX)
        return cls(whole=whole, kernels=not whole, update=True)

    def __str__(self) -> str:
        return "XLA" if self.whole else "XLA between the products" if self.kernels else "no XLA"
