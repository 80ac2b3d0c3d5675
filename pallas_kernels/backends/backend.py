"""The interface between the operations on packed matrices and those who compute them."""

from collections.abc import Callable
from dataclasses import dataclass

from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.format.tensor import SpqrTensor


@dataclass(frozen=True)
class Backend:
    """Computes products with packed matrices, and their dense weights.

    Attributes:
      name: the value of `implementation` that asks for this backend.
      needs: the device that it runs on, in words, for error messages.
      available: tells whether it can run on the device that JAX computes on.
      matmul: y = x ŵᵀ `[*batch, out]` of activations x `[*batch, in]`, accumulated in float32, in x's type.
      dequantize: ŵ `[out, in]` in the type given, columns in the order of the input features.
      dtypes: names of the types of activations that `matmul` takes; None for every type.
      kernels: True where `matmul` launches kernels on the packed codes. JAX cannot differentiate or map these, so
        `spqr_matmul` adds the rules. Decoding does not stack blocks for them, because a slice would be copied.
      automatic: True where the backend may be chosen without being asked for.
    """

    name: str
    needs: str
    available: Callable[[], bool]
    matmul: Callable[[Array, SpqrTensor], Float[Array, "*batch out"]]
    dequantize: Callable[[SpqrTensor, DTypeLike], Float[Array, "out in"]]
    dtypes: tuple[str, ...] | None = None
    kernels: bool = False
    automatic: bool = True
