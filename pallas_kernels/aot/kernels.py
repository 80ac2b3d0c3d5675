"""The kernels that are compiled ahead."""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Array, Float

from pallas_kernels.backends.triton import dequantize, fma, mma
from pallas_kernels.backends.triton.launch import Launch
from pallas_kernels.format.tensor import SpqrTensor
from pallas_kernels.tuning.tiles import Regime, Tile


@dataclass(frozen=True)
class Compiled:
    """A function whose kernels are reported.

    Attributes:
      regime: the kernel that reads the codes.
      function: of activations `[tokens, in]` and a packed matrix; takes `tile`, and the flag `interpret`.
      launch: how that kernel is spread over a GPU, from the matrix, the number of tokens and the tile.
      tokens: numbers of tokens for which it is compiled.
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
