"""Parameters with every packed matrix unpacked once, in the forms in which a CPU decodes and measures fastest."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels import SpqrTensor, spqr_dequantize
from pallas_kernels.backends.devices import platform
from pallas_kernels.errors import SpqrError
from pallas_kernels.format.stacks import pad_alike
from spqr_jax.models.decoder import Decoder, Params, fused_name
from spqr_jax.models.layers import mesh_of
from spqr_jax.models.row_major import RowMajor
from spqr_jax.models.stacked_blocks import block_names, stack_blocks
from spqr_jax.runtime.memory import ALIGNMENT, Memory, aligned, available_bytes
from spqr_jax.runtime.x64 import in_32_bits

Dense = Float[Array | np.ndarray, "*stack _ _"]
Kernels = tuple[Dense | SpqrTensor, ...]

HEAD_PIECES = 8
"""Steps of the product with the head."""

SHARE = 0.8
"""Share of the available memory that unpacked weights may take."""


def unpacks(params: Params, memory: Memory | str, bytes_per_weight: int) -> bool:
    """Whether the matrices of a model shall be unpacked for computing.

    Never for a GPU or a TPU, for weights that are spread over several devices, or for stacked blocks: whoever stacked
    them has chosen their form.

    Args:
      params: parameters of a `Decoder`.
      memory: the user's choice; `auto` asks whether the unpacked weights fit.
      bytes_per_weight: of a packed matrix once it is unpacked.

    Raises:
      SpqrError: `memory` is none of its values.

    Example:
      >>> unpacks(quantized, "packed", 2), unpacks(quantized, "unpacked", 2)
      (False, True)
    """
    if memory not in list(Memory):
        raise SpqrError(f"memory is {str(memory)!r}, but must be 'auto', 'packed' or 'unpacked'")
    names = block_names(params)
    if memory == Memory.PACKED or names in ([], ["blocks"]) or platform() != "cpu" or _is_spread(params):
        return False
    return memory == Memory.UNPACKED or unpacked_bytes(params, bytes_per_weight) < SHARE * available_bytes()


def unpacked_bytes(params: Params, bytes_per_weight: int) -> int:
    """Bytes of all parameters once the packed matrices are unpacked.

    Example:
      >>> blocks = {name: quantized[name] for name in ("layers_0", "layers_1")}
      >>> unpacked_bytes(blocks, 4) == unpacked_bytes({name: params[name] for name in blocks}, 4)
      True
    """

    def size(leaf: Array | np.ndarray | SpqrTensor) -> int:
        return leaf.size * bytes_per_weight if isinstance(leaf, SpqrTensor) else leaf.nbytes

    return sum(map(size, jax.tree.leaves(params, is_leaf=_is_packed)))


def in_rows(params: Params, model: Decoder) -> Params:
    """Stacked parameters with every matrix a `RowMajor`, those of one input fused: the form for decoding on a CPU.

    A packed matrix is rounded to float16, with an error of at most 2⁻¹² of a weight; that of 4 bits is some 2⁻⁵ of the
    largest. A dense matrix keeps its values: in float16 where they are of 16 bits, as most checkpoints', else in
    float32. A tied embedding becomes the head as well.

    Args:
      params: parameters of `model`, not stacked; packed, dense or partly so.
      model: the Flax module.

    Example:
      >>> sorted(in_rows(quantized, model)["blocks"]["q_proj+k_proj+v_proj"])
      ['kernel']
    """
    blocks, block = [params[name] for name in block_names(params)], model.new_block()
    layers = {fused_name(fused): fused for names in block.feeds().values() for fused in _fusable(blocks, names)}
    entries = _by_name(lambda name: _linear_in_rows(blocks, layers[name]), list(layers))
    rest = {key: value for key, value in params.items() if key not in block_names(params)}
    embedding = _table_in_rows(params["embed_tokens"]["embedding"])
    if not model.config.tie_embeddings:
        head = _head(params["lm_head"]["kernel"])
    elif isinstance(embedding, RowMajor):
        head = embedding
    else:
        head = _head(params["embed_tokens"]["embedding"].T)
    rest["embed_tokens"] = {**params["embed_tokens"], "embedding": embedding}
    rest["lm_head"] = {**rest.get("lm_head", {}), "kernel": replace(head, pieces=HEAD_PIECES)}
    return jax.device_put({**rest, "blocks": {**_others(blocks, [*entries, *block.matrices()]), **entries}})


@in_32_bits
def for_measuring(params: Params, memory: Memory | str = Memory.AUTO) -> Params:
    """Puts parameters on the device in the form that runs long sequences fastest, blocks stacked.

    On a CPU packed matrices are unpacked once, exactly, to float32. Elsewhere they are unpacked for each batch.

    Args:
      params: parameters of a `Decoder`; stacked ones keep their form.
      memory: on a CPU, `unpacked` or `packed`; `auto` unpacks where the weights fit into the available memory.

    Raises:
      SpqrError: `memory` is none of these.

    Example:
      >>> for_measuring(quantized)["blocks"]["q_proj"]["kernel"].shape
      (2, 64, 64)
    """
    packed = any(map(_is_packed, jax.tree.leaves(params, is_leaf=_is_packed)))
    if unpacks(params, memory, bytes_per_weight=4) and packed:
        return _dense(params)
    return jax.device_put(stack_blocks(params))


def form_of(params: Params) -> str:
    """Whether matrices are packed, and the bytes of all parameters, in words.

    Example:
      >>> form_of(for_measuring(quantized))
      'unpacked to float32, 0.4 MB'
    """
    leaves = jax.tree.leaves(params.get("blocks", params), is_leaf=_is_matrix)
    matrices = [leaf for leaf in leaves if _is_packed(leaf)]
    # The embedding may be the head, too: an array counts once.
    size = sum({id(leaf): leaf.nbytes for leaf in jax.tree.leaves(params)}.values()) / 1e6
    if matrices:
        return f"packed, {size:.1f} MB"
    widest = max((leaf for leaf in jax.tree.leaves(leaves) if leaf.ndim > 2), key=lambda leaf: leaf.size)
    return f"unpacked to {widest.dtype.name}, {size:.1f} MB"


def _dense(params: Params) -> Params:
    blocks = [params[name] for name in block_names(params)]

    def columns(name: str) -> Params:
        kernels = _levelled([(block[name]["kernel"],) for block in blocks])
        return {**_biases([[block[name]] for block in blocks]), "kernel": _device(_gathered(kernels, _columns))}

    entries = _by_name(columns, [name for name, part in blocks[0].items() if "kernel" in part])
    rest = {key: value for key, value in params.items() if key not in block_names(params)}
    rest = jax.tree_util.tree_map_with_path(_dense_end, rest, is_leaf=_is_packed)
    return jax.device_put({**rest, "blocks": {**_others(blocks, [*entries]), **entries}})


def _dense_end(path: tuple[jax.tree_util.DictKey, ...], leaf: Array | np.ndarray | SpqrTensor) -> Array | np.ndarray:
    """A parameter of embedding, last norm or head: a packed kernel as `[in, out]`, a packed table by its rows."""
    if not isinstance(leaf, SpqrTensor):
        return leaf
    return _columns((leaf,)) if path[-1].key == "kernel" else spqr_dequantize(leaf)


def _by_name(unpack: Callable[[str], Params], names: Sequence[str]) -> Params:
    """Calls a function for each name, with as many threads as cores: the calls compile and compute side by side."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        # Whether numbers have 32 bits is set for each thread.
        return dict(zip(names, pool.map(in_32_bits(unpack), names), strict=True))


