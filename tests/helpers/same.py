"""Trees of arrays that are equal."""

from typing import Any

import jax
import numpy as np


def assert_identical(found: Any, expected: Any) -> None:
    """Equal in structure, types, shapes and bits."""

    def check(a: Any, b: Any) -> None:
        assert (a.dtype, a.shape, np.asarray(a).tobytes()) == (b.dtype, b.shape, np.asarray(b).tobytes())

    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(check, found, expected)


def assert_equal(found: Any, expected: Any) -> None:
    """Equal in structure and values."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
