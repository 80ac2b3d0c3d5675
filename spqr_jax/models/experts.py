"""Mixtures of experts: stacked matrices, the routing of tokens to them, and products of tokens grouped by expert."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels import SplitTensor, SpqrTensor
from pallas_kernels.format.stacks import stack, stack_arrays
from spqr_jax.models.layers import linear, parameter
from spqr_jax.models.row_major import RowMajor

Stack = Float[Array | np.ndarray, "experts in out"] | RowMajor | SpqrTensor | SplitTensor
"""The matrices of all experts: every array of a `Kernel` with a leading axis."""

MOST_ROWS = 128
"""Most rows of a group."""

FEW_ROWS = 16
"""Most groups of one row whose products are not computed in a loop."""

_ELEMENT = re.compile(r"(?P<layer>.+)\[(?P<index>\d+)\]")


class Groups(NamedTuple):
    """Rows grouped by expert; an expert has as many groups as its rows fill, the last one in part.

    Attributes:
      experts: expert of each group.
      rows: row at each place of each group; at an empty place, the number of rows.
      places: where each row is, counted over the places of all groups.
    """

    experts: Int[Array, " groups"]
    rows: Int[Array, "groups places"]
    places: Int[Array, " rows"]


def route(
    logits: Float[Array, "*batch experts"], count: int, *, normalize: bool
) -> tuple[Int[Array, "*batch count"], Float[Array, "*batch count"]]:
    """The `count` likeliest experts of each token, and their weights: softmax(logits) over all experts, in float32.

    Args:
      logits: product of the router.
      count: experts for each token.
      normalize: divide the weights of a token by their sum.

    Example:
      >>> chosen, weights = route(jnp.log(jnp.array([0.5, 0.25, 0.125, 0.125])), 2, normalize=False)
      >>> chosen.tolist(), weights.tolist()
      ([0, 1], [0.5, 0.25])
    """
    weights, chosen = jax.lax.top_k(jax.nn.softmax(logits.astype(jnp.float32)), count)
    return chosen, weights / jnp.sum(weights, axis=-1, keepdims=True) if normalize else weights


def group_rows(chosen: Int[Array, " rows"], experts: int) -> Groups:
    """Groups rows by the expert that each has chosen. The number of groups depends on the shapes alone.

    Example:
      >>> groups = group_rows(jnp.array([1, 0, 1, 1]), 2)
      >>> groups.experts.tolist(), groups.rows.tolist()
      ([0, 1, 1], [[1, 4], [0, 2], [3, 4]])
    """
    rows = len(chosen)
    height = min(1 << max(rows // experts, 1).bit_length() - 1, MOST_ROWS)
    count = (rows + min(experts, rows) * (height - 1)) // height
    order = jnp.argsort(chosen, stable=True)
    counts = jnp.bincount(chosen, length=experts)
    groups = -(-counts // height)
    ends = jnp.cumsum(groups)
    of_sorted = chosen[order]
    rank = jnp.arange(rows) - (jnp.cumsum(counts) - counts)[of_sorted]
    place = height * (ends - groups)[of_sorted] + rank
    return Groups(
        experts=jnp.minimum(jnp.searchsorted(ends, jnp.arange(count), side="right"), experts - 1),
        rows=jnp.full(count * height, rows).at[place].set(order).reshape(count, height),
        places=jnp.zeros(rows, place.dtype).at[order].set(place),
    )


def rows_of_experts(
    x: Float[Array, "*rows in"], chosen: Int[Array, "*batch count"]
) -> tuple[Float[Array, "inputs in"], int]:
    """The inputs of experts as rows, and how many of all choices, in order, have the same one.

    Args:
      x: one input for each token, or one for each token and choice.
      chosen: experts of each token.
    """
    return x.reshape(-1, x.shape[-1]), chosen.shape[-1] if x.ndim == chosen.ndim else 1


def experts_linear(
    x: Float[Array, "*rows in"], kernel: Stack, chosen: Int[Array, "*batch count"]
) -> Float[Array, "*batch count out"]:
    """y = x W_eᵀ for each expert e that a token has chosen.

    Tokens are grouped by expert, so that a group takes one product, and its matrix is read once.

    Args:
      x: one input for each token, or one for each token and choice.
      kernel: the matrices of all experts.
      chosen: experts of each token.

    Example:
      >>> kernel = jnp.stack([jnp.eye(4), 10 * jnp.eye(4)])
      >>> experts_linear(jnp.ones((1, 4)), kernel, jnp.array([[1, 0]]))[..., 0].tolist()
      [[10.0, 1.0]]
    """
    inputs, repeated = rows_of_experts(x, chosen)
    # In a split matrix, the parts come first.
    axis = 1 if isinstance(kernel, SplitTensor) else 0
    groups = group_rows(chosen.reshape(-1), jax.tree.leaves(kernel)[0].shape[axis])

    def step(carry: None, group: tuple[Int[Array, ""], Int[Array, " places"]]) -> tuple[None, Array]:
        expert, rows = group
        own: Any = jax.tree.map(lambda array: jnp.asarray(array).take(expert, axis), kernel)
        # What an empty place multiplies is not read.
        return carry, linear(jnp.take(inputs, rows // repeated, axis=0, mode="clip"), own)

    # Of single rows, as in decoding: in a loop, XLA would copy the matrices of all experts from stacked blocks.
    unroll = len(groups.experts) <= FEW_ROWS and groups.rows.shape[1] == 1
    products = jax.lax.scan(step, None, (groups.experts, groups.rows), unroll=unroll)[1]
    return products.reshape(-1, products.shape[-1])[groups.places].reshape(*chosen.shape, -1)


class ExpertsLinear(nn.Module):
    """`experts_linear` with the module's own `kernel`."""

    experts: int
    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "*rows in"], chosen: Int[Array, "*batch count"]) -> Array:
        shape = self.experts, x.shape[-1], self.features
        kernel: Stack = parameter(self, "kernel", nn.initializers.lecun_normal(batch_axis=0), shape)
        return experts_linear(x, kernel, chosen)