def _is_exact(array: np.ndarray, dtype: DTypeLike) -> bool:
    """Whether a type holds all values of an array."""
    if array.dtype == dtype:
        return True
    # A prefix decides most cases.
    for part in (array.reshape(-1)[:4096], array):
        with np.errstate(over="ignore"):
            if not (part.astype(dtype).astype(array.dtype) == part).all():
                return False
    return True


def _fusable(blocks: Sequence[Params], names: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The names of matrices of one input in groups that can be one matrix: all of them, or each alone."""
    if len(names) == 1 or any(fused_name(names) in block for block in blocks):
        return [names]
    alike = all(len({frozenset(block[name]) for name in names}) == 1 for block in blocks)
    return [names] if alike else [(name,) for name in names]


def _linear_in_rows(blocks: Sequence[Params], names: tuple[str, ...]) -> Params:
    """A linear layer of every block, or several fused ones, its kernel a stacked `RowMajor`."""
    of_blocks = [(fused_name(names),) if fused_name(names) in block else names for block in blocks]
    layers = [[block[name] for name in own] for block, own in zip(blocks, of_blocks, strict=True)]
    kernels = _levelled([tuple(layer["kernel"] for layer in block) for block in layers])
    dtype = _type_in_rows([kernel for block in kernels for kernel in block])
    divisors: list[Array] = []

    def unpack(block: Kernels) -> Array:
        weight, divisor = _rows(block, dtype)
        divisors.append(divisor)
        return weight

    weight = _device(_gathered(kernels, unpack))
    return {**_biases(layers), "kernel": RowMajor(weight, jnp.stack(divisors))}


def _table_in_rows(table: Dense | SpqrTensor) -> RowMajor | Array:
    """A table of embeddings in float16 where that holds its values, or rounds a packed one's; else in float32."""
    if isinstance(table, SpqrTensor):
        return _head(table)
    # XLA for CPUs converts all of a table in bfloat16 before it looks up a row.
    if _is_exact(np.asarray(table), jnp.float16):
        return RowMajor(_device(np.asarray(table, np.float16)), jnp.ones(table.shape[1]))
    return _device(np.asarray(table, np.float32))


def _head(kernel: Dense | SpqrTensor) -> RowMajor:
    weight, divisor = _rows((kernel,), _type_in_rows([kernel]))
    return RowMajor(_device(np.asarray(weight)), divisor)


def _type_in_rows(kernels: Sequence[Dense | SpqrTensor]) -> str:
    """`float16`, or `float32` where a dense matrix has values that no type of 16 bits holds."""
    dense = (np.asarray(kernel) for kernel in kernels if not _is_packed(kernel))
    narrow = all(any(_is_exact(kernel, dtype) for dtype in (jnp.float16, jnp.bfloat16)) for kernel in dense)
    return "float16" if narrow else "float32"


def _biases(layers: Sequence[Sequence[Params]]) -> Params:
    """The stacked biases of each block's linear layers that become one, if they have any."""
    if "bias" not in layers[0][0]:
        return {}
    return {"bias": np.stack([np.concatenate([np.asarray(layer["bias"]) for layer in block]) for block in layers])}


def _others(blocks: Sequence[Params], names: Sequence[str]) -> Params:
    """The stacked parameters of blocks under other names: norms, and matrices that are not quantized."""
    kept = [{name: part for name, part in block.items() if name not in names} for block in blocks]
    return jax.tree.map(lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves]), *kept)


