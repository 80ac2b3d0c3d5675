"""Checks token ids."""

from numpy.typing import ArrayLike

from pallas_kernels.errors import SpqrError
from spqr_jax.texts import integer_ids


def check_vocabulary(ids: ArrayLike, vocab_size: int) -> None:
    """Raises a SpqrError where token ids are no integers, or names the first that is outside [0, vocab_size)."""
    flat = integer_ids(ids).reshape(-1)
    outside = flat[(flat < 0) | (flat >= vocab_size)]
    if outside.size:
        raise SpqrError(f"token id {outside[0]} is outside the vocabulary of {vocab_size} tokens")
