"""Every imported package is declared in pyproject.toml, and tools have one version in all files that name it."""

import ast
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("pallas_kernels", "spqr_jax", "converters")
# Import names that differ from the name to install.
DISTRIBUTIONS = {"huggingface_hub": "huggingface-hub", "lm_eval": "lm-eval", "orbax": "orbax-checkpoint"}
# PyPI has no `spqr_quant`: it is the official kernel, compared with where it is installed.
UNDECLARED = {"spqr_quant"}
KERNELS = {"kernel-tools", "torch"}
MODELS = {"models", "torch", "datasets", "plots", "lm-eval"}


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def declared(extras: set[str]) -> set[str]:
    lists = [project()["dependencies"], *(project()["optional-dependencies"][extra] for extra in extras)]
    return {requirement.partition(">=")[0] for requirements in lists for requirement in requirements}


def imported(package: str) -> set[str]:
    names = set()
    for module in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(module.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(str(node.module).partition(".")[0])
    return {DISTRIBUTIONS.get(name, name) for name in names - set(sys.stdlib_module_names) - set(PACKAGES) - UNDECLARED}


@pytest.mark.parametrize(
    ("package", "extras"), [("pallas_kernels", KERNELS), ("spqr_jax", MODELS), ("converters", MODELS)]
)
def test_imported_packages_are_declared(package, extras):
    assert imported(package) <= declared(extras)


def test_commit_hooks_have_the_linter_of_the_extra():
    (ruff,) = (need for need in project()["optional-dependencies"]["lint"] if need.startswith("ruff=="))
    assert f"rev: v{ruff.removeprefix('ruff==')}\n" in (ROOT / ".pre-commit-config.yaml").read_text()
