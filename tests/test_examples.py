"""The examples in docstrings run, and print what they say."""

import doctest
import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import example_names

import converters
import pallas_kernels
import spqr_jax

OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
ROOMS: tuple[str, ...] = (
    "converters",
    "pallas_kernels.aot",
    "pallas_kernels.backends",
    "pallas_kernels.benchmark",
    "pallas_kernels.dequantize",
    "pallas_kernels.format",
    "pallas_kernels.matmul",
    "pallas_kernels.sharded",
    "pallas_kernels.tuning",
    "spqr_jax.analyze",
    "spqr_jax.benchmark",
    "spqr_jax.cli",
    "spqr_jax.config",
    "spqr_jax.figures",
    "spqr_jax.generation",
    "spqr_jax.measure",
    "spqr_jax.models",
    "spqr_jax.quantization",
    "spqr_jax.runtime",
    "spqr_jax.search",
    "spqr_jax.storage",
    "spqr_jax.texts",
)
"""Modules whose examples run, by the start of their names."""
PROGRAMS = ("__main__", "harness")
"""Modules that do something, or need an optional package, when they are imported."""
SLOW = (
    "converters.export.export_hf_spqr",
    "pallas_kernels.aot.compiler.compile_program",
    "spqr_jax.analyze.sensitivity.sensitivities",
    "spqr_jax.measure.continuations.continuation_perplexity",
    "spqr_jax.search.costs.estimate_costs",
    "spqr_jax.search.target_bits.outlier_curve",
)
"""Examples that compile for seconds."""


def examples() -> Iterator[doctest.DocTest]:
    finder = doctest.DocTestFinder(exclude_empty=True)
    for package in (pallas_kernels, spqr_jax, converters):
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if found.name.startswith(ROOMS) and not found.name.endswith(PROGRAMS):
                module = importlib.import_module(found.name)
                yield from (test for test in finder.find(module, found.name) if test.examples)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("examples")
    example_names.write_files(directory)
    return directory


@pytest.fixture(scope="module")
def names(directory: Path) -> dict[str, Any]:
    return example_names.names(directory)


@pytest.mark.parametrize(
    "example",
    [
        pytest.param(example, id=example.name, marks=pytest.mark.slow if example.name in SLOW else ())
        for example in examples()
    ],
)
def test_example(
    example: doctest.DocTest, directory: Path, names: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if any("import torch" in line.source for line in example.examples):
        pytest.importorskip("torch")
    monkeypatch.chdir(directory)
    # What the module defines is known, as where its users import it.
    example.globs = {**names, **example.globs}
    report: list[str] = []
    result = doctest.DocTestRunner(optionflags=OPTIONS).run(example, out=report.append)
    assert not result.failed, "".join(report)
