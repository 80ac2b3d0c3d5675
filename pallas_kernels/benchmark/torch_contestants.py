"""The contestants in PyTorch on the same GPU: PyTorch's own product and the official SpQR kernel.

They need PyTorch and the official package; `missing` reports which are not installed.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.aot.formats import Format
from pallas_kernels.benchmark.contestants import Contestant, Prepared, exact_weight
from pallas_kernels.benchmark.matrices import random_matrix
from pallas_kernels.benchmark.timing import SAMPLES, Timing, copies_for, repetitions, summary

Tensor = Any
"""A `torch.Tensor`. PyTorch is imported only in functions, so its types are not available here."""
Weights = Tensor | dict[str, Tensor]

DEVICE = "cuda"
OFFICIAL_TOKENS = 16
"""The official kernel treats one token per call, so more tokens are not timed."""


def missing(form: Format) -> dict[str, str]:
    """The contestants that cannot run, with the reasons."""
    try:
        import torch

        if not torch.cuda.is_available():
            raise ImportError("torch finds no CUDA device")
    except ImportError as error:
        return {"torch.matmul": str(error), "official kernel": str(error)}
    if (form.bits, form.group_size, form.stats_bits) != (3, 16, 3):
        return {"official kernel": f"it has 3 bits, groups of 16 and 3-bit statistics, not {form}"}
    try:
        import spqr_quant  # noqa: F401

        import converters.formats.official.tiles  # noqa: F401
    # The import compiles the kernel, which can fail with any exception.
    except Exception as error:
        return {"official kernel": str(error).partition("\n")[0]}
    return {}


def torch_contestants(form: Format, shape: tuple[int, int], skipped: dict[str, str]) -> list[Contestant]:
    """The contestants that are not skipped, for the random matrix of `jax_contestants`."""
    makers = {"torch.matmul": torch_matmul, "official kernel": official_kernel}
    return [make(form, shape) for name, make in makers.items() if name not in skipped]


def torch_matmul(form: Format, shape: tuple[int, int]) -> Contestant:
    """The contestant `torch.matmul` in bfloat16."""
    import torch

    weight = exact_weight(random_matrix(form, shape, 0)).astype(jnp.bfloat16)
    held = to_torch(weight)

    def call(x: Tensor, w: Tensor) -> Tensor:
        return torch.matmul(x, w.T)

    return Contestant(
        name="torch.matmul",
        format="bfloat16",
        nbytes=weight.nbytes,
        dtype=jnp.bfloat16,
        weight=weight,
        prepare=lambda x, _: _prepared(call, to_torch(x), held, weight.nbytes),
    )


def official_kernel(form: Format, shape: tuple[int, int]) -> Contestant:
    """The contestant of the SpQR authors: a kernel with CSR outliers and fused permutation."""
    import torch
    from spqr_quant.inference import FeatureFlags
    from spqr_quant.inference_kernels.cuda_kernel import call_spqr_mul_fused

    from converters.formats.official.tiles import encode_tensor

    packed = random_matrix(form, shape, 0)
    arrays = encode_tensor(packed, "the matrix")
    held = {name: torch.from_numpy(array).to(DEVICE) for name, array in arrays.items()}
    nbytes = sum(array.nbytes for array in arrays.values())
    out, columns = shape
    # The asynchronous variant: the other one waits for the GPU after each call.
    flags = int(FeatureFlags.SPARSE_FUSED_FP32_ASYNC)

    def call(x: Tensor, w: dict[str, Tensor]) -> Tensor:
        y = torch.empty((len(x), out), dtype=torch.float16, device=x.device)
        matrix = w["in_perm"], w["dense_weights"], w["row_offsets"], w["col_vals"], len(w["col_vals"])
        for token, result in zip(x, y, strict=True):
            call_spqr_mul_fused(out, columns, 3, 16, 16, *matrix, token, flags, result, result)
        return y

    return Contestant(
        name="official kernel",
        format=str(form),
        nbytes=nbytes,
        dtype=jnp.float16,
        weight=exact_weight(packed),
        prepare=lambda x, _: _prepared(call, to_torch(x), held, nbytes),
        most_tokens=OFFICIAL_TOKENS,
    )


def _prepared(function: Callable[[Tensor, Weights], Tensor], x: Tensor, w: Weights, nbytes: int) -> Prepared:
    return Prepared(from_torch(function(x, w)), lambda: cuda_seconds_per_call(function, x, w, nbytes))


def to_torch(array: Float[Array, "..."]) -> Tensor:
    """A PyTorch tensor that shares the array's memory, on the same device."""
    import torch

    return torch.from_dlpack(array.block_until_ready())


def from_torch(tensor: Tensor) -> Float[np.ndarray, "..."]:
    """Copies a PyTorch tensor to the host in float32."""
    return tensor.float().cpu().numpy()


def cuda_seconds_per_call(function: Callable[[Tensor, Weights], Tensor], x: Tensor, w: Weights, nbytes: int) -> Timing:
    """Times `function(x, w)` with CUDA events around a CUDA graph that calls it with each of several copies of w."""
    import torch

    copies = [_copy(w) for _ in range(copies_for(nbytes))]
    torch.cuda.synchronize()
    # Warm up: the initialization in a library's first call cannot be captured in a graph.
    with torch.cuda.stream(torch.cuda.Stream()):
        function(x, copies[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for copy in copies:
            function(x, copy)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def seconds(replays: int) -> float:
        begin.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    replays = repetitions(min(seconds(1) for _ in range(3)))
    return summary([seconds(replays) / (replays * len(copies)) for _ in range(SAMPLES)])


def _copy(w: Weights) -> Weights:
    return {name: tensor.clone() for name, tensor in w.items()} if isinstance(w, dict) else w.clone()
