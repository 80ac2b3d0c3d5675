"""Random inputs of a matrix, their moments, and a weight."""

import jax
import numpy as np
import pytest

from spqr_jax.quantization.moments import InputMoments, complete, moment_sums

IN, OUT = 40, 24


@pytest.fixture(scope="module")
def inputs() -> tuple[np.ndarray, ...]:
    """Correlated inputs in a quantized model and, a little different, in the original one; and h₀ − h."""
    rng = np.random.default_rng(0)
    original = rng.standard_normal((3, 50, IN)) @ rng.standard_normal((IN, IN))
    quantized = original + 2 * rng.standard_normal(original.shape)
    residual = quantized @ rng.standard_normal((IN, OUT)) / 10 + rng.standard_normal((3, 50, OUT))
    return tuple(x.astype(np.float32) for x in (quantized, original, residual))


@pytest.fixture(scope="module")
def moments(inputs: tuple[np.ndarray, ...]) -> InputMoments:
    return complete(jax.jit(moment_sums)(*inputs), len(inputs[0]))


@pytest.fixture(scope="module")
def weight() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((OUT, IN), np.float32)
