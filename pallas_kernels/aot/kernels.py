"""The kernels that are compiled ahead of time, by number of tokens."""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Array, Float

from pallas_kernels.backends.triton import dequantize, fma, mma
from pallas_kernels.backends.triton.launch import Launch
from pallas_kernels.format.tensor import SpqrTensor
from pallas_kernels.tuning.tiles import Regime, Tile


@dataclass(frozen=True)
class Compiled:
    """A function whose kernels the report covers.

    Attributes:
      regime: the kernel that reads the codes.
      function: takes activations `[tokens, in]`, a packed matrix, and the keywords `tile` and `interpret`.
      launch: computes the loops of one launch from the matrix, the number of tokens and the tile.
      tokens: numbers of tokens that it is compiled for.
    """

    regime: Regime
    function: Callable[..., Float[Array, "..."]]
    launch: Callable[[SpqrTensor, int, Tile], Launch]
    tokens: range


def _dequantize(x: Array, w: SpqrTensor, *, tile: Tile, interpret: bool) -> Array:
    return dequantize.dequantize_matrix(w, x.dtype, tile=tile, interpret=interpret)


COMPILED = (
    Compiled("fma", fma.fma_matmul, fma.launch, range(1, 2)),
    Compiled("mma", mma.mma_matmul, mma.launch, range(2, 129)),
    Compiled("dequantize", _dequantize, dequantize.launch, range(129, 1 << 16)),
)
