"""Checks of weights and calibration tokens before, and of hidden states during, the long work."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, PyTree, Shaped

from pallas_kernels import SplitTensor, SpqrTensor, check_format
from pallas_kernels.errors import SpqrError
from pallas_kernels.format.bit_layout import BLOCK
from spqr_jax.config import SpqrConfig
from spqr_jax.models.decoder import Decoder, Params, layer_name
from spqr_jax.models.ending import HEAD, end_names, leaf_name
from spqr_jax.models.experts import matrix_names
from spqr_jax.models.token_ids import check_vocabulary
from spqr_jax.quantization.moments import FEATURES_PER_TOKEN
from spqr_jax.rules import Plan
from spqr_jax.runtime.placement import Placement
from spqr_jax.runtime.tracing import is_traced
from spqr_jax.texts import integer_ids

LARGEST_WEIGHT = 2.0**14
"""A quarter of float16's range: room for residuals and for the corrections of other columns' errors."""


def check_weights(params: Params, model: Decoder, plan: Plan) -> None:
    """Raises a SpqrError that names the first tensor that cannot be quantized, and why.

    Args:
      params: the parameter tree, or some of its top-level entries.
      model: the Flax module.
      plan: what to quantize its matrices to.
    """
    block = model.new_block()
    ends = {f"{name}.{leaf_name(name)}": name for name in end_names(model)}
    matrices = {
        f"{layer_name(index)}.{name}": matrix_names(f"{layer_name(index)}.{name}", block.experts().get(name))
        for index in range(model.config.num_layers)
        for name in block.matrices()
    }
    for path, leaf in flatten_dict(params, sep=".").items():
        name = ends.get(path, path.removesuffix(".kernel"))
        if isinstance(leaf, SpqrTensor | SplitTensor):
            raise SpqrError(f"{name} is quantized already: start from the original weights")
        if path in ends and (config := plan.find(name)) is not None:
            weight = leaf.T if name == HEAD else leaf
            rows = len(weight) + -len(weight) % rows_together(config)
            check_sizes(name, (rows, weight.shape[1]), config)
            check_values(name, weight)
        elif name in matrices and (config := plan.find(name)) is not None:
            kernels = leaf if leaf.ndim == 3 else (leaf,)
            for matrix, kernel in zip(matrices[name], kernels, strict=True):
                check_matrix(matrix, kernel.T, config)
        else:
            check_finite(name, leaf)


def check_matrix(name: str, weight: Float[Array | np.ndarray, "..."], config: SpqrConfig) -> None:
    """Raises a SpqrError that names a weight `[out, in]` with sizes or values that the format cannot hold."""
    check_sizes(name, weight.shape, config)
    check_values(name, weight)


def rows_together(config: SpqrConfig) -> int:
    """Rows whose statistics are stored together: a matrix has a multiple of them."""
    return BLOCK if config.scale_bits is None and config.zero_bits is None else config.stats_group_size


def check_sizes(name: str, shape: tuple[int, ...], config: SpqrConfig) -> None:
    """Raises a SpqrError that names a weight with a shape (out, in) that the format cannot hold."""
    try:
        check_format(
            *shape,
            bits=config.bits,
            group_size=config.group_size,
            scale_bits=config.scale_bits,
            zero_bits=config.zero_bits,
            stats_group_size=config.stats_group_size,
        )
    except SpqrError as error:
        raise SpqrError(f"{name}: {error}") from None


def check_values(name: str, weight: Float[Array | np.ndarray, "..."]) -> None:
    """Raises a SpqrError that names a weight with values that the format cannot hold."""
    check_finite(name, weight)
    if not is_traced(weight) and (largest := float(_largest(weight))) > LARGEST_WEIGHT:
        raise SpqrError(
            f"{name} has weights up to {largest:g}, but scales and outliers are float16: "
            f"scale it down to {LARGEST_WEIGHT:g}"
        )


def check_finite(name: str, array: Shaped[Array | np.ndarray, "..."]) -> None:
    """Raises a SpqrError that names an array with NaN or infinite values; traced arrays pass."""
    if is_traced(array):
        return
    if bad := array.size - int(_count_finite(array)):
        raise SpqrError(f"{name} has {bad} values that are NaN or infinite")


def check_tokens(calibration_tokens: ArrayLike, block: Params, model: Decoder) -> None:
    """Raises a SpqrError where calibration tokens are no integers, too few, too long or outside the vocabulary.

    Args:
      calibration_tokens: the tokens.
      block: parameters of one block; the input features of its matrices set the least number of tokens.
      model: the Flax module.
    """
    # Checked before they are an array of JAX, which wraps ids of more than 32 bits.
    tokens: Any = calibration_tokens if is_traced(calibration_tokens) else integer_ids(calibration_tokens)
    if tokens.ndim != 2:
        raise SpqrError(f"calibration tokens must have shape [sequences, tokens], not {tokens.shape}")
    widest = max(block[matrix]["kernel"].shape[-2] for matrix in model.new_block().matrices())
    if tokens.size * FEATURES_PER_TOKEN < widest:
        raise SpqrError(
            f"{tokens.size} calibration tokens are too few for matrices with {widest} input features: "
            f"give at least {-(-widest // FEATURES_PER_TOKEN)}, better {widest} or more"
        )
    if tokens.shape[1] > model.config.max_positions:
        raise SpqrError(
            f"calibration sequences have {tokens.shape[1]} tokens, but the model takes {model.config.max_positions}: "
            "give shorter sequences"
        )
    if not is_traced(tokens):
        check_vocabulary(tokens, model.config.vocab_size)


def check_shares(sequences: int, placement: Placement) -> None:
    """Raises a SpqrError where the devices cannot have equally many sequences."""
    if sequences % placement.shares:
        raise SpqrError(
            f"{sequences} calibration sequences cannot be shared evenly by {placement.shares} devices: give a multiple "
            f"of {placement.shares}"
        )


def check_hidden(streams: PyTree, name: str) -> None:
    """Raises a SpqrError that names the block whose output has NaN or infinite values; traced states pass."""
    for hidden in jax.tree.leaves(streams):
        if not is_traced(hidden) and not all(np.isfinite(sequence).all() for sequence in hidden):
            raise SpqrError(f"{name}: its output has values that are NaN or infinite on the calibration tokens")


def check_factorized(finite: bool, name: str, matrices: Sequence[str], config: SpqrConfig) -> None:
    """Raises a SpqrError that names the block and the matrices whose Hessian could not be factorized."""
    if not finite:
        raise SpqrError(
            f"{name}: the Hessian of the input of {', '.join(matrices)} cannot be factorized, not even with "
            f"{1000 * config.damping:g} of its mean diagonal added: look for NaNs or extreme values in the inputs"
        )


@jax.jit
def _largest(array: Float[Array, "..."]) -> Float[Array, ""]:
    return jnp.abs(array).max()


@jax.jit
def _count_finite(array: Shaped[Array, "..."]) -> Int[Array, ""]:
    return jnp.isfinite(array).sum()
