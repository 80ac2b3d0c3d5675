"""The Pallas kernels against float64: interpreted on any machine, and with `-m gpu` compiled on a GPU."""

import functools
import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.random_packed import random_packed
from jax.sharding import AxisType, PartitionSpec

from pallas_kernels import split_rows, spqr_dequantize, spqr_matmul
from pallas_kernels.backends import devices
from pallas_kernels.backends.table import choose
from pallas_kernels.backends.triton.backend import LEAST_CAPABILITY
from pallas_kernels.backends.triton.dequantize import dequantize_matrix
from pallas_kernels.backends.triton.fma import fma_matmul
from pallas_kernels.backends.triton.mma import mma_matmul
from pallas_kernels.backends.triton.statistics import group_of, groups_per_block
from pallas_kernels.tuning.regimes import MOST_TOKENS, regime

BITS, GROUP_SIZES, STATS_BITS = (2, 3, 4, 5, 8), (8, 16, 32, 64, 128), (None, 2, 3, 4, 5, 8)
OUTLIERS = ("everywhere", "none", "one row")
# An odd number of blocks, or words that fill no tile, where the group size allows it.
IN_FEATURES = {8: 400, 16: 400, 32: 416, 64: 448, 128: 384}
OUT = 512

# ‖Δ‖ / ‖y‖: what rounding y, and for tensor cores the weights, to the type makes of it. In float16 that is 3.6e-4, and
# for the few outputs of some tests up to 5.2e-4 in 400 draws.
MOST_ERROR = {"bfloat16": 2e-3, "float16": 6e-4, "float32": 1e-6}

on_gpu = functools.partial(pytest.param, marks=pytest.mark.gpu)
IMPLEMENTATIONS = ["interpret", on_gpu("pallas")]

FAST = {(3, 16)}


def formats():
    """Every width of a code and every group size at least once, all else in turn."""
    for i, (bits, group_size) in enumerate(itertools.product(BITS, GROUP_SIZES)):
        if (bits, group_size) not in FAST and (BITS.index(bits) + GROUP_SIZES.index(group_size)) % 5:
            continue
        settings = {
            "bits": bits,
            "group_size": group_size,
            "stats_bits": STATS_BITS[i % len(STATS_BITS)],
            "stats_group_size": 32 if bits % 2 else 16,
            "outliers": OUTLIERS[i % len(OUTLIERS)],
            "permutation": "random" if i % 4 < 2 else None,
        }
        slow = () if (bits, group_size) in FAST else pytest.mark.slow
        yield pytest.param(settings, marks=slow, id="-".join(f"{value}" for value in settings.values()))


FORMATS = list(formats())


@pytest.fixture
def rng() -> np.random.Generator:
    """Other inputs each time; a failure shows the seed."""
    seed = np.random.SeedSequence().entropy
    print(f"seed {seed}")
    return np.random.default_rng(seed)


def run(implementation: str, function: Callable[..., Any], *args: Any) -> Any:
    """Compiled, with NaN in the memory that results will get: where kernels are interpreted, JAX does that."""
    if implementation == "interpret":
        return jax.jit(function)(*args)
    if jax.default_backend() != "gpu":
        pytest.skip("no GPU")
    compiled = jax.jit(function).lower(*args).compile()
    for size in (OUT, 1 << 20, 1 << 26):
        jnp.full(size, jnp.nan).block_until_ready()
    return compiled(*args)


def random_x(rng: np.random.Generator, tokens: int, in_features: int, dtype: Any) -> jax.Array:
    return jnp.asarray(rng.standard_normal((tokens, in_features)), dtype)


def exact(x: jax.Array, packed: Any) -> np.ndarray:
    return np.asarray(x, np.float64) @ np.asarray(spqr_dequantize(packed, implementation="xla"), np.float64).T


def assert_close(y: Any, expected: np.ndarray, dtype: Any) -> None:
    assert y.dtype == dtype
    error = np.linalg.norm(np.asarray(y, np.float64) - expected) / np.linalg.norm(expected)
    assert error < MOST_ERROR[jnp.dtype(dtype).name]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("kernel", "tokens"), [(fma_matmul, 4), (mma_matmul, 5)])
@pytest.mark.parametrize("settings", FORMATS)
def test_product(settings, kernel, tokens, implementation, rng):
    packed = random_packed(rng, OUT, IN_FEATURES[settings["group_size"]], **settings)
    x = random_x(rng, tokens, packed.in_features, jnp.bfloat16)
    y = run(implementation, functools.partial(kernel, interpret=implementation == "interpret"), x, packed)
    assert_close(y, exact(x, packed), jnp.bfloat16)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("settings", FORMATS)
