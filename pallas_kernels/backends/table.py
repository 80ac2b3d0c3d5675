"""The backends by name, and the choice between them."""

from typing import Literal, TypeAlias

from jax.typing import DTypeLike
from numpy import dtype as numpy_dtype

from pallas_kernels.backends import triton, xla
from pallas_kernels.backends.backend import Backend
from pallas_kernels.backends.devices import describe
from pallas_kernels.errors import SpqrError

Implementation: TypeAlias = Literal["pallas", "xla", "interpret"] | str
"""The name of a backend in `BACKENDS`: one of those that the library brings, or one that was added."""

BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        triton.PALLAS,
        xla.XLA,
        triton.INTERPRET,
    )
}
"""All backends, in order of preference."""


def choose(implementation: Implementation | None, dtype: DTypeLike | None = None) -> Backend:
    """Looks up a backend, or the first one of the table that can serve where none is named.

    Args:
      implementation: a name in `BACKENDS`, or None.
      dtype: type of the activations; None if there are none.

    Raises:
      SpqrError: no backend has this name, or it needs another device, or it does not take this type.

    Example:
      >>> choose("interpret").kernels
      True
      >>> choose("cuda")
      Traceback (most recent call last):
      pallas_kernels.errors.SpqrError: implementation is 'cuda', but must be 'pallas', 'xla', 'interpret' or None
    """
    name = None if dtype is None else numpy_dtype(dtype).name

    def takes(backend: Backend) -> bool:
        return name is None or backend.dtypes is None or name in backend.dtypes

    if implementation is None:
        return next(b for b in BACKENDS.values() if b.automatic and takes(b) and b.available())
    if implementation not in BACKENDS:
        names = ", ".join(map(repr, BACKENDS))
        raise SpqrError(f"implementation is {implementation!r}, but must be {names} or None")
    backend = BACKENDS[implementation]
    if not backend.available():
        raise SpqrError(
            f"implementation={implementation!r} needs {backend.needs}, but JAX computes on {describe()}; "
            "leave it out, or ask for 'xla'"
        )
    if not takes(backend):
        raise SpqrError(
            f"implementation={implementation!r} takes activations in {', '.join(backend.dtypes or ())}, not {name}; "
            "convert them, or ask for 'xla'"
        )
    return backend
