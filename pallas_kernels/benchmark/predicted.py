"""Times on a GPU that is not there: of compiled kernels, and of a roofline for what is not ours."""

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp

from pallas_kernels.aot import GPUS, Format, Gpu, KernelReport, report_all
from pallas_kernels.benchmark.contestants import BFLOAT16, SPQR, exact_weight
from pallas_kernels.benchmark.matrices import random_matrix
from pallas_kernels.benchmark.measured import checked_error
from pallas_kernels.benchmark.rows import Row, Source
from pallas_kernels.matmul import spqr_matmul
from pallas_kernels.tuning.regimes import MOST_TOKENS, regime

CHECKED_SHAPE, CHECKED_TOKENS = (64, 512), (1, 16, 200)
"""One number of tokens for each kernel."""
ITEM = 2
"""Bytes of a bfloat16 number."""


def checked(form: Format) -> dict[int, float]:
    """Relative errors of the interpreted kernels on a small matrix, by number of tokens.

    Raises:
      SpqrError: a product is wrong.
    """
    packed = random_matrix(form, CHECKED_SHAPE, 0)
    weight = exact_weight(packed)
    # What XLA does beyond that for CPUs takes minutes with programs like these.
    options: dict[str, str | bool] = {
        "xla_backend_optimization_level": 0,  # type: ignore[dict-item]
        "xla_llvm_disable_expensive_passes": True,
        "xla_disable_hlo_passes": "fusion,cpu-instruction-fusion",
    }
    errors = {}
    for tokens in CHECKED_TOKENS:
        x = jax.random.normal(jax.random.key(tokens), (tokens, CHECKED_SHAPE[1]), jnp.bfloat16)
        product = jax.jit(lambda x, w: spqr_matmul(x, w, implementation="interpret"))
        compiled = product.lower(x, packed).compile(compiler_options=options)
        errors[tokens] = checked_error(compiled(x, packed), x, weight)
    return errors


def predicted_rows(
    target: str, form: Format, shape: tuple[int, int], tokens: Sequence[int], *, matrix: str
) -> Iterator[list[Row]]:
    """The rows of what can be predicted, for one number of tokens after the other.

    Args:
      target: one of `GPUS`.
      form: what the matrix is packed as.
      shape: (out, in).
      matrix: its name.

    Raises:
      ModuleNotFoundError: the compiler is not installed.
      SpqrError: the format does not support these sizes.
    """
    gpu = GPUS[target]
    # Beyond the tensor core kernel all numbers of tokens have the same kernel.
    compiled = [min(number, MOST_TOKENS["bfloat16"]["mma"] + 1) for number in tokens]
    different = list(dict.fromkeys(compiled))
    reports = dict(zip(different, report_all([(target, form, number, shape) for number in different]), strict=True))
    packed_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(form.tensor(shape)))
    dense_bytes = ITEM * shape[0] * shape[1]

    def row(contestant: str, held: str, weight_bytes: int, number: int, seconds: float, source: Source) -> Row:
        read_bytes = weight_bytes + ITEM * number * shape[1]
        fraction = read_bytes / seconds / gpu.bandwidth
        return Row(matrix, shape, number, contestant, held, read_bytes, source, seconds, bandwidth_fraction=fraction)

    for number, like in zip(tokens, compiled, strict=True):
        seconds = kernel_seconds(reports[like], shape, number, gpu)
        yield [
            row(SPQR, str(form), packed_bytes, number, seconds, "compile-ahead"),
            row(BFLOAT16, "bfloat16", dense_bytes, number, roofline(shape, number, gpu), "roofline"),
        ]


def kernel_seconds(reports: Sequence[KernelReport], shape: tuple[int, int], tokens: int, gpu: Gpu) -> float:
    """The kernels of a product with a packed matrix, one after the other.

    Where they only write the weight out, the product is a roofline's.
    """
    seconds = 1e-6 * sum(kernel.predicted_us for kernel in reports)
    if regime(tokens, jnp.bfloat16) == "dequantize":
        seconds += roofline(shape, tokens, gpu)
    return seconds


def roofline(shape: tuple[int, int], tokens: int, gpu: Gpu) -> float:
    """Seconds that a product in bfloat16 takes at least: those of its bytes or of its operations.

    Example:
      >>> roofline((4096, 11008), 1, GPUS["h100"])
      3.0e-05
    """
    out, columns = shape
    nbytes = ITEM * (out * columns + tokens * (out + columns))
    return max(nbytes / gpu.bandwidth, 2 * tokens * out * columns / gpu.tensor_rate)
