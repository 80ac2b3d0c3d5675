"""Which kernel multiplies how many tokens."""

from typing import Literal

from jax.typing import DTypeLike
from numpy import dtype as numpy_dtype

Regime = Literal["fma", "mma", "dequantize"]

MOST_TOKENS: dict[str, dict[Regime, int]] = {
    "bfloat16": {"fma": 1, "mma": 128},
    "float16": {"fma": 1, "mma": 128},
    # Tensor cores would round float32 activations.
    "float32": {"fma": 8},
}
"""For each type of activations the regimes in order, each with the most tokens it is used for; more are dequantized.

From the predicted times of the kernels on an H100 (`python -m pallas_kernels.aot`): the tensor core kernel overtakes
the other at two tokens, and is overtaken by writing the weight out, at 2 bytes each, beyond 128.
"""


def regime(tokens: int, dtype: DTypeLike) -> Regime:
    """The regime of so many tokens.

    Raises:
      ValueError: there are no kernels for activations of this type.

    Example:
      >>> regime(16, jnp.bfloat16)
      'mma'
    """
    name = numpy_dtype(dtype).name
    if name not in MOST_TOKENS:
        raise ValueError(f"the Pallas kernels take activations in {', '.join(MOST_TOKENS)}, not {name}")
    return next((regime for regime, most in MOST_TOKENS[name].items() if tokens <= most), "dequantize")
