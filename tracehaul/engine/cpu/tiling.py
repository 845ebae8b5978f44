"""Which products a processor runs best, from what it is and has. Pure.

Chosen by features and not by a stopwatch: hosts that are alike must sum alike, or a step that moves between them would
say other bits.
"""

from typing import NamedTuple

LANES = 16
"""float32 of a vector in the kernels, whatever a register holds: every sum runs over so many partial ones."""


class Tiling(NamedTuple):
    """How products are laid out in registers."""

    pairs: bool
    """The processor multiplies pairs of bfloat16 into float32 sums; else numbers are widened to float32 before."""
    lanes: int
    """float32 in a register."""
    outputs: int
    """Rows of weights that are multiplied at once with ``rows`` others, a vector of sums for each two."""
    rows: int
    columns: int
    """Vectors of sums beside each other, for six rows, in the attention's products."""

    @property
    def words(self) -> str:
        """For a log."""
        numbers = "bfloat16 pairs" if self.pairs else "float32"
        return f"{numbers}, {self.lanes} lanes, {self.outputs}x{self.rows}"


def tiling(machine: str, features: str) -> Tiling:
    """For a kind of machine, as ``platform.machine()`` has it, and LLVM's features (``+avx2,-sse4a``).

    Any other x86 is taken for one with AVX2: who names a processor (``haswell``) names no features.
    """
    has = {name[1:] for name in features.split(",") if name.startswith("+")}
    if "avx512bf16" in has:
        return Tiling(pairs=True, lanes=16, outputs=4, rows=4, columns=4)
    if "avx512f" in has:
        return Tiling(pairs=False, lanes=16, outputs=4, rows=6, columns=4)
    if machine in ("x86_64", "AMD64"):
        return Tiling(pairs=False, lanes=8, outputs=2, rows=3, columns=1)
    # 32 registers of four, as on ARM.
    return Tiling(pairs=False, lanes=4, outputs=2, rows=2, columns=1)
