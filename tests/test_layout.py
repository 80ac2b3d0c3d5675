"""Imports go one way: converters → spqr_jax → pallas_kernels."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# The program around the library may use everything.
PROGRAM = ("cli", "demo", "benchmark", "tune", "tuning/command")


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(module: Path, *, inside_functions: bool = True) -> set[str]:
    """Top-level packages that a module imports, in functions too or only when it is itself imported."""
    found: set[str] = set()
    pending: list[ast.AST] = [ast.parse(module.read_text())]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None, f"{module}: relative import"
            assert node.level == 0, f"{module}: relative import"
            found.add(node.module.partition(".")[0])
        elif inside_functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            pending += ast.iter_child_nodes(node)
    return found


def is_library(module: Path) -> bool:
    return not module.relative_to(ROOT / "spqr_jax").parts[0].startswith(PROGRAM)


@pytest.mark.parametrize("package", ["pallas_kernels", "spqr_jax", "converters"])
def test_packages_are_found(package):
    assert len(modules(package)) > 3


def test_pallas_kernels_stands_alone():
    for module in modules("pallas_kernels"):
        # A program on top may use everything, but is imported without.
        is_program = module.relative_to(ROOT / "pallas_kernels").as_posix().startswith(PROGRAM)
        assert not imports(module, inside_functions=not is_program) & {"spqr_jax", "converters", "flax"}, module


def test_the_library_knows_no_converters():
    for module in filter(is_library, modules("spqr_jax")):
        assert "converters" not in imports(module), module


def test_torch_is_not_imported_with_a_module():
    for package in ("pallas_kernels", "spqr_jax", "converters"):
        for module in modules(package):
            assert "torch" not in imports(module, inside_functions=False), module
