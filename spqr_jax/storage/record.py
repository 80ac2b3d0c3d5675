"""The record of a quantization: its settings, a report per matrix, and the devices and versions it ran on.

`quantize_checkpoint` stores it in the checkpoint as `quantization.json`. Two runs with equal inputs differ only in the
date and the times.
"""

import dataclasses
import math
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from spqr_jax.config import Rules, SpqrConfig
from spqr_jax.quantization.report import MatrixReport
from spqr_jax.rules import Plan
from spqr_jax.storage.errors import CheckpointError
from spqr_jax.storage.json_files import finite, read_json, write_json
from spqr_jax.storage.layout import RECORD
from spqr_jax.storage.manifest import read_manifest, verify
from spqr_jax.storage.paths import resolved


class BlockReport(NamedTuple):
    """The report of one block, or, behind all blocks, of the embedding or the head.

    Attributes:
      number: its place among the finished ones, from 1.
      seconds: wall time since the end of the previous block, reading and writing included.
      matrices: a report per matrix (`layers_3.q_proj`).
    """

    number: int
    seconds: float
    matrices: dict[str, MatrixReport]


class Record(NamedTuple):
    """Settings, results and circumstances of a quantization.

    Attributes:
      config: the settings.
      calibration: shape of the calibration tokens (sequences, tokens); None for round-to-nearest.
      blocks: a report per block, and then of embedding and head where they are quantized.
      versions: of Python, JAX, jaxlib and this package, where installed.
      device: kind of the devices.
      devices: their number.
      machine: operating system and processor architecture.
      date: when the run ended, in UTC.
      base_model: name of the original; None if it is not known.
      quality: measured values by their names, if the model was measured.
      rules: changes of the settings for some matrices, see `quantize`.
      sizes: of the whole model, see `Summary.sizes`; None in records of earlier versions.
    """

    config: SpqrConfig
    calibration: tuple[int, int] | None
    blocks: list[BlockReport]
    versions: dict[str, str]
    device: str
    devices: int
    machine: str
    date: str
    base_model: str | None = None
    quality: dict[str, float] | None = None
    rules: Rules = ()
    sizes: dict[str, float] | None = None


def new_record(
    plan: Plan,
    calibration: tuple[int, int] | None,
    blocks: Sequence[BlockReport],
    mesh: Mesh | None,
    *,
    base_model: str | None = None,
    quality: Mapping[str, float] | None = None,
    sizes: Mapping[str, float] | None = None,
) -> Record:
    """Makes the record of a run that ends now, on a mesh or on JAX's default device."""
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    return Record(
        config=plan.config,
        calibration=calibration,
        blocks=list(blocks),
        versions=_versions(),
        device=device.device_kind,
        devices=1 if mesh is None else mesh.size,
        machine=f"{platform.system()} {platform.machine()}",
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        base_model=base_model,
        quality=None if quality is None else dict(quality),
        rules=tuple(plan.rules),
        sizes=None if sizes is None else dict(sizes),
    )


def write_record(root: Path, record: Record) -> None:
    """Writes a record into the directory of a checkpoint that has no manifest yet."""
    content = record._asdict() | {
        "config": dataclasses.asdict(record.config),
        "blocks": blocks_to_json(record.blocks),
    }
    if not record.rules:
        del content["rules"]
    write_json(root / RECORD, finite(content))


def read_record(directory: str | PathLike[str]) -> Record | None:
    """Reads the record of a checkpoint; None where `save`, or a release without records, wrote the checkpoint.

    Raises:
      CheckpointError: the record is missing or damaged, or a later release wrote it.

    Example:
      >>> read_record("tiny-spqr").calibration
      (4, 64)
    """
    root = resolved(directory)
    manifest = read_manifest(root)
    if RECORD not in manifest:
        return None
    verify(root / RECORD, manifest[RECORD])
    content = read_json(root / RECORD)
    try:
        shape = content["calibration"]
        parsed = {
            "config": SpqrConfig(**content["config"]),
            "calibration": None if shape is None else tuple(shape),
            "blocks": blocks_from_json(content["blocks"]),
            "rules": tuple((pattern, changes) for pattern, changes in content.get("rules", ())),
        }
        return Record(**content | parsed)
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{root / RECORD} does not fit this release ({error}): use the release that wrote it"
        ) from error


def blocks_to_json(blocks: Sequence[BlockReport]) -> list[dict[str, Any]]:
    """Converts reports to objects of JSON."""
    return [
        block._asdict() | {"matrices": {name: matrix_to_json(matrix) for name, matrix in block.matrices.items()}}
        for block in blocks
    ]


def blocks_from_json(content: Sequence[dict[str, Any]]) -> list[BlockReport]:
    """Inverse of `blocks_to_json`."""
    return [
        BlockReport(**block | {"matrices": {name: _report(m) for name, m in block["matrices"].items()}})
        for block in content
    ]


def pooled_matrices(blocks: Sequence[BlockReport]) -> int:
    """Number of experts' matrices that were solved for the tokens of all experts, see `MatrixReport`."""
    return sum(matrix.pooled for block in blocks for matrix in block.matrices.values())


def matrix_to_json(report: MatrixReport) -> dict[str, Any]:
    """A report for JSON; most models have no experts, and say nothing of them."""
    content = report._asdict()
    return content if report.pooled else {name: value for name, value in content.items() if name != "pooled"}


def _report(content: dict[str, Any]) -> MatrixReport:
    """A report from JSON, which has null in the place of NaN."""
    values: dict[str, Any] = {name: math.nan if value is None else value for name, value in content.items()}
    return MatrixReport(**values)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("jax", "jaxlib", "spqr-jax"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from its sources
            continue
    return found