def test_dequantize(settings, implementation, rng):
    packed = random_packed(rng, 48, IN_FEATURES[settings["group_size"]], **{**settings, "stats_group_size": 16})
    weight = run(implementation, functools.partial(spqr_dequantize, implementation=implementation), packed)
    expected = spqr_dequantize(packed, implementation="xla")
    np.testing.assert_allclose(weight, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_outliers_in_the_first_column(implementation, rng):
    """What is read where there is no outlier is column 0."""
    packed = random_packed(rng, 48, 256, outliers="first column")
    weight = run(implementation, functools.partial(spqr_dequantize, implementation=implementation), packed)
    np.testing.assert_allclose(weight, spqr_dequantize(packed, implementation="xla"), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_statistics_are_read_where_they_are(group_size, rng):
    """What lies beside them could be NaN, and so would be its product with the zeros that pad the activations."""
    packed = random_packed(rng, 16, IN_FEATURES[group_size], group_size=group_size)
    blocks = jnp.arange(2 * packed.codes.shape[2])
    for split in range(groups_per_block(group_size)):
        assert group_of(blocks, split, packed).max() < packed.in_features // group_size


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float32])
@pytest.mark.slow
def test_fma_in_other_types(dtype, implementation, rng):
    packed = random_packed(rng, OUT, 400)
    x = random_x(rng, 2, 400, dtype)
    y = run(implementation, functools.partial(fma_matmul, interpret=implementation == "interpret"), x, packed)
    assert_close(y, exact(x, packed), dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("tokens", "out"), [(17, 40), *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in ((33, 40), (70, 512)))]
)
def test_mma_of_float16_and_more_tokens(tokens, out, implementation, rng):
    packed = random_packed(rng, out, 1200, stats_bits=None)
    x = random_x(rng, tokens, 1200, jnp.float16)
    y = run(implementation, functools.partial(mma_matmul, interpret=implementation == "interpret"), x, packed)
    assert_close(y, exact(x, packed), jnp.float16)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kernel", [fma_matmul, mma_matmul])
@pytest.mark.slow
def test_activations_of_very_different_sizes(kernel, implementation, rng):
    """Float16 inside the kernels bounds neither large nor small bfloat16 activations."""
    packed = random_packed(rng, OUT, 1200, outliers="none")
    sizes = 2.0 ** rng.integers(-60, 60, (3, 1)) * np.where(rng.random((3, 1200)) < 0.003, 1000.0, 1.0)
    x = jnp.asarray(sizes * rng.standard_normal((3, 1200)), jnp.bfloat16)
    y = run(implementation, functools.partial(kernel, interpret=implementation == "interpret"), x, packed)
    for token, expected in zip(y, exact(x, packed), strict=True):
        # A token's few outputs are rounded less evenly.
        assert np.linalg.norm(np.asarray(token, np.float64) - expected) < 2.5e-3 * np.linalg.norm(expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("batch", "dtype"),
    [
        ((), jnp.float16),
        pytest.param((2, 3), jnp.float16, marks=pytest.mark.slow),
        pytest.param((3, 50), jnp.float16, marks=pytest.mark.slow),
        ((9,), jnp.float32),
    ],
)
def test_matmul_in_every_regime(batch, dtype, implementation, rng):
    packed = random_packed(rng, 64, 400)
    x = jnp.asarray(rng.standard_normal((*batch, 400)), dtype)
    with jax.default_matmul_precision("highest"):
        y = run(implementation, functools.partial(spqr_matmul, implementation=implementation), x, packed)
    assert_close(y, exact(x, packed), dtype)


def test_unwritten_results_are_nan_where_kernels_are_interpreted():
    """What `run` relies on."""
    from jax.experimental import pallas as pl

    call = pl.pallas_call(lambda ref: None, out_shape=jax.ShapeDtypeStruct((4,), jnp.float32), interpret=True)
    assert np.isnan(call()).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.slow
