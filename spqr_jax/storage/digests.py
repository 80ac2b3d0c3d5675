"""Checksums and comparisons of arrays, which tell models, calibration tokens and texts apart."""

import hashlib

import jax
import numpy as np
from jaxtyping import PyTree, Shaped


def digest(tree: PyTree[Shaped[np.ndarray | jax.Array, "..."]]) -> str:
    """Checksum of names, types, shapes and values of arrays.

    Example:
      >>> digest(np.arange(3, dtype=np.int32))
      'BLAKE2b ...'
    """
    digest = hashlib.blake2b(digest_size=8)
    for path, leaf in jax.tree.leaves_with_path(tree):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
        digest.update(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data)
    return f"BLAKE2b {digest.hexdigest()}"


def identical(first: Shaped[np.ndarray, "..."], second: Shaped[np.ndarray, "..."]) -> bool:
    """Whether two arrays have the same type, shape and bits.

    Example:
      >>> identical(np.array([0.0]), np.array([-0.0])), identical(np.array([np.nan]), np.array([np.nan]))
      (False, True)
    """
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    return np.array_equal(_bits(first), _bits(second))


def _bits(array: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, " bytes"]:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
