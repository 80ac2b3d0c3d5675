"""Language models with random weights, generated on the device in the form that decoding uses."""

import functools
import itertools

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.aot import Format
from pallas_kernels.benchmark.matrices import WEIGHT, random_matrix
from pallas_kernels.format.tensor import SpqrTensor
from spqr_jax.models import Decoder, Llama, LlamaConfig, RotaryConfig, layer_name
from spqr_jax.models.decoder import Params, fused_name

MODELS: dict[str, Decoder] = {
    "llama-7b": Llama(
        LlamaConfig(
            vocab_size=32000,
            hidden_size=4096,
            mlp_size=11008,
            num_layers=32,
            num_heads=32,
            num_kv_heads=32,
            head_dim=128,
            rotary=RotaryConfig(),
        ),
        dtype=jnp.bfloat16,
    ),
    "tiny": Llama(
        LlamaConfig(
            vocab_size=256,
            hidden_size=64,
            mlp_size=96,
            num_layers=2,
            num_heads=4,
            num_kv_heads=4,
            head_dim=16,
            rotary=RotaryConfig(),
        ),
        dtype=jnp.bfloat16,
    ),
}


def random_params(model: Decoder, form: Format | None, seed: int = 0) -> Params:
    """Random parameters of a model, with the matrices of one input fused and the blocks not stacked.

    Args:
      model: a model whose matrices have no biases.
      form: format of the blocks' packed matrices. None: bfloat16. All other parameters are bfloat16.
      seed: seed of the random numbers.

    Raises:
      SpqrError: the format does not support the sizes of the model.

    Example:
      >>> params = random_params(MODELS["tiny"], Format.parse("3b-g16-s3-o1%"))
      >>> params["layers_0"]["gate_proj+up_proj"]["kernel"].shape
      (192, 64)
    """
    shapes = _shapes(model)
    blocks = [layer_name(index) for index in range(model.config.num_layers)]
    multiplied = {name for names in model.new_block().feeds().values() for name in names}
    outside = {name: leaves for name, leaves in shapes.items() if name not in blocks}
    inside = {name: leaves for name, leaves in shapes[blocks[0]].items() if name not in multiplied}
    seeds = itertools.count(seed)

    def kernel(shape: tuple[int, int]) -> SpqrTensor | Array:
        return _normal(shape[::-1], next(seeds)) if form is None else random_matrix(form, shape, next(seeds))

    def block() -> Params:
        return _ordinary(inside, seed) | {
            name: {"kernel": kernel(shape)} for name, shape in fused_shapes(model).items()
        }

    return _ordinary(outside, seed) | {name: block() for name in blocks}


def fused_shapes(model: Decoder) -> dict[str, tuple[int, int]]:
    """The shapes (out, in) of a block's matrices by name, with the matrices of one input fused.

    Example:
      >>> fused_shapes(MODELS["llama-7b"])["gate_proj+up_proj"]
      (22016, 4096)
    """
    block = _shapes(model)[layer_name(0)]
    fused = {}
    for names in model.new_block().feeds().values():
        kernels = [block[name]["kernel"] for name in names]
        fused[fused_name(names)] = sum(kernel.shape[1] for kernel in kernels), kernels[0].shape[0]
    return fused


@functools.cache
def _shapes(model: Decoder) -> Params:
    shapes: Params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    return shapes


def _ordinary(shapes: Params, seed: int) -> Params:
    """Parameters outside packed matrices: scales of norms are one, others random."""

    def fill(path: tuple[jax.tree_util.DictKey, ...], leaf: jax.ShapeDtypeStruct) -> Array:
        ones = path[-1].key == "scale"
        return jnp.ones(leaf.shape, jnp.bfloat16) if ones else _normal(leaf.shape, seed)

    filled: Params = jax.tree_util.tree_map_with_path(fill, shapes)
    return filled


@functools.partial(jax.jit, static_argnums=0)
def _normal(shape: tuple[int, ...], seed: int | Array) -> Array:
    return WEIGHT * jax.random.normal(jax.random.key(seed, impl="rbg"), shape, jnp.bfloat16)
