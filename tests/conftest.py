import gc
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from helpers import annotations
from hypothesis import settings

# Before any test imports the packages. It takes a sixth of the time of all tests: .ci/run does it for one of two sets.
if os.environ.get("CHECK_ANNOTATIONS") != "0":
    annotations.check_packages()

ROOT = Path(__file__).parents[1]
MAPS = Path("/proc/self/maps")
LONGEST = "test_notebooks.py", "test_devices.py"
# Leaves half of the limit to the next module.
MOST_REGIONS = 32_000

# Processes that tests start find this checkout and the tests' helpers.
os.environ["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
# Compiling takes most of the tests' time: without optimization, and by XLA's former fusion emitters, it takes a third.
# On a GPU the same options would slow down the kernels.
if shutil.which("nvidia-smi") is None:
    options = (
        "--xla_backend_optimization_level=0",
        "--xla_cpu_parallel_codegen_split_count=1",
        "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
    )
    os.environ.setdefault("XLA_FLAGS", " ".join(options))
# A shell's background ignores Ctrl-C, and so would the processes that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Tiles that were tuned on this machine do not change what tests compile.
os.environ["SPQR_JAX_CACHE_DIR"] = str(ROOT / ".cache" / "spqr-jax")

# What one run has compiled, the next one reads.
jax.config.update("jax_compilation_cache_dir", str(ROOT / ".cache" / "jax"))
# Where in the source an operation stands is not of use here, and takes a tenth of the time to compile.
jax.config.update("jax_include_full_tracebacks_in_locations", False)
jax.config.update("jax_traceback_in_locations_limit", 0)
# Small programs too: tracing and reading one took 25 ms of CPU, compiling it 137.
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

# Tracing makes millions of objects: looking for cycles among them took a tenth of the time.
gc.set_threshold(100_000, 20, 10)

settings.register_profile("spqr", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("spqr")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, then those with slow tests: what runs last beside nothing else is then short."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path.name not in LONGEST, item.path not in slow))
    gc.freeze()  # what is there now stays: the libraries, and the tests


@pytest.fixture(autouse=True, scope="module")
def release_compiled_programs() -> Iterator[None]:
    """A process may map 65,530 regions of memory, and the compiled programs of all tests together take more.

    Programs are kept while there is room, because modules share many.
    """
    yield
    if not MAPS.exists() or MAPS.read_bytes().count(b"\n") > MOST_REGIONS:
        jax.clear_caches()
