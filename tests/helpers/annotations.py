"""Checks annotations of the packages in every call: types by beartype, and shapes by jaxtyping."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import jax
import numpy as np
from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

PACKAGES = ("pallas_kernels", "spqr_jax", "converters")
# JAX also builds these with what stands for arrays: shapes, specifications, axes, or nothing.
PYTREES = ("SpqrTensor", "Outliers", "RowMajor", "SplitTensor", "State", "Context", "KVCache")

Function = TypeVar("Function", bound=Callable[..., Any])


def _is_value(leaf: Any) -> bool:
    """Whether a leaf is an array, and not the gradient of integers, which JAX gives the type float0."""
    return isinstance(leaf, jax.Array | np.ndarray) and leaf.dtype != jax.dtypes.float0


def check_packages() -> None:
    """Instruments every module of the packages that is imported from now on."""
    install_import_hook(PACKAGES, "helpers.annotations.check")


def check(function: Function) -> Function:
    """The function with its annotations checked; pytrees are checked only where all their leaves are arrays."""
    # An int may stand for a float, as for mypy.
    checked = beartype(function, conf=BeartypeConf(is_pep484_tower=True))
    if function.__qualname__.removesuffix(".__init__") not in PYTREES:
        return checked

    @wraps(function)
    def check_arrays(self: Any, *args: Any, **kwargs: Any) -> Any:
        leaves = [leaf for leaf in jax.tree.leaves((args, kwargs)) if not isinstance(leaf, int)]
        if leaves and all(_is_value(leaf) for leaf in leaves):
            checked(self, *args, **kwargs)

    return check_arrays  # type: ignore[return-value]