def matrix_names(layer: str, experts: int | None) -> tuple[str, ...]:
    """The names of the matrices of a layer: its own, or those of its experts.

    Example:
      >>> matrix_names("up_proj", None), matrix_names("up_proj", 2)
      (('up_proj',), ('up_proj[0]', 'up_proj[1]'))
    """
    return (layer,) if experts is None else tuple(f"{layer}[{index}]" for index in range(experts))


def layer_of(matrix: str) -> str:
    """The layer of a matrix, by the matrix's name of `matrix_names`.

    Example:
      >>> layer_of("up_proj"), layer_of("up_proj[3]")
      ('up_proj', 'up_proj')
    """
    found = _ELEMENT.fullmatch(matrix)
    return matrix if found is None else found["layer"]


def kernel_of(params: Mapping[str, Any], matrix: str) -> Any:
    """The kernel of a matrix, by its name of `matrix_names`, from the parameters of a block."""
    found = _ELEMENT.fullmatch(matrix)
    if found is None:
        return params[matrix]["kernel"]
    return jax.tree.map(lambda array: array[int(found["index"])], params[found["layer"]]["kernel"])


def with_kernels(params: Mapping[str, Any], kernels: Mapping[str, Any]) -> dict[str, Any]:
    """A block's parameters with some kernels replaced, given by names of `matrix_names`; those of experts are stacked.

    Example:
      >>> params = {"up": {"kernel": np.zeros((2, 8, 4))}}
      >>> with_kernels(params, {"up[0]": np.ones((8, 4)), "up[1]": np.ones((8, 4))})["up"]["kernel"].shape
      (2, 8, 4)
    """
    whole: dict[str, Any] = {}
    for matrix, kernel in kernels.items():
        found = _ELEMENT.fullmatch(matrix)
        if found is None:
            whole[matrix] = kernel
        else:
            whole.setdefault(found["layer"], []).append(kernel)
    stacked = {name: _stacked(kernel) if isinstance(kernel, list) else kernel for name, kernel in whole.items()}
    return {**params, **{name: params[name] | {"kernel": kernel} for name, kernel in stacked.items()}}


def _stacked(kernels: list[Any]) -> Any:
    return stack(kernels) if isinstance(kernels[0], SpqrTensor) else stack_arrays(*kernels)
