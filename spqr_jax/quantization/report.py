"""Reports on quantized matrices: size, outliers, error and time."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels import SpqrTensor, bits_per_weight, outlier_share
from spqr_jax.runtime.tracing import is_traced


class MatrixReport(NamedTuple):
    """The size and the error of one quantized matrix.

    Attributes:
      bits_per_weight: 8 · bytes held / number of weights.
      outlier_share: outliers / number of weights.
      relative_error: ‖(W − Ŵ) X‖² / ‖W X‖² on the calibration inputs X (on X = I without any), with W after the refit.
      seconds: wall time of the solver, divided among matrices solved together by their sizes; NaN where it was traced.
      pooled: solved with the Hessian of all experts' tokens, because this expert has got too few.
    """

    bits_per_weight: float
    outlier_share: float
    relative_error: float
    seconds: float
    pooled: bool = False


def report_matrix(
    packed: SpqrTensor, error: Float[Array, ""], seconds: float, pooled: bool | Bool[Array, ""] = False
) -> MatrixReport:
    """The report on one packed matrix; traced values stay arrays."""
    values: Any = bits_per_weight(packed), outlier_share(packed), error, seconds
    numbers: Any = (value if is_traced(value) else float(value) for value in values)
    flag: Any = pooled if is_traced(pooled) else bool(pooled)
    return MatrixReport._make((*numbers, flag))


@jax.jit
def relative_errors(
    weights: tuple[Float[Array, "_ in"], ...],
    approximations: tuple[Float[Array, "_ in"], ...],
    hessian: Float[Array, "in in"] | None,
) -> tuple[Float[Array, ""], ...]:
    """The relative error of matrices that share an input; without a Hessian, on X = I."""
    metric = jnp.eye(weights[0].shape[1]) if hessian is None else hessian
    return tuple(relative_error(w, d, metric) for w, d in zip(weights, approximations, strict=True))


def relative_error(
    weight: Float[Array, "out in"], approximation: Float[Array, "out in"], hessian: Float[Array, "in in"]
) -> Float[Array, ""]:
    """‖(W − Ŵ) X‖² / ‖W X‖², from H = X Xᵀ; 0 for a matrix of zeros, or inputs of zeros, without an error."""

    def energy(w: Array) -> Array:
        return jnp.vdot(w, jnp.matmul(w, hessian, precision="highest"))

    error = energy(weight - approximation)
    # A block of zeros, as in expanded models, would give 0 / 0.
    return jnp.where(error == 0, 0.0, error / energy(weight))
