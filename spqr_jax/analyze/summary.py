"""The numbers of a sensitivity study: one description per matrix, and means over the blocks of a model."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from spqr_jax.analyze.patterns import error_left, find_patterns
from spqr_jax.analyze.sensitivity import Matrix

KEPT = (0.0, 0.001, 0.003, 0.01, 0.03, 0.1)
"""Shares of the most sensitive weights; the error that is left when they are kept exact is described for each."""

SHORT_NAMES = {
    "outlier_share": "outliers",
    "row_outliers": "in rows",
    "column_outliers": "in columns",
    "unstructured": "elsewhere",
    "head_stripes": "heads",
    "head_contrast": "contrast",
    "rotary_period": "rotary",
}
"""The measures of a matrix that are drawn and printed, with short names for a table."""

Description = Mapping[str, Any]
"""The numbers of one matrix, see `describe_matrix`."""


def describe_matrix(matrix: Matrix) -> Description:
    """The numbers of one matrix, as JSON has them.

    Returns:
      `kind`, `depth`, `shape`, the mean sensitivity, the measures of `SHORT_NAMES`, None where they have no meaning,
      and `error_left` for each share of `KEPT`.

    Example:
      >>> from spqr_jax.analyze.sensitivity import sensitivities
      >>> matrices = [describe_matrix(matrix) for matrix in sensitivities(source, calibration, COMPACT)]
      >>> matrices[0]["kind"], matrices[0]["error_left"][0]
      ('q_proj', 1.0)
    """
    values = np.asarray(matrix.sensitivity.values)
    return {
        "kind": matrix.kind,
        "depth": matrix.depth,
        "shape": values.shape,
        "mean": float(values.mean(dtype="float64")),
        "outlier_share": float(matrix.sensitivity.outlier_share),
        **find_patterns(values, matrix.heads)._asdict(),
        "error_left": error_left(values, KEPT).tolist(),
    }


def measures_by_depth(matrices: Iterable[Description]) -> dict[str, dict[str, dict[int, float]]]:
    """For each measure and each kind of matrix, its value at each depth where it has a meaning.

    Example:
      >>> measures_by_depth([dict.fromkeys(SHORT_NAMES, None) | {"kind": "up_proj", "depth": 3, "row_outliers": 0.5}])
      {'row outliers': {'up_proj': {3: 0.5}}}
    """
    found: dict[str, dict[str, dict[int, float]]] = {measure: {} for measure in SHORT_NAMES}
    for matrix in matrices:
        for measure in SHORT_NAMES:
            if matrix[measure] is not None:
                found[measure].setdefault(matrix["kind"], {})[matrix["depth"]] = matrix[measure]
    return {measure.replace("_", " "): kinds for measure, kinds in found.items() if kinds}


def error_left_by_kind(matrices: Sequence[Description]) -> dict[str, list[float]]:
    """For each kind of matrix, the mean over all blocks of the error left, at each share of `KEPT`."""
    return {
        kind: np.mean([matrix["error_left"] for matrix in own], axis=0).tolist()
        for kind, own in _by_kind(matrices).items()
    }


def means_by_kind(matrices: Sequence[Description]) -> dict[str, dict[str, float | None]]:
    """For each kind of matrix, the mean over all blocks of each measure of `SHORT_NAMES`; None without a meaning."""
    return {
        kind: {
            measure: None if own[0][measure] is None else float(np.mean([matrix[measure] for matrix in own]))
            for measure in SHORT_NAMES
        }
        for kind, own in _by_kind(matrices).items()
    }


def _by_kind(matrices: Iterable[Description]) -> dict[str, list[Description]]:
    found: dict[str, list[Description]] = {}
    for matrix in matrices:
        found.setdefault(matrix["kind"], []).append(matrix)
    return found
