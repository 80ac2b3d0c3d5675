"""The version of the distribution, which `pyproject.toml` says."""

import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

DISTRIBUTION = "spqr-jax"


def find_version(root: Path = Path(__file__).parents[1]) -> str:
    """The version in a checkout's `pyproject.toml`, or that of the installed package.

    Args:
      root: the directory of the packages.

    Returns:
      "unknown" where the packages were copied without either.
    """
    # In a checkout, metadata are as old as the last installation.
    project = root / "pyproject.toml"
    if project.is_file():
        content = tomllib.loads(project.read_text(encoding="utf-8")).get("project", {})
        if content.get("name") == DISTRIBUTION:
            return content["version"]
    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:
        return "unknown"
