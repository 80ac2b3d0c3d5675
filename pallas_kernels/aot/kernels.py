"""The kernels that are compiled ahead."""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Array, Float

from pallas_kernels.tensor import SpqrTensor
from pallas_kernels.triton import dequantize, fma, mma
from pallas_kernels.triton.launch import Launch


@dataclass(frozen=True)
class Compiled:
    """A function whose kernels are reported.

    Attributes:
      function: of activations `[tokens, in]` and a packed matrix; takes the flag `interpret`.
      launch: how the kernel that reads the codes is spread over a GPU, from the matrix and the number of tokens.
      tokens: numbers of tokens for which it is compiled.
    """

    function: Callable[..., Float[Array, "..."]]
    launch: Callable[[SpqrTensor, int], Launch]
    tokens: range


def _dequantize(x: Array, w: SpqrTensor, *, interpret: bool) -> Array:
    return dequantize.dequantize_matrix(w, x.dtype, interpret=interpret)


COMPILED = (
    Compiled(fma.fma_matmul, fma.launch, range(1, 2)),
    Compiled(mma.mma_matmul, mma.launch, range(2, 129)),
    Compiled(_dequantize, dequantize.launch, range(129, 1 << 16)),
)
