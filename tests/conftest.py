import os
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from hypothesis import settings

# What one run has compiled, the next one reads.
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parent.parent / ".cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)

settings.register_profile("spqr", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("spqr")


@pytest.fixture(autouse=True, scope="module")
def release_compiled_programs() -> Iterator[None]:
    """A process may map 65,530 regions of memory, and the compiled programs of all tests together take more."""
    yield
    jax.clear_caches()
