"""What a benchmark finds, and the JSON files that hold it. Measured and predicted times are never in one file."""

import dataclasses
import json
import os
import platform
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from pallas_kernels.errors import SpqrError

Source = Literal["measured", "compile-ahead", "roofline"]


@dataclass(frozen=True)
class Row:
    """One product, by one contestant.

    Attributes:
      matrix: models and names of the matrices that have this shape; empty for other shapes.
      shape: (out, in).
      tokens: rows of the activations.
      contestant: who multiplies.
      format: what the weights are held in.
      read_bytes: weights and activations, each once.
      source: where the time is from.
      seconds: per call, the median; None where the product is wrong or failed.
      quartiles: of what was measured.
      bandwidth_fraction: `read_bytes` in this time, over the bandwidth of the device.
      relative_error: ‖Δ‖ / ‖y‖ of the product against one in float32 with the same weights.
      error: what went wrong.
    """

    matrix: str
    shape: tuple[int, int]
    tokens: int
    contestant: str
    format: str
    read_bytes: int
    source: Source
    seconds: float | None = None
    quartiles: tuple[float, float] | None = None
    bandwidth_fraction: float | None = None
    relative_error: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class Results:
    """All rows of one device.

    Attributes:
      measured: whether the times are measured; otherwise all are predicted.
      device: its name.
      bandwidth: bytes that it reads or writes in a second.
      tensor_rate: additions and multiplications of its tensor cores in a second, where known.
      checked: relative errors of interpreted kernels by tokens, where none could run.
      date: when it was found, in UTC.
      versions: of Python and of the packages that took part.
      rows: the products.
    """

    measured: bool
    device: str
    bandwidth: float
    tensor_rate: float | None
    checked: dict[int, float]
    date: str
    versions: dict[str, str]
    rows: tuple[Row, ...] = ()

    def __post_init__(self) -> None:
        if any((row.source == "measured") != self.measured for row in self.rows):
            raise SpqrError("measured and predicted rows cannot be in the same results")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that take part, where installed."""
    found = {"python": platform.python_version()}
    for name in ("jax", "jaxlib", "torch", "spqr_quant"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def now() -> str:
    """The present time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def write(results: Any, path: Path) -> None:
    """Writes a dataclass with `rows` as JSON, at once: who reads the file finds the old content or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    rows = [json.dumps(dataclasses.asdict(row)) for row in results.rows]
    head = json.dumps(dataclasses.asdict(dataclasses.replace(results, rows=())), indent=1)
    # A line for each row.
    body = head.replace('"rows": []', '"rows": [\n  ' + ",\n  ".join(rows) + "\n ]")
    partial.write_text(body + "\n")
    os.replace(partial, path)


def read(path: Path) -> Results:
    """What `write` has written.

    Example:
      >>> read(Path("notebooks/results/kernels-h100-predicted.json")).measured
      False
    """
    found: dict[str, Any] = json.loads(path.read_text())
    rows: list[dict[str, Any]] = found.pop("rows")
    for row in rows:
        row |= {"shape": tuple(row["shape"]), "quartiles": row["quartiles"] and tuple(row["quartiles"])}
    checked = {int(tokens): error for tokens, error in found.pop("checked").items()}
    return Results(**found, checked=checked, rows=tuple(Row(**row) for row in rows))
