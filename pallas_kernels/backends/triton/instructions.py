"""Instructions that the compiler would not choose by itself, and their equivalents for interpreted kernels.

A *pair* is a uint32 whose halves are two float16 numbers, the low one first.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Shaped, UInt32

Pair = UInt32[Array, "*#tile"]


def multiply_add(
    a: Float[Array, "*#tile"], b: Float[Array, "*#tile"], c: Float[Array, "*#tile"], *, interpret: bool
) -> Float[Array, "*tile"]:
    """a · b + c in float32, rounded once; the compiler would not fuse them."""
    if interpret:
        return a * b + c
    return _assembly("fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", jnp.float32, a, b, c)


def subtract_product(
    c: Float[Array, "*#tile"], a: Float[Array, "*#tile"], b: Float[Array, "*#tile"], *, interpret: bool
) -> Float[Array, "*tile"]:
    """c − a · b in float32, rounded once; the compiler would negate in an instruction of its own."""
    if interpret:
        return c - a * b
    negated = "{ .reg .f32 n; neg.f32 n, $1; fma.rn.f32 $0, n, $2, $3; }"
    return _assembly(negated, "=f,f,f,f", jnp.float32, a, b, c)


def pair_multiply(a: Pair, b: Pair, *, interpret: bool) -> Pair:
    """a · b."""
    if interpret:
        return _by_halves(lambda a, b: a * b, a, b)
    return _pair_assembly("mul.rn.f16x2 $0, $1, $2;", "=r,r,r", a, b)


def pair_add(a: Pair, b: Pair, *, interpret: bool) -> Pair:
    """a + b."""
    if interpret:
        return _by_halves(lambda a, b: a + b, a, b)
    return _pair_assembly("add.rn.f16x2 $0, $1, $2;", "=r,r,r", a, b)


def pair_multiply_add(a: Pair, b: Pair, c: Pair, *, interpret: bool) -> Pair:
    """a · b + c, rounded once."""
    if interpret:
        return _by_halves(lambda a, b, c: a * b + c, a, b, c)
    return _pair_assembly("fma.rn.f16x2 $0, $1, $2, $3;", "=r,r,r,r", a, b, c)


def join(low: Float[Array, "*#tile"], high: Float[Array, "*#tile"], *, interpret: bool) -> Pair:
    """The pair of two float32 numbers, rounded to float16."""
    if interpret:
        return jax.lax.bitcast_convert_type(jnp.stack([low, high], axis=-1).astype(jnp.float16), jnp.uint32)
    return _pair_assembly("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", low, high)


def halves(pair: Pair) -> tuple[Float[Array, "*tile"], Float[Array, "*tile"]]:
    """The two float16 numbers of a pair."""
    parts = (pair.astype(jnp.uint16), (pair >> 16).astype(jnp.uint16))
    low, high = (jax.lax.bitcast_convert_type(part, jnp.float16) for part in parts)
    return low, high


def twice(number: float) -> int:
    """The pair that holds a number twice, as a constant."""
    return int(np.float16(number).view(np.uint16)) * 0x10001


def _by_halves(operation: Callable[..., Array], *pairs: Pair) -> Pair:
    # Float32 holds the product of two float16 numbers exactly, so that the result is rounded once.
    parts = (jax.lax.bitcast_convert_type(jnp.asarray(pair, jnp.uint32), jnp.float16) for pair in pairs)
    result = operation(*(part.astype(jnp.float32) for part in parts))
    return jax.lax.bitcast_convert_type(result.astype(jnp.float16), jnp.uint32)


def _pair_assembly(instruction: str, constraints: str, *args: Shaped[Array, "*#tile"]) -> Pair:
    # Triton's inline assembly returns signed integers only.
    return jax.lax.bitcast_convert_type(_assembly(instruction, constraints, jnp.int32, *args), jnp.uint32)


def _assembly(instruction: str, constraints: str, dtype: type, *args: Array) -> Array:
    shape = jnp.broadcast_shapes(*(jnp.shape(arg) for arg in args))
    (result,) = plgpu.elementwise_inline_asm(
        instruction,
        args=[jnp.broadcast_to(arg, shape) for arg in args],
        constraints=constraints,
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(shape, dtype)],
    )
    return result
