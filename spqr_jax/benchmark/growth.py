"""How the time of quantizing grows with rows, columns, tokens and blocks, beside how its operations do."""

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
"""Columns where rows grow, and rows where columns do."""
TOKENS = 256
"""Of a sequence."""
TOLERATED = 0.15
"""By how much a measured exponent may be larger than that of the operations before it is said to be worse."""


class Growth(NamedTuple):
    """Times at several sizes of one thing, and the exponents a of size^a that fit them and the operations best."""

    of: str
    sizes: tuple[int, ...]
    seconds: tuple[float, ...]
    exponent: float
    operations_exponent: float

    @property
    def is_worse(self) -> bool:
        """Whether the time grows faster than the operations."""
        return self.exponent > self.operations_exponent + TOLERATED


def fitted(
    of: str, sizes: Sequence[int], seconds: Callable[[int], float], operations: Callable[[int], float]
) -> Growth:
    """Measures at each size, and fits.

    Example:
      >>> fitted("squares", [1, 2, 4, 8], seconds=lambda n: 1e-3 * n**2, operations=lambda n: n**2).exponent
      2.0
    """
    times = tuple(map(seconds, sizes))
    return Growth(of, tuple(sizes), times, _exponent(sizes, times), _exponent(sizes, [operations(n) for n in sizes]))


def growths(solver_seconds: Callable[[tuple[int, int]], float], timed: Callable[[Callable], float]) -> list[Growth]:
    """All four.

    Args:
      solver_seconds: what the solver takes for a matrix (out, in), compiled before.
      timed: what a call takes.
    """

    def model_seconds(blocks: int, sequences: int) -> float:
        model = _model(blocks)
        params = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
        tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (sequences, TOKENS))
        # The first one compiles.
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
    """Of matrices of one input, `out` rows in all: refit and factorization, 8 n³; refit and columns, 10 n² · rows."""
    return 8.0 * columns**3 + 10.0 * columns**2 * out


def token_operations(out: int, columns: int) -> float:
    """Of one token: products with the weights of both models, 4; the upper panels of H, 1.25 n²; C, 2 n².

    Without R, 2 for each weight of two of a block's matrices.
    """
    return 4.0 * out * columns + 3.25 * columns**2


def _exponent(sizes: Sequence[int], values: Sequence[float]) -> float:
    """The slope of a straight line through the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def _model(blocks: int) -> Decoder:
    """Blocks as large as SmolLM2's, with a small vocabulary."""
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
