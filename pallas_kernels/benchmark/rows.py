"""The results of the benchmark and their JSON files. A file has either measured or predicted times."""

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
    """One product by one contestant.

    Attributes:
      matrix: models and matrices with this shape. Empty for a shape of no known model.
      shape: (out, in).
      tokens: rows of the activations.
      contestant: name of the contestant.
      format: format of the stored weights.
      read_bytes: bytes of weights and activations, each counted once.
      source: origin of the time.
      seconds: median time per call. None if the product is wrong or failed.
      quartiles: lower and upper quartile of measured times.
      bandwidth_fraction: `read_bytes` / `seconds` / bandwidth of the device.
      relative_error: ‖Δ‖ / ‖y‖ against the product in float32 with the same weights.
      error: message of the error, if any.
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
      measured: True if the times are measured, False if they are predicted.
      device: name of the device.
      bandwidth: bytes read or written per second.
      tensor_rate: additions and multiplications of the tensor cores per second, if known.
      checked: relative errors of the interpreted kernels by tokens, for predicted times.
      date: date and time in UTC.
      versions: versions of Python and of the packages used.
      rows: the rows.
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
            raise SpqrError("measured and predicted rows cannot be in the same results; write two files")


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that the benchmark uses."""
    found = {"python": platform.python_version()}
    for name in ("jax", "jaxlib", "torch", "spqr_quant"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def now() -> str:
    """The current time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def write(results: Any, path: Path) -> None:
    """Writes a dataclass with `rows` as JSON, one row per line. The file is replaced atomically."""
    content = dataclasses.asdict(results)
    rows = [json.dumps(row) for row in content["rows"]]
    head = json.dumps({**content, "rows": []}, indent=1)
    partial = path.with_name(f".{path.name}.partial")
    body = head.replace('"rows": []', '"rows": [\n  ' + ",\n  ".join(rows) + "\n ]")
    partial.write_text(body + "\n")
    os.replace(partial, path)


def read(path: Path) -> Results:
    """Reads results that `write` wrote.

    Example:
      >>> write(Results(True, "a GPU", 1e12, None, {}, now(), versions()), Path("kernels.json"))
      >>> read(Path("kernels.json")).device
      'a GPU'
    """
    found: dict[str, Any] = json.loads(path.read_text())
    rows: list[dict[str, Any]] = found.pop("rows")
    for row in rows:
        row |= {"shape": tuple(row["shape"]), "quartiles": row["quartiles"] and tuple(row["quartiles"])}
    checked = {int(tokens): error for tokens, error in found.pop("checked").items()}
    return Results(**found, checked=checked, rows=tuple(Row(**row) for row in rows))
