"""Checks token ids."""

import numpy as np
from numpy.typing import ArrayLike

from pallas_kernels.errors import SpqrError


def check_vocabulary(ids: ArrayLike, vocab_size: int) -> None:
    """Raises a SpqrError that names the first token id outside [0, vocab_size)."""
    flat = np.asarray(ids).reshape(-1)
    outside = flat[(flat < 0) | (flat >= vocab_size)]
    if outside.size:
        raise SpqrError(f"token id {outside[0]} is outside the vocabulary of {vocab_size} tokens")
