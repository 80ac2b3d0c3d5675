"""Checksums of arrays, which tell models, calibration tokens and texts apart."""

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