def _levelled(kernels: Sequence[Kernels]) -> list[Kernels]:
    """Kernels of all blocks, alike ones with room for the same number of outliers: one program then unpacks them."""
    packed = iter(pad_alike([kernel for block in kernels for kernel in block if _is_packed(kernel)]))
    return [tuple(next(packed) if _is_packed(kernel) else kernel for kernel in block) for block in kernels]


def _gathered(kernels: Sequence[Kernels], unpack: Callable[[Kernels], Array]) -> np.ndarray:
    """The unpacked weights of all blocks in one array."""
    first = np.asarray(unpack(kernels[0]))
    stacked = aligned((len(kernels), *first.shape), first.dtype)
    stacked[0] = first
    for index, block in enumerate(kernels[1:], 1):
        stacked[index] = unpack(block)
    return stacked


def _device(array: np.ndarray) -> Array:
    """An array on the device, where it is one already if it is aligned."""
    if array.flags.c_contiguous and array.ctypes.data % ALIGNMENT:
        copied = aligned(array.shape, array.dtype)
        copied[...] = array
        array = copied
    return jax.device_put(array, may_alias=True)


@partial(jax.jit, static_argnames="dtype")
def _rows(kernels: Kernels, dtype: str) -> tuple[Float[Array, "*stack out in"], Float[Array, "*stack in"]]:
    """The weights `[out, in]` of kernels, one below the other, in a type, and their divisors."""
    weight = jnp.concatenate([_unpacked(kernel) for kernel in kernels], axis=-2)
    divisor = jnp.ones((*weight.shape[:-2], weight.shape[-1]))
    if dtype == "float16":
        largest = jnp.max(jnp.abs(weight), axis=-2)
        _, exponent = jnp.frexp(largest)
        divisor = jnp.ldexp(divisor, jnp.where(largest > 0, 15 - exponent, 0))
    return (weight * divisor[..., None, :]).astype(dtype), divisor


@jax.jit
def _columns(kernels: Kernels) -> Float[Array, "*stack in out"]:
    (kernel,) = kernels
    # Unpacking in the order of the columns takes twice as long as unpacking and transposing.
    return jax.lax.optimization_barrier(_unpacked(kernel)).swapaxes(-1, -2)


def _unpacked(kernel: Dense | SpqrTensor) -> Float[Array, "*stack out in"]:
    if not isinstance(kernel, SpqrTensor):
        return jnp.asarray(kernel, jnp.float32).swapaxes(-1, -2)
    return jax.lax.map(spqr_dequantize, kernel) if kernel.stack else spqr_dequantize(kernel)


def _is_matrix(leaf: object) -> bool:
    return isinstance(leaf, SpqrTensor | RowMajor)


def _is_packed(leaf: object) -> TypeGuard[SpqrTensor]:
    return isinstance(leaf, SpqrTensor)


def _is_spread(params: Params) -> bool:
    """Whether the weights are split over a mesh, or an array is on several devices."""
    arrays = (leaf for leaf in jax.tree.leaves(params) if isinstance(leaf, jax.Array))
    return mesh_of(params) is not None or any(len(array.devices()) > 1 for array in arrays)
