from pathlib import Path

import jax
import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
MOST_BYTES = 200_000


def printed(cell: nbformat.NotebookNode) -> str:
    """What a cell prints and shows as text; not its warnings, which differ between machines."""
    outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return "".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_and_prints_what_is_committed(path, tmp_path, monkeypatch):
    # Nothing of the user's own: no start-up files, no settings.
    for variable in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir)
    # They compute for long, in programs that are compiled as a user's are.
    monkeypatch.setenv("XLA_FLAGS", "")
    committed = nbformat.read(path, as_version=4)
    run = nbformat.read(path, as_version=4)
    # As Jupyter does, in the notebook's folder.
    resources = {"metadata": {"path": str(path.parent)}}
    NotebookClient(run, timeout=300, kernel_name="python3", resources=resources).execute()
    for before, after in zip(committed.cells, run.cells, strict=True):
        if after.cell_type == "code":
            assert printed(after) == printed(before), after.source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_small_and_has_its_output(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path.stat().st_size < MOST_BYTES
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
