"""Results of a sweep as Markdown tables, and as a figure like the paper's first."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from spqr_jax.figures.sensitivity_maps import new_figure
from spqr_jax.search.sweep import ablations, changes, front

LABELS = {"spqr": "SpQR", "gptq": "GPTQ", "rtn": "round-to-nearest"}
"""Names of the methods in the paper."""


def label(result: Mapping[str, Any]) -> str:
    """Label of a cell: its method, bits and the settings that are not the default.

    Example:
      >>> label({"method": "spqr", "bits": 4, "group_size": 64, "outlier_threshold": 1.2})
      'SpQR, 4 bits, group size 64, τ 1.2'
    """
    changed = changes(result)
    changed.pop("bits", None)
    if result["method"] != "spqr":
        del changed["outlier_threshold"]
    others = [f"{name.replace('_', ' ')} {value}" for name, value in changed.items()]
    words = [LABELS[result["method"]], f"{result['bits']} bits", *others]
    return ", ".join(words).replace("outlier threshold", "τ").replace("stats bits None", "16-bit statistics")


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Table of all cells by size, as Markdown; cells on the Pareto front are bold.

    Args:
      results: of `sweep`, the original's first.
    """
    original, *found = results
    best = front(found)
    lines = [
        f"| cell | bits per weight | outliers | perplexity | over {original['perplexity']:.2f} | seconds |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for result in sorted(found, key=lambda r: r["bits_per_weight"]):
        mark = "**" if result in best else ""
        lines.append(
            f"| {mark}{label(result)}{mark} | {result['bits_per_weight']:.2f} | {result['outlier_share']:.2%} "
            f"| {mark}{result['perplexity']:.2f}{mark} | {result['perplexity'] / original['perplexity'] - 1:.1%} "
            f"| {result['seconds']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def ablation_table(results: Iterable[Mapping[str, Any]]) -> str:
    """Table of the default cell and of cells with one setting changed, as Markdown."""
    found = ablations(results)
    lines = ["| changed | bits per weight | outliers | perplexity |", "| --- | --- | --- | --- |"]
    for changed, result in found.items():
        lines.append(
            f"| {changed or 'nothing'} | {result['bits_per_weight']:.2f} | {result['outlier_share']:.2%} "
            f"| {result['perplexity']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def perplexity_figure(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws perplexity over bits per weight: a point for each cell, a line for the Pareto front of each method.

    Args:
      results: of `sweep`, the original's first.
      path: of the figure; its suffix is the format.

    Raises:
      SpqrError: matplotlib is not installed.
    """
    original, *found = results
    figure = new_figure((8.0, 4.5))
    axis = figure.subplots()
    for method, label in LABELS.items():
        own = [result for result in found if result["method"] == method]
        if own:
            points = axis.scatter(*_places(own), s=14, label=label)
            axis.plot(*_places(front(own)), color=points.get_facecolor()[0])
    axis.axhline(original["perplexity"], color="gray", linestyle="--", label="original, 16 bits")
    # Round-to-nearest at 3 bits is far above this limit; with it in view the other points would coincide.
    axis.set_ylim(0.98 * original["perplexity"], 1.8 * original["perplexity"])
    axis.set(xlabel="bits per weight", ylabel="perplexity")
    axis.legend()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _places(results: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[float]]:
    return [result["bits_per_weight"] for result in results], [result["perplexity"] for result in results]
