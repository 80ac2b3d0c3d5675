"""The command `spqr tasks`."""

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from pallas_kernels.errors import SpqrError
from spqr_jax.cli import console
from spqr_jax.cli.app import Json, Model, app

PAPER_TASKS = "winogrande,piqa,hellaswag,arc_easy,arc_challenge"
"""Those of the SpQR paper."""

KEPT = ("results", "groups", "n-shot", "n-samples", "higher_is_better", "versions")
"""What of lm-eval's results is of the tasks, and not of this machine."""


@app.command()
def tasks(
    source: Model,
    tasks: Annotated[str, typer.Option(help="Names of lm-eval's tasks, with commas; default: the paper's.")] = (
        PAPER_TASKS
    ),
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first so many examples of each task.")] = None,
    fewshot: Annotated[
        int | None, typer.Option(help="Solved examples in a prompt; default: what the task says.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Requests that are run at once.")] = 8,
    include_path: Annotated[Path | None, typer.Option(help="Directory with more tasks, in YAML files.")] = None,
    as_json: Json = False,
) -> None:
    """Measure accuracy on tasks of EleutherAI's lm-eval, which downloads their data.

    Example: spqr tasks smollm2-spqr --tasks piqa,arc_easy --limit 200
    """
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import handle_non_serializable

        from spqr_jax.cli.harness import SpqrLM
    except ModuleNotFoundError as error:
        raise SpqrError(f"tasks come from lm-eval, but {error.name} is not installed: pip install lm-eval") from None

    names = [name.strip() for name in tasks.split(",")]
    manager = TaskManager(include_path=include_path)
    if unknown := [name for name in names if name not in manager.all_tasks]:
        raise SpqrError(f"there is no task {', '.join(unknown)}: `lm-eval ls tasks` lists what there is")
    model = SpqrLM(source, batch_size=batch)
    started = time.perf_counter()
    found: dict[str, Any] = lm_eval.simple_evaluate(
        model, tasks=names, num_fewshot=fewshot, limit=limit, task_manager=manager, log_samples=False
    )
    spent = {"seconds": time.perf_counter() - started}
    if as_json:
        kept = {key: found[key] for key in KEPT if key in found}
        console.emit(json.loads(json.dumps(kept, default=handle_non_serializable)) | spent, as_json)
    else:
        console.emit(_numbers(found["results"]) | spent, as_json)


def _numbers(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Each number that lm-eval found under one name, such as `piqa acc`."""
    return {
        f"{task} {metric.removesuffix(',none')}": value
        for task, metrics in results.items()
        for metric, value in metrics.items()
        if "," in metric and isinstance(value, float)
    }
