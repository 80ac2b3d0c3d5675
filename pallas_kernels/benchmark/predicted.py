"""Predicted rows for an absent GPU: compiled kernels for `spqr_matmul`, a roofline for bfloat16."""

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
"""One number of tokens per kernel."""
ITEM = 2
"""Bytes per bfloat16 number."""


def checked(form: Format) -> dict[int, float]:
    """Relative errors of the interpreted kernels on a small matrix, by number of tokens.

    Raises:
      SpqrError: a product is wrong.
    """
    packed = random_matrix(form, CHECKED_SHAPE, 0)
    weight = exact_weight(packed)
    # With XLA's other optimizations for CPUs, interpreted kernels take minutes to compile.
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
    """Predicts `spqr_matmul` and `jnp.dot`, and yields their rows for one number of tokens at a time.

    Args:
      target: one of `GPUS`.
      form: format of the packed matrix.
      shape: (out, in).
      tokens: numbers of tokens.
      matrix: name of the matrix.

    Raises:
      ModuleNotFoundError: the compiler is not installed.
      SpqrError: the format does not support these sizes.
    """
    gpu = GPUS[target]
    # Above the limit of the tensor-core kernel, one kernel serves all numbers of tokens.
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
    """Seconds of a product with a packed matrix: the sum over its kernels.

    In the dequantize regime, the kernels write the dense weight, and the roofline of the dense product is added.
    """
    seconds = 1e-6 * sum(kernel.predicted_us for kernel in reports)
    if regime(tokens, jnp.bfloat16) == "dequantize":
        seconds += roofline(shape, tokens, gpu)
    return seconds


def roofline(shape: tuple[int, int], tokens: int, gpu: Gpu) -> float:
    """Lower bound of the seconds of a bfloat16 product: max(bytes / bandwidth, operations / tensor rate).

    Example:
      >>> round(1e6 * roofline((4096, 11008), 1, GPUS["h100"]), 1)
      30.1
    """
    out, columns = shape
    nbytes = ITEM * (out * columns + tokens * (out + columns))
    return max(nbytes / gpu.bandwidth, 2 * tokens * out * columns / gpu.tensor_rate)
