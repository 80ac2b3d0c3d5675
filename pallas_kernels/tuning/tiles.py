"""The tile that one program of a kernel treats, and the candidates for tuning."""

from dataclasses import dataclass
from typing import Literal

Regime = Literal["fma", "mma", "dequantize"]
"""The kernels, selected by the number of tokens: see `regimes`."""


@dataclass(frozen=True)
class Tile:
    """The part of a matrix that one program treats.

    Attributes:
      sets: sets of neighbouring rows; a thread holds the codes of its statistics for all rows of a set.
      rows: rows of a set, within the sixteen that share the words of a statistics plane.
      columns: code words of each row at once.
      steps: iterations over `columns` code words each; more than 1 for the tensor cores only.
      warps: groups of 32 threads.
    """

    sets: int
    rows: int
    columns: int
    steps: int = 1
    warps: int = 1

    def blocks(self, rows: int) -> int:
        """Number of programs for a number of rows."""
        return -(-rows // (self.sets * self.rows))


DEFAULT: dict[Regime, Tile] = {
    "fma": Tile(sets=1, rows=8, columns=64),
    "mma": Tile(sets=16, rows=1, columns=16, steps=2),
    "dequantize": Tile(sets=64, rows=1, columns=8, warps=4),
}
"""Tiles for GPUs without measurements: fast for all shapes of LLaMA-7B on an H100."""


def candidates(regime: Regime) -> tuple[Tile, ...]:
    """Tiles that fit the kernel, the default first.

    For one token a thread reads two neighbouring words of a row, otherwise four. In the tensor core kernel it holds two
    rows of four words.

    Example:
      >>> len(candidates("dequantize")), candidates("dequantize")[0]
      (18, Tile(sets=64, rows=1, columns=8, steps=1, warps=4))
    """
    match regime:
        case "fma":
            tried = [
                Tile(64 * warps // columns, rows, columns, warps=warps)
                for warps in (1, 2, 4)
                for columns in (16, 32, 64)
                for rows in (4, 8, 16)
            ]
        case "mma":
            # The tensor cores multiply 16 rows by 16 numbers.
            tried = [
                Tile(sets, rows, columns, steps)
                for sets, columns in ((16, 8), (16, 16), (32, 8))
                for rows in (1, 2, 4)
                for steps in (1, 2, 4, 8)
            ]
        case "dequantize":
            tried = [
                Tile(128 * warps // columns, rows, columns, warps=warps)
                for warps in (2, 4, 8)
                for columns in (8, 16, 32)
                for rows in (1, 2)
            ]
    return (DEFAULT[regime], *(tile for tile in tried if tile != DEFAULT[regime]))
