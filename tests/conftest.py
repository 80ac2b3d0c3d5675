import os
from pathlib import Path

import jax
from hypothesis import settings

# What one run has compiled, the next one reads.
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parent.parent / ".cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)

settings.register_profile("spqr", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("spqr")
