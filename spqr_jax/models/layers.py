"""Linear layers, whose weight is dense or packed, and norms."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from pallas_kernels import SplitTensor, SpqrTensor, split_matmul, spqr_matmul
from spqr_jax.models.row_major import RowMajor, row_major_product

Kernel = Float[Array | np.ndarray, "in out"] | RowMajor | SpqrTensor | SplitTensor
"""A weight: dense, unpacked for a CPU, packed, or packed and split over devices."""


def linear(
    x: Float[Array, "*batch in"],
    kernel: Kernel,
    bias: Float[Array | np.ndarray, " out"] | None = None,
) -> Float[Array, "*batch out"]:
    """y = x Wᵀ + b; `kernel` is a dense `[in, out]` array, or another type of `Kernel`, of shape `(out, in)`.

    This is the only function of a model that knows packed weights.
    """
    if isinstance(kernel, SplitTensor):
        y = split_matmul(x, kernel)
    elif isinstance(kernel, SpqrTensor):
        y = spqr_matmul(x, kernel)
    elif isinstance(kernel, RowMajor):
        y = row_major_product(x, kernel)
    else:
        y = jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=jnp.float32).astype(x.dtype)
    return y if bias is None else y + bias.astype(x.dtype)


def mesh_of(params: object) -> Mesh | None:
    """The mesh over which matrices of a parameter tree are split; None where none is."""
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, SplitTensor))
    return next((leaf.mesh for leaf in leaves if isinstance(leaf, SplitTensor)), None)


def parameter(module: nn.Module, name: str, initializer: nn.initializers.Initializer, shape: tuple[int, ...]) -> Any:
    """A parameter of a module, in whatever form it was given; a new one is dense.

    Flax's own `param` compares shapes, which a packed weight does not have.
    """
    if module.has_variable("params", name):
        return module.get_variable("params", name)
    return module.param(name, initializer, shape)


class Linear(nn.Module):
    """`linear` with the module's own `kernel` and, if it has one, `bias`."""

    features: int
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        kernel: Kernel = parameter(self, "kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,)) if self.use_bias else None
        return linear(x, kernel, bias)


def _divided_by_rms(x: Float[Array, "*batch features"], epsilon: float) -> Float[Array, "*batch features"]:
    """x / sqrt(mean(x²) + epsilon) in float32."""
    x32 = x.astype(jnp.float32)
    return x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + epsilon)


class RMSNorm(nn.Module):
    """x · scale / sqrt(mean(x²) + epsilon), the mean taken in float32 (Zhang and Sennrich 2019)."""

    epsilon: float

    @nn.compact
    def __call__(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch features"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        normal = _divided_by_rms(x, self.epsilon)
        return normal.astype(x.dtype) * scale.astype(x.dtype)


class OffsetRMSNorm(nn.Module):
    """x · (1 + scale) / sqrt(mean(x²) + epsilon), all in float32: a weight of Gemma is its distance from 1."""

    epsilon: float

    @nn.compact
    def __call__(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch features"]:
        scale = self.param("scale", nn.initializers.zeros, (x.shape[-1],))
        normal = _divided_by_rms(x, self.epsilon)
        return (normal * (1.0 + scale.astype(jnp.float32))).astype(x.dtype)


class LayerNorm(nn.Module):
    """(x − mean(x)) · scale / sqrt(var(x) + epsilon) + bias, all in float32 (Ba et al. 2016)."""

    epsilon: float

    @nn.compact
    def __call__(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch features"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        x32 = x.astype(jnp.float32)
        centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        normal = centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + self.epsilon)
        return (normal * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)
