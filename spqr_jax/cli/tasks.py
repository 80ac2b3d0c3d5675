"""The command `spqr tasks`."""

import json
import time
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer

from pallas_kernels.errors import SpqrError
from spqr_jax.cli import console
from spqr_jax.cli.options import ComputingType, InMemory, Json, Model, at_least
from spqr_jax.runtime.memory import Memory
from spqr_jax.storage.paths import absolute

PAPER_TASKS = "winogrande,piqa,hellaswag,arc_easy,arc_challenge"
"""The tasks of the SpQR paper."""

KEPT = ("results", "groups", "n-shot", "n-samples", "higher_is_better", "versions")
"""Entries of lm-eval's results that describe the tasks; the others describe the machine."""


def tasks(
    source: Model,
    tasks: Annotated[str, typer.Option(help="Names of lm-eval's tasks, comma-separated; default: the paper's.")] = (
        PAPER_TASKS
    ),
    limit: Annotated[
        int | None, typer.Option(min=1, help="Number of examples of each task, from the start; default: all.")
    ] = None,
    fewshot: Annotated[
        int | None, typer.Option(min=0, help="Solved examples in a prompt; default: the task's own number.")
    ] = None,
    batch: Annotated[int, typer.Option(callback=at_least(1), help="Requests that run together.")] = 8,
    include_path: Annotated[
        Path | None, typer.Option(parser=absolute, help="Directory of more tasks, as YAML files.")
    ] = None,
    dtype: ComputingType = None,
    memory: InMemory = Memory.AUTO,
    as_json: Json = False,
) -> None:
    """Measure accuracy on tasks of EleutherAI's lm-eval, which downloads their data.

    Example: spqr tasks smollm2-spqr --tasks piqa,arc_easy --limit 200
    """
    lm_eval = _lm_eval()
    names = [name.strip() for name in tasks.split(",")]
    manager = _task_manager(include_path)
    if unknown := [name for name in names if name not in manager.all_tasks]:
        raise SpqrError(f"lm-eval has no task {', '.join(unknown)}: list its tasks with `lm-eval ls tasks`")

    from datasets.exceptions import DatasetsError
    from lm_eval.utils import handle_non_serializable

    from spqr_jax.cli.harness import SpqrLM

    model = SpqrLM(source, batch_size=batch, dtype=dtype, memory=memory)
    started = time.perf_counter()
    try:
        found: dict[str, Any] = lm_eval.simple_evaluate(
            model, tasks=names, num_fewshot=fewshot, limit=limit, task_manager=manager, log_samples=False
        )
    except DatasetsError as error:
        raise SpqrError(f"the data of {', '.join(names)} cannot be read: {error}") from error
    spent = {"seconds": time.perf_counter() - started}
    if as_json:
        kept = {key: found[key] for key in KEPT if key in found}
        console.emit(json.loads(json.dumps(kept, default=handle_non_serializable)) | spent, as_json)
    else:
        console.emit(_numbers(found["results"]) | spent, as_json)


def _lm_eval() -> ModuleType:
    try:
        return import_module("lm_eval")
    except ModuleNotFoundError as error:
        raise SpqrError(
            f'tasks come from lm-eval, but {error.name} is not installed: pip install "spqr-jax[lm-eval]"'
        ) from None


def _task_manager(directory: Path | None) -> Any:
    from lm_eval.tasks import TaskManager

    if directory is not None and not directory.is_dir():
        raise SpqrError(f"--include-path {directory} is not a directory")
    try:
        return TaskManager(include_path=directory)
    except Exception as error:
        if directory is None:
            raise
        # Parses a user's files, whose faults come in many types: YAML's, KeyError, TypeError.
        raise SpqrError(f"a task in {directory} cannot be read: {type(error).__name__}: {error}") from error


def _numbers(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Every number of lm-eval's results by task and metric, such as `piqa acc`."""
    return {
        f"{task} {metric.removesuffix(',none')}": value
        for task, metrics in results.items()
        for metric, value in metrics.items()
        if "," in metric and isinstance(value, float)
    }
