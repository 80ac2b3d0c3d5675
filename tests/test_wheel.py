"""The wheel, installed in an empty environment and used outside the checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from helpers.byte_tokenizer import byte_tokenizer
from helpers.tiny_models import random_tensors, tiny_config, write_checkpoint

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PACKAGES = ("pallas_kernels", "spqr_jax", "converters")

CORE = """
import importlib.util
import jax.numpy as jnp
import numpy as np
from pallas_kernels import pack, spqr_dequantize, spqr_matmul

assert importlib.util.find_spec("flax") is None
rng = np.random.default_rng(0)
codes = rng.integers(0, 8, (32, 64), np.uint8)
scale, zero = np.full((2, 32, 4), [[[0.1]], [[3.5]]], np.float32)
packed = pack(codes, scale, zero, bits=3, group_size=16)
x = jnp.asarray(rng.standard_normal((5, 64), np.float32))
np.testing.assert_allclose(spqr_matmul(x, packed), x @ spqr_dequantize(packed).T, rtol=1e-4, atol=1e-4)
"""
MODELS = """
import sys
import jax.numpy as jnp
import spqr_jax

model, params, tokenizer = spqr_jax.load(sys.argv[1])
tokens = jnp.asarray([tokenizer.encode("fox")])
assert jnp.isfinite(model.apply({"params": params}, tokens)).all()
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Built from a copy, because setuptools leaves a folder that later builds would take old files from.
    source = tmp_path_factory.mktemp("source")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", source / "dist", source)
    (built,) = (source / "dist").iterdir()
    return built


def run(*command: object, cwd: Path | None = None) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_wheel_has_all_files_of_the_packages(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith(PACKAGES)}
    files = (path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file())
    # Documents of a package are for readers of the repository.
    expected = {f.as_posix() for f in files if "__pycache__" not in f.parts and f.suffix != ".md"}
    assert expected <= packed


def test_the_wheel_works_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    versions = [f"{name}=={version(name)}" for name in ("jax", "jaxlib")]
    # Byte code only of what is imported.
    install = python, "-m", "pip", "install", "--quiet", "--no-compile"
    run(*install, wheel, *versions)
    run(python, "-c", CORE, cwd=tmp_path)

    run(*install, f"{wheel}[models]", *versions)
    command = python.with_name("spqr")
    assert version("spqr-jax") in run(command, "--version", cwd=tmp_path)
    config = tiny_config(vocab_size=257, num_hidden_layers=1, hidden_size=64, intermediate_size=128)
    write_checkpoint(tmp_path / "dense", config, random_tensors(config))
    byte_tokenizer().save_pretrained(tmp_path / "dense")
    np.save(tmp_path / "tokens.npy", np.arange(256, dtype=np.uint16).reshape(4, 64))
    run(command, "quantize", "dense", "packed", "--calibration", "tokens.npy", cwd=tmp_path)
    run(python, "-c", MODELS, "packed", cwd=tmp_path)