def test_vmap(implementation, rng):
    stack = [random_packed(rng, 32, 256, outliers="none") for _ in range(2)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *stack)
    x = jnp.asarray(rng.standard_normal((2, 3, 256)), jnp.float16)
    matmul = functools.partial(spqr_matmul, implementation=implementation)

    def both(x, stacked):
        one = jax.tree.map(lambda leaf: leaf[0], stacked)
        return (
            jax.vmap(matmul, (0, None))(x, one),
            jax.vmap(matmul)(x, stacked),
            jax.vmap(matmul, (None, 0))(x[0], stacked),
        )

    over_x, over_both, over_w = run(implementation, both, x, stacked)
    assert_close(over_x, exact(x, stack[0]), jnp.float16)
    assert_close(over_both, np.stack([exact(part, packed) for part, packed in zip(x, stack, strict=True)]), jnp.float16)
    assert_close(over_w, np.stack([exact(x[0], packed) for packed in stack]), jnp.float16)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradient_with_respect_to_inputs(implementation, rng):
    packed = random_packed(rng, 64, 400)
    x = random_x(rng, 2, 400, jnp.float32)
    cotangent = jnp.asarray(rng.standard_normal((2, 64)), jnp.float32)

    def loss(x, packed):
        return jnp.vdot(cotangent, spqr_matmul(x, packed, implementation=implementation))

    weight = np.asarray(spqr_dequantize(packed, implementation="xla"), np.float64)
    with jax.default_matmul_precision("highest"):
        gradient = run(implementation, jax.grad(loss), x, packed)
    assert_close(gradient, np.asarray(cotangent, np.float64) @ weight, jnp.float32)


@pytest.mark.slow
def test_each_device_of_a_shard_map_runs_its_rows(rng):
    mesh = jax.make_mesh((1,), ("rows",), axis_types=(AxisType.Auto,))
    packed, x = random_packed(rng, 64, 256), random_x(rng, 2, 256, jnp.float16)

    def local(x, parts):
        return spqr_matmul(x, jax.tree.map(lambda leaf: leaf[0], parts), implementation="interpret")

    rows = PartitionSpec("rows")
    # JAX's interpreter of kernels does not track what varies between devices.
    sharded = jax.shard_map(
        local, mesh=mesh, in_specs=(PartitionSpec(), rows), out_specs=PartitionSpec(None, "rows"), check_vma=False
    )
    assert_close(run("interpret", sharded, x, split_rows(packed, 1)), exact(x, packed), jnp.float16)


@pytest.mark.parametrize("tokens", [1, 16, 200])
def test_kernels_say_what_varies_between_the_devices_of_a_shard_map(tokens, rng):
    mesh = jax.make_mesh((1,), ("rows",), axis_types=(AxisType.Auto,))
    packed, x = random_packed(rng, 64, 256), random_x(rng, tokens, 256, jnp.bfloat16)
    kernel = {
        "fma": fma_matmul,
        "mma": mma_matmul,
        "dequantize": lambda x, w, interpret: dequantize_matrix(w, x.dtype, interpret=interpret),
    }[regime(tokens, x.dtype)]

    def local(x, parts):
        return kernel(x, jax.tree.map(lambda leaf: leaf[0], parts), interpret=False)

    rows = PartitionSpec("rows")
    sharded = jax.shard_map(local, mesh=mesh, in_specs=(PartitionSpec(), rows), out_specs=PartitionSpec(None, "rows"))
    traced = jax.make_jaxpr(sharded)(x, split_rows(packed, 1))
    assert f"spqr_{regime(tokens, x.dtype)}" in str(traced)


def test_nothing_gives_nothing(rng):
    packed = random_packed(rng, 32, 256)
    assert spqr_matmul(jnp.zeros((0, 256)), packed, implementation="interpret").shape == (0, 32)


def test_regimes_follow_the_table():
    for dtype, table in MOST_TOKENS.items():
        for name, most in table.items():
            assert regime(most, dtype) == name
            assert regime(most + 1, dtype) != name
        assert regime(10**6, dtype) == "dequantize"


@pytest.mark.parametrize(
    ("device", "supported"),
    [
        ({"compute_capability": "9.0"}, True),
        ({"compute_capability": "8.0"}, True),
        ({"compute_capability": "12.0"}, True),
        ({"compute_capability": "7.5"}, False),
        ({"compute_capability": "gfx90a"}, False),
        ({}, False),
    ],
)
def test_supported_devices(device, supported):
    assert ((devices._capability(SimpleNamespace(**device)) or 0) >= LEAST_CAPABILITY) == supported


def test_errors_say_what_to_do(rng):
    packed, x = random_packed(rng, 32, 256), jnp.zeros((1, 256))
    if jax.default_backend() == "cpu":
        with pytest.raises(ValueError, match=r"needs an NVIDIA GPU of compute capability 8\.0 or more, but .* cpu"):
            spqr_matmul(x, packed, implementation="pallas")
    with pytest.raises(ValueError, match="implementation is 'triton', but must be"):
        choose("triton")
    with pytest.raises(ValueError, match="takes activations in bfloat16, float16, float32, not int32"):
        choose("interpret", jnp.int32)
