"""What a quantization was: its settings, what became of each matrix, and on what it ran.

`quantize_checkpoint` leaves this in the checkpoint as `quantization.json`. Of two runs of the same, all of it is equal
but the date and the times.
"""

import dataclasses
import json
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from spqr_jax.config import SpqrConfig
from spqr_jax.quantization.report import MatrixReport
from spqr_jax.storage.checkpoint import MANIFEST, RECORD, CheckpointError, read_json, verify


class BlockReport(NamedTuple):
    """What became of one block.

    Attributes:
      number: how many blocks are finished with it.
      seconds: wall time from the end of the block before it, reading and writing included.
      matrices: a report per matrix (`layers_3.q_proj`).
    """

    number: int
    seconds: float
    matrices: dict[str, MatrixReport]


class Record(NamedTuple):
    """A quantization.

    Attributes:
      config: what was quantized to.
      calibration: shape of the calibration tokens (sequences, tokens); None for round-to-nearest.
      blocks: a report per block.
      versions: of Python and of the packages that took part, where installed.
      device: kind of the devices that computed.
      devices: their number.
      machine: operating system and processor architecture.
      date: when the run ended, in UTC.
    """

    config: SpqrConfig
    calibration: tuple[int, int] | None
    blocks: list[BlockReport]
    versions: dict[str, str]
    device: str
    devices: int
    machine: str
    date: str


def new_record(
    config: SpqrConfig, calibration: tuple[int, int] | None, blocks: Sequence[BlockReport], mesh: Mesh | None
) -> Record:
    """The record of a run that ends now, on a mesh or on JAX's default device."""
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    return Record(
        config=config,
        calibration=calibration,
        blocks=list(blocks),
        versions=_versions(),
        device=device.device_kind,
        devices=1 if mesh is None else mesh.size,
        machine=f"{platform.system()} {platform.machine()}",
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def write_record(root: Path, record: Record) -> None:
    """Writes a record into the directory of a checkpoint that has no manifest yet."""
    content = record._asdict() | {
        "config": dataclasses.asdict(record.config),
        "blocks": blocks_to_json(record.blocks),
    }
    (root / RECORD).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_record(directory: str | PathLike[str]) -> Record | None:
    """The record in a checkpoint; None where it has none: it was not quantized to the disk, or by an older release.

    Raises:
      CheckpointError: the record is missing or damaged, or a later release wrote it.

    Example:
      >>> read_record("smollm2-spqr").config.bits
      3
    """
    root = Path(directory).resolve()
    manifest = read_json(root / MANIFEST)
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
        }
        return Record(**content | parsed)
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{root / RECORD} does not fit this release ({error}); use the release that wrote it."
        ) from error


def blocks_to_json(blocks: Sequence[BlockReport]) -> list[dict[str, Any]]:
    """Reports as JSON has them."""
    return [
        block._asdict() | {"matrices": {name: matrix._asdict() for name, matrix in block.matrices.items()}}
        for block in blocks
    ]


def blocks_from_json(content: Sequence[dict[str, Any]]) -> list[BlockReport]:
    """Inverse of `blocks_to_json`."""
    return [
        BlockReport(**block | {"matrices": {name: MatrixReport(**m) for name, m in block["matrices"].items()}})
        for block in content
    ]


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("jax", "jaxlib", "spqr-jax"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from its sources
            continue
    return found
