"""The scaling of quantization time with rows, columns, sequences and blocks, compared with its operations."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spqr_jax.benchmark.random_model import fused_shapes
from spqr_jax.config import SpqrConfig
from spqr_jax.models import Decoder, Llama, LlamaConfig, RotaryConfig
from spqr_jax.quantization.model import quantize

ROWS, COLUMNS, SEQUENCES, BLOCKS = (384, 768, 1536, 3072), (384, 768, 1536, 3072), (4, 8, 16, 32), (1, 2, 4, 8)
FIXED = 576
"""Columns while rows grow, and rows while columns grow."""
TOKENS = 256
"""Tokens per sequence."""
TOLERATED = 0.15
"""Excess of a measured exponent over that of the operations that is still attributed to noise."""


class Growth(NamedTuple):
    """Times at several sizes of one dimension, with fitted exponents a of seconds ~ size^a and operations ~ size^a."""

    of: str
    sizes: tuple[int, ...]
    seconds: tuple[float, ...]
    exponent: float
    operations_exponent: float

    @property
    def is_worse(self) -> bool:
        """True if the time grows faster than the operations."""
        return self.exponent > self.operations_exponent + TOLERATED


def fitted(
    of: str, sizes: Sequence[int], seconds: Callable[[int], float], operations: Callable[[int], float]
) -> Growth:
    """Measures at each size and fits both exponents by least squares in logarithms.

    Args:
      of: name of the dimension.
      sizes: its sizes.
      seconds: measures the time at one size.
      operations: counts the operations at one size.

    Example:
      >>> growth = fitted("squares", [1, 2, 4, 8], seconds=lambda n: 1e-3 * n**2, operations=lambda n: 5.0 * n**2)
      >>> round(growth.exponent, 3)
      2.0
    """
    times = tuple(map(seconds, sizes))
    return Growth(of, tuple(sizes), times, _exponent(sizes, times), _exponent(sizes, [operations(n) for n in sizes]))


def growths(
    solver_seconds: Callable[[tuple[int, int]], float], timed: Callable[[Callable[[], object]], float]
) -> list[Growth]:
    """Measures the growth with rows, columns, sequences and blocks.

    Args:
      solver_seconds: measures the solver on a matrix (out, in), without compilation.
      timed: measures the seconds of a call.
    """

    def model_seconds(blocks: int, sequences: int) -> float:
        model = _model(blocks)
        params = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
        tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (sequences, TOKENS))
        # The minimum excludes the first call, which compiles.
        return min(timed(lambda: quantize(params, tokens, model=model, config=SpqrConfig())) for _ in range(3))

    def model_operations(blocks: int, sequences: int) -> float:
        return blocks * sum(
            solver_operations(out, columns) + sequences * TOKENS * token_operations(out, columns)
            for out, columns in fused_shapes(_model(blocks)).values()
        )

    return [
        fitted("rows", ROWS, lambda n: solver_seconds((n, FIXED)), lambda n: solver_operations(n, FIXED)),
        fitted("columns", COLUMNS, lambda n: solver_seconds((FIXED, n)), lambda n: solver_operations(FIXED, n)),
        fitted("sequences", SEQUENCES, lambda n: model_seconds(1, n), lambda n: model_operations(1, n)),
        fitted("blocks", BLOCKS, lambda n: model_seconds(n, 4), lambda n: model_operations(n, 4)),
    ]


def solver_operations(out: int, columns: int) -> float:
    """Operations of the solver on the matrices of one input, with n columns and `out` rows in total.

    Refit and factorization take 8 n³, refit and the column loop 10 n² · out.

    Example:
      >>> solver_operations(10, 10)
      18000.0
    """
    return 8.0 * columns**3 + 10.0 * columns**2 * out


def token_operations(out: int, columns: int) -> float:
    """Operations of one calibration token for the matrices of one input, with n columns and `out` rows in total.

    Products in the original and the quantized model take 4 · out · n, the upper panels of H 1.25 n², and C 2 n². R is
    left out: 2 for each weight of two matrices per block.

    Example:
      >>> token_operations(10, 10)
      725.0
    """
    return 4.0 * out * columns + 3.25 * columns**2


def _exponent(sizes: Sequence[int], values: Sequence[float]) -> float:
    """The least-squares slope of log values over log sizes."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def _model(blocks: int) -> Decoder:
    """A model with blocks of SmolLM2's size and a small vocabulary."""
    return Llama(
        LlamaConfig(
            vocab_size=1024,
            hidden_size=576,
            mlp_size=1536,
            num_layers=blocks,
            num_heads=9,
            num_kv_heads=3,
            head_dim=64,
            rotary=RotaryConfig(),
        )
    )
