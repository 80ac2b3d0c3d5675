"""The work of `spqr analyze`: which matrices are drawn, the files of a study, and its table."""

import dataclasses
import fnmatch
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from rich.table import Column, Table

from pallas_kernels.errors import SpqrError
from spqr_jax.analyze import summary
from spqr_jax.analyze.sensitivity import sensitivities
from spqr_jax.cli import console
from spqr_jax.config import SpqrConfig
from spqr_jax.figures import sensitivity_maps
from spqr_jax.models.decoder import Decoder, layer_name
from spqr_jax.storage.description import describe_model
from spqr_jax.storage.directories import new_directory
from spqr_jax.storage.json_files import finite
from spqr_jax.storage.model_source import ModelSource


def matrix_names(model: Decoder) -> list[str]:
    """The names of a model's matrices, `layers_0.q_proj` first."""
    kinds = model.new_block().single_matrices()
    return [f"{layer_name(depth)}.{kind}" for depth in range(model.config.num_layers) for kind in kinds]


def matching(patterns: str, names: Sequence[str]) -> set[str]:
    """The names that match one of the comma-separated patterns.

    Raises:
      SpqrError: a pattern matches no name.

    Example:
      >>> sorted(matching("layers_0.*, layers_1.q_proj", ["layers_0.k_proj", "layers_1.k_proj", "layers_1.q_proj"]))
      ['layers_0.k_proj', 'layers_1.q_proj']
    """
    found: set[str] = set()
    for pattern in map(str.strip, patterns.split(",")):
        own = fnmatch.filter(names, pattern)
        if not own:
            raise SpqrError(f"no matrix matches {pattern}: the names go from {names[0]} to {names[-1]}")
        found.update(own)
    return found


def write_study(
    destination: Path,
    source: ModelSource,
    tokens: Int[np.ndarray, "sequences tokens"],
    config: SpqrConfig,
    sizes: Mapping[str, int],
    drawn: Collection[str],
) -> dict[str, Any]:
    """Writes the JSON file and the pictures of a sensitivity study, all of them or none.

    Args:
      destination: the new directory.
      source: the model.
      tokens: calibration tokens.
      config: what the weights are rounded to.
      sizes: what the study says of its calibration tokens.
      drawn: names of the matrices to draw.

    Returns:
      The content of sensitivity.json.
    """
    matrices: dict[str, summary.Description] = {}
    with new_directory(destination) as directory:
        total = len(matrix_names(source.model))
        for matrix in console.track(sensitivities(source, tokens, config), total, "sensitivity"):
            if matrix.name in drawn:
                picture = sensitivity_maps.draw_map(np.asarray(matrix.sensitivity.values), matrix.name)
                picture.savefig(directory / f"{matrix.name}.png")
            matrices[matrix.name] = summary.describe_matrix(matrix)
        content = {
            "model": describe_model(source.model),
            "config": dataclasses.asdict(config),
            "calibration": dict(sizes),
            "kept": summary.KEPT,
            "matrices": matrices,
        }
        (directory / "sensitivity.json").write_text(json.dumps(finite(content), indent=1), encoding="utf-8")
        described = list(matrices.values())
        by_depth = sensitivity_maps.draw_by_depth(summary.measures_by_depth(described))
        by_depth.savefig(directory / "patterns.png")
        errors = sensitivity_maps.draw_errors(summary.KEPT, summary.error_left_by_kind(described))
        errors.savefig(directory / "errors.png")
    return content


def summary_table(matrices: Sequence[summary.Description]) -> Table:
    """Means over all blocks, a row per kind of matrix; last, the error left when 1 % of the weights are kept exact."""
    table = Table(Column("matrix", no_wrap=True), *summary.SHORT_NAMES.values(), "left at 1%", box=None)
    left = summary.error_left_by_kind(matrices)
    for kind, measures in summary.means_by_kind(matrices).items():
        cells = ["" if value is None else f"{value:.3f}" for value in measures.values()]
        table.add_row(kind, *cells, f"{left[kind][summary.KEPT.index(0.01)]:.3f}")
    return table
