"""Measured rows: all contestants on the present device, each product checked before it is timed."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.aot.formats import Format
from pallas_kernels.backends.table import Implementation
from pallas_kernels.benchmark.contestants import Contestant, Prepared, jax_contestants
from pallas_kernels.benchmark.rows import Row
from pallas_kernels.benchmark.torch_contestants import torch_contestants
from pallas_kernels.errors import SpqrError

MOST_ERROR = 2.0**-8
"""Largest ‖Δ‖ / ‖y‖ of a correct product: the largest relative rounding error of bfloat16."""
OPERATIONS = 1e15
"""Approximate operations per second of a large GPU's tensor cores, to estimate times."""


def measured_rows(
    form: Format,
    shape: tuple[int, int],
    tokens: Sequence[int],
    *,
    matrix: str,
    bandwidth: float,
    skipped: dict[str, str],
    implementation: Implementation | None = None,
) -> Iterator[list[Row]]:
    """Measures all contestants, and yields their rows for one number of tokens at a time.

    Args:
      form: format of the packed matrix.
      shape: (out, in).
      tokens: numbers of tokens.
      matrix: name of the matrix.
      bandwidth: bytes per second of the device.
      skipped: contestants in PyTorch to leave out, with the reasons.
      implementation: backend of `spqr_matmul`. None: the default of the device.
    """
    contestants = [*jax_contestants(form, shape, implementation), *torch_contestants(form, shape, skipped)]
    for number in tokens:
        x = jax.random.normal(jax.random.key(number), (number, shape[1]), jnp.bfloat16)
        able = [contestant for contestant in contestants if number <= contestant.most_tokens]
        # Compile in parallel, but measure one at a time.
        with ThreadPoolExecutor() as pool:
            prepared = [pool.submit(_prepare, contestant, x, bandwidth) for contestant in able]
        yield [
            measured_row(contestant, x, one, matrix=matrix, bandwidth=bandwidth)
            for contestant, one in zip(able, prepared, strict=True)
        ]


def _prepare(contestant: Contestant, x: Float[Array, "tokens in"], bandwidth: float) -> Prepared:
    out, columns = contestant.weight.shape
    operations = 2 * x.shape[0] * out * columns
    return contestant.prepare(x.astype(contestant.dtype), contestant.nbytes / bandwidth + operations / OPERATIONS)


def measured_row(
    contestant: Contestant,
    x: Float[Array, "tokens in"],
    prepared: Future[Prepared],
    *,
    matrix: str,
    bandwidth: float,
) -> Row:
    """The row of one contestant, with a time if its product is correct and an error otherwise."""
    x = x.astype(contestant.dtype)
    out, columns = contestant.weight.shape
    read_bytes = contestant.nbytes + x.nbytes
    relative_error = seconds = quartiles = message = None
    try:
        one = prepared.result()
        relative_error = checked_error(one.product, x, contestant.weight)
        timing = one.time()
        seconds, quartiles = timing.seconds, timing.quartiles
    # Other programs raise errors of any type, which must not prevent the remaining rows.
    except Exception as error:
        message = str(error).partition("\n")[0]
    return Row(
        matrix=matrix,
        shape=(out, columns),
        tokens=x.shape[0],
        contestant=contestant.name,
        format=contestant.format,
        read_bytes=read_bytes,
        source="measured",
        seconds=seconds,
        quartiles=quartiles,
        bandwidth_fraction=seconds and read_bytes / seconds / bandwidth,
        relative_error=relative_error,
        error=message,
    )


def checked_error(
    y: Float[Array | np.ndarray, "..."], x: Float[Array, "tokens in"], weight: Float[Array | np.ndarray, "out in"]
) -> float:
    """The relative error ‖y − x · weightᵀ‖ / ‖x · weightᵀ‖, with the exact product in float32.

    Raises:
      SpqrError: the error is above `MOST_ERROR`, or y has another shape.

    Example:
      >>> checked_error(x @ weight.T, x, weight) < 1e-6
      True
    """
    expected = np.asarray(_exact(x, weight), np.float64)
    if y.shape != expected.shape:
        raise SpqrError(f"the product is wrong: its shape is {y.shape}, but must be {expected.shape}")
    error = float(np.linalg.norm(np.asarray(y, np.float64) - expected) / np.linalg.norm(expected))
    # Negated, because NaN must fail.
    if not error <= MOST_ERROR:
        raise SpqrError(f"the product is wrong: its relative error is {error:.2g}, above {MOST_ERROR:.2g}")
    return error


@jax.jit
def _exact(x: Float[Array, "tokens in"], weight: Float[Array | np.ndarray, "out in"]) -> Float[Array, "tokens out"]:
    x, weight = x.astype(jnp.float32), weight.astype(jnp.float32)
    return jnp.matmul(x, weight.T, precision=jax.lax.Precision.HIGHEST)
