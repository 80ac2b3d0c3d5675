"""Parameters spread over the devices of a mesh: tensor parallelism, as in Megatron (Shoeybi et al. 2019).

Matrices fed with an input that every device has are split by rows, so that each device computes some heads or some
features of the MLP. Those that multiply the heads' or the MLP's results are split by columns, and a sum over the
devices ends the attention and the MLP. The blocks declare which matrices are split by columns.
"""

from collections.abc import Sequence
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from pallas_kernels import SplitTensor, SpqrTensor, split_columns, split_rows
from pallas_kernels.errors import SpqrError
from pallas_kernels.format.rows import rows_together
from pallas_kernels.format.stacks import element, pad, pad_alike
from pallas_kernels.sharded import By
from spqr_jax.models.decoder import Decoder, Params, fused_name
from spqr_jax.models.stacked_blocks import layers_of, unstack_blocks
from spqr_jax.runtime.placement import Placement

Dense = Array | np.ndarray
Tree = TypeVar("Tree", Params, list[Params])


def shard_params(params: Params, model: Decoder, mesh: Mesh) -> Params:
    """Spreads the parameters of a model over the devices of a mesh; the model then runs on all of them.

    Packed matrices become a `SplitTensor`, and each device holds its part. Dense matrices are split alike, the
    embedding and the head by the vocabulary. What does not divide stays whole on every device: heads by the number of
    devices, rows by that and a statistics group, columns by that and a group. So do norms.

    Args:
      params: parameters of `model`, stacked or not, in host memory or on a device, their projections not fused.
      model: the Flax module.
      mesh: the devices; it may have several axes, which count as one.

    Returns:
      Parameters with the blocks unstacked, for `model.apply`, `generate` and `perplexity`. They cannot be saved or
      exported: keep the ones given for that.

    Raises:
      SpqrError: there are no blocks, projections are fused, or the parameters are split already.

    Example:
      >>> sharded = shard_params(params, model, jax.make_mesh((jax.device_count(),), ("model",)))
      >>> prompts = [[84, 104], [28]]
      >>> generate(model, sharded, prompts, max_new_tokens=2) == generate(model, params, prompts, max_new_tokens=2)
      True
    """
    over = Placement(mesh)
    layers = layers_of(unstack_blocks(params))
    for layer in layers.values():
        _check(layer, model)
    block = model.new_block()
    sharded: dict[str, Params] = {name: {} for name in layers}
    for key in layers["layers_0"]:
        parts = [layer[key] for layer in layers.values()]
        if key in block.matrices():
            by: By = "columns" if key in block.by_columns else "rows"
            parts = _linear_layers(parts, by, block.heads().get(key), over)
        else:
            parts = _whole(parts, over)
        for layer, part in zip(sharded.values(), parts, strict=True):
            layer[key] = part
    rest = {key: _whole(params[key], over) for key in params if key not in (*layers, "blocks")}
    embedding = params["embed_tokens"]["embedding"]
    if isinstance(embedding, SpqrTensor) and _divides(embedding, "rows", None, over.shares):
        rest["embed_tokens"] |= {"embedding": _split([embedding], "rows", over)[0]}
    elif not isinstance(embedding, SpqrTensor) and len(embedding) % over.shares == 0:
        rest["embed_tokens"] |= {"embedding": over.put(embedding, 0)}
    if "lm_head" in params:
        (rest["lm_head"],) = _linear_layers([params["lm_head"]], "rows", None, over)
    return {**rest, **sharded}


def _check(layer: Params, model: Decoder) -> None:
    for names in model.new_block().feeds().values():
        if len(names) > 1 and fused_name(names) in layer:
            raise SpqrError(f"{fused_name(names)} cannot be split; shard the parameters from before they were fused")
    if any(isinstance(part.get("kernel"), SplitTensor) for part in layer.values()):
        raise SpqrError("the parameters are split over devices already; shard those that they were made from")


def _linear_layers(layers: Sequence[Params], by: By, heads: int | None, over: Placement) -> list[Params]:
    """Puts one linear layer of every block on the devices."""
    kernels = [layer["kernel"] for layer in layers]
    if not all(_divides(kernel, by, heads, over.shares) for kernel in kernels):
        return _whole(list(layers), over)
    biases = 0 if by == "rows" else None
    return [
        {"kernel": kernel} | ({"bias": over.put(layer["bias"], biases)} if "bias" in layer else {})
        for kernel, layer in zip(_split(kernels, by, over), layers, strict=True)
    ]


def _divides(kernel: Dense | SpqrTensor, by: By, heads: int | None, devices: int) -> bool:
    if isinstance(kernel, SpqrTensor):
        (out, columns), rows, group_size = kernel.shape, rows_together(kernel), kernel.group_size
    else:
        (*_, columns, out), rows, group_size = kernel.shape, 1, 1
    if by == "columns":
        return columns % (devices * group_size) == 0
    return out % (devices * rows) == 0 and (heads or devices) % devices == 0


def _split(kernels: Sequence[Dense | SpqrTensor], by: By, over: Placement) -> list[Array | SplitTensor]:
    """The kernels of one layer of every block, their parts with room for the same number of outliers."""
    assert over.mesh is not None
    # In host memory until all of them are known: no device needs room for more than one whole matrix.
    split = {
        index: jax.device_get(_parts(kernel, by, over.shares))
        for index, kernel in enumerate(kernels)
        if isinstance(kernel, SpqrTensor)
    }
    padded = dict(zip(split, pad_alike([parts for parts, _ in split.values()]), strict=True))
    found: list[Array | SplitTensor] = []
    for index, kernel in enumerate(kernels):
        if isinstance(kernel, SpqrTensor):
            parts, features = jax.tree.map(lambda array: over.put(array, 0), (padded[index], split[index][1]))
            found.append(SplitTensor(parts, features, by=by, mesh=over.mesh))
        else:
            found.append(over.put(kernel, kernel.ndim - (1 if by == "rows" else 2)))
    return found


def _parts(kernel: SpqrTensor, by: By, count: int) -> tuple[SpqrTensor, Dense | None]:
    """`split_rows` or `split_columns`; of a stack, of each matrix, the stack's axis behind that of the parts."""
    if not kernel.stack:
        return (split_rows(kernel, count), None) if by == "rows" else split_columns(kernel, count)
    parts, features = zip(*(_parts(element(kernel, i), by, count) for i in range(kernel.stack[0])), strict=True)
    pairs: list[Any] = list(zip(pad(parts), features, strict=True))
    return cast("tuple[SpqrTensor, Dense | None]", jax.tree.map(lambda *arrays: jnp.stack(arrays, axis=1), *pairs))


def _whole(tree: Tree, over: Placement) -> Tree:
    """Copies arrays to every device."""
    return jax.tree.map(lambda array: over.put(array, None), tree)
