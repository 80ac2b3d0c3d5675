"""Whether a function is being traced by JAX."""

import jax
from jaxtyping import PyTree


def is_traced(tree: PyTree) -> bool:
    """Whether any array of a tree is a tracer: its shape is known, its values are not."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))
