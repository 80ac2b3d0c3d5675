"""The kernel for each number of tokens."""

import itertools

from jax.typing import DTypeLike
from numpy import dtype as numpy_dtype

from pallas_kernels.errors import SpqrError
from pallas_kernels.tuning.measurements import most_tokens
from pallas_kernels.tuning.tiles import Regime

MOST_TOKENS: dict[str, dict[Regime, int]] = {
    "bfloat16": {"fma": 1, "mma": 128},
    "float16": {"fma": 1, "mma": 128},
    # Tensor cores would round float32 activations.
    "float32": {"fma": 8},
}
"""For each type of activations the regimes in order, each with its largest number of tokens; more are dequantized.

Predicted, not measured (`python -m pallas_kernels.aot`): a second token doubles the first kernel's 3.4 instructions per
weight, and the tensor core kernel has 5.0 for up to 16 tokens. It unpacks the weight again for every 64 tokens.
"""


def regime(tokens: int, dtype: DTypeLike, device_kind: str = "") -> Regime:
    """The regime of a number of tokens, by the crossovers measured on this kind of GPU, or else by `MOST_TOKENS`.

    Raises:
      SpqrError: there are no kernels for activations of this type.

    Example:
      >>> regime(16, jnp.bfloat16)
      'mma'
    """
    name = numpy_dtype(dtype).name
    if name not in MOST_TOKENS:
        raise SpqrError(f"the Pallas kernels take activations in {', '.join(MOST_TOKENS)}, not {name}")
    table = MOST_TOKENS[name]
    for first, second in itertools.pairwise((*table, "dequantize")):
        # Measured with bfloat16.
        measured = None if name == "float32" else most_tokens(first, second, device_kind)
        if tokens <= (table[first] if measured is None else measured):
            return first
    return "dequantize"
