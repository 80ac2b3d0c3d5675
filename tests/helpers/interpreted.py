from collections.abc import Callable
from typing import Any

import jax


def run_interpreted(function: Callable[..., Any], *args: Any) -> Any:
    # XLA's fusions for CPUs compute the same things many times over in programs of interpreted kernels.
    options = {
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
        "xla_disable_hlo_passes": "fusion,cpu-instruction-fusion",
    }
    return jax.jit(function).lower(*args).compile(compiler_options=options)(*args)
