"""A quantization as one HTML page: size, errors, settings and times of a checkpoint, in tables and plots.

The page is self-contained: it loads nothing, and follows the browser's light or dark colors.
"""

import dataclasses
import math
import os
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from flax.traverse_util import flatten_dict
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from pallas_kernels.errors import SpqrError
from spqr_jax.figures.report_plots import bars, lines
from spqr_jax.models.experts import matrix_names
from spqr_jax.quantization.report import MatrixReport
from spqr_jax.rules import described
from spqr_jax.storage.description import Description, MatrixEntry, describe
from spqr_jax.storage.directories import bytes_on_disk, write_text
from spqr_jax.storage.paths import absolute
from spqr_jax.storage.record import Record, pooled_matrices, read_record
from spqr_jax.storage.totals import is_end, summarize_described

TEMPLATE = "report.html.jinja"
IN_A_BLOCK = re.compile(r"layers_(\d+)\.(.+)", re.DOTALL)
MISSING = "–"


class Matrix(NamedTuple):
    """A packed matrix.

    Attributes:
      name: such as `layers_3.q_proj`.
      block: 3; None outside the blocks.
      kind: `q_proj`.
      shape: (out, in), or (experts, out, in).
      bytes: of its packed arrays.
      outliers: their number.
      report: its report, where one was recorded.
    """

    name: str
    block: int | None
    kind: str
    shape: tuple[int, ...]
    bytes: int
    outliers: int
    report: MatrixReport | None

    @property
    def weights(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


def write_report(directory: str | PathLike[str], output: str | PathLike[str] | None = None) -> Path:
    """Writes the page of a checkpoint atomically; an existing file is replaced.

    Args:
      directory: a checkpoint of `quantize_checkpoint`, or of `save` after `quantize`.
      output: the file; by default the directory's name with `.html`, beside it.

    Returns:
      The file.

    Raises:
      CheckpointError: there is no checkpoint, or its description or record is damaged.
      SpqrError: it has no packed matrix, matplotlib is not installed, or `output` is a directory, is in no directory,
        or is in the checkpoint.

    Example:
      >>> write_report("tiny-spqr")
      PosixPath('.../tiny-spqr.html')
    """
    root = Path(os.path.abspath(absolute(directory)))
    page = report_page(root)
    path = root.with_name(f"{root.name}.html") if output is None else Path(os.path.abspath(absolute(output)))
    if path.is_dir():
        raise SpqrError(f"{path} is a directory: give the name of a file")
    if not path.parent.is_dir():
        raise SpqrError(f"{path} cannot be written, because {path.parent} is not a directory")
    if path.resolve().is_relative_to(root.resolve()):
        raise SpqrError(f"{path} is in the checkpoint, which is not changed: choose a place outside of {root}")
    write_text(path, page)
    return path


def report_page(directory: str | PathLike[str]) -> str:
    """The page of a checkpoint as text.

    Raises:
      CheckpointError: there is no checkpoint, or its description or record is damaged.
      SpqrError: it has no packed matrix, or matplotlib is not installed.
    """
    root = Path(os.path.abspath(absolute(directory)))
    header, record = describe(root), read_record(root)
    matrices = _matrices(header, record)
    if not matrices:
        raise SpqrError(f"{root} has no packed matrix to report on: quantize the model first")
    environment = Environment(
        loader=PackageLoader("spqr_jax", "data"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(TEMPLATE).render(
        name=root.name,
        recorded=record is not None,
        totals=_totals(header, record, matrices, bytes_on_disk(root)),
        figures=_figures(record, matrices),
        tables={
            **({} if record is None else {"Settings": _settings(record), "Run": _run(record)}),
            "Model": _model(header),
        },
        columns=("matrix", "out × in", "bits per weight", "outliers", "relative error", "seconds"),
        rows=[_row(matrix) for matrix in matrices],
    )


def _matrices(header: Description, record: Record | None) -> list[Matrix]:
    """All packed matrices: block by block, in the order of quantization."""
    reports: dict[str, MatrixReport] = {}
    for block in () if record is None else record.blocks:
        reports |= block.matrices
    found = []
    for path, entry in header["matrices"].items():
        name = path.removesuffix(".kernel").removesuffix(".embedding")
        place = IN_A_BLOCK.fullmatch(name)
        found.append(
            Matrix(
                name=name,
                block=int(place[1]) if place else None,
                kind=place[2] if place else name,
                shape=tuple(entry["shape"]),
                bytes=entry["bytes"],
                outliers=entry["outliers"] or 0,
                report=reports.get(name) or _of_experts(name, entry, reports),
            )
        )
    # A stack stands where its first matrix does.
    order = {name.removesuffix("[0]"): number for number, name in enumerate(reports)}
    return sorted(found, key=lambda m: (math.inf if m.block is None else m.block, order.get(m.name, 0)))


def _of_experts(name: str, entry: MatrixEntry, reports: Mapping[str, MatrixReport]) -> MatrixReport | None:
    """One report on the matrices of all experts: their mean error, and their seconds together."""
    found = [reports[own] for own in matrix_names(name, entry["shape"][0]) if own in reports]
    if not found:
        return None
    return MatrixReport(
        bits_per_weight=statistics.mean(report.bits_per_weight for report in found),
        outlier_share=statistics.mean(report.outlier_share for report in found),
        relative_error=statistics.mean(report.relative_error for report in found),
        seconds=sum(report.seconds for report in found),
        pooled=any(report.pooled for report in found),
    )


def _bits(matrices: Sequence[Matrix]) -> float:
    """Bits per weight."""
    return 8 * sum(matrix.bytes for matrix in matrices) / sum(matrix.weights for matrix in matrices)


def _share(matrices: Sequence[Matrix]) -> float:
    """Outliers per weight."""
    return sum(matrix.outliers for matrix in matrices) / sum(matrix.weights for matrix in matrices)


def _totals(header: Description, record: Record | None, matrices: Sequence[Matrix], on_disk: int) -> dict[str, str]:
    ends = [matrix for matrix in matrices if is_end(matrix.name)]
    matrices = [matrix for matrix in matrices if not is_end(matrix.name)] or matrices
    weights, packed = (sum(getattr(matrix, name) for matrix in matrices) for name in ("weights", "bytes"))
    whole = summarize_described(header)
    in_files = whole.sizes_with_files(on_disk)["bits_per_parameter_on_disk"]
    totals = {
        "bits per quantized weight": f"{_bits(matrices):.3f}",
        "bits per parameter, those that are not quantized too": f"{whole.bits_per_parameter:.3f}",
        "outliers": f"{_share(matrices):.2%}",
        "quantized weights": f"{weights:,} in {len(matrices):,} matrices",
        "their bytes in 16 bits": f"{2 * weights:,}",
        "their bytes packed": f"{packed:,}, {2 * weights / packed:.2f} times smaller",
        **{f"bits per weight of {matrix.name}": f"{_bits([matrix]):.3f}, {matrix.bytes:,} bytes" for matrix in ends},
        "bytes of other parameters, not quantized": f"{sum(array['bytes'] for array in header['dense'].values()):,}",
        "bytes on disk, with the tokenizer": f"{on_disk:,}, {in_files:.3f} bits per parameter",
    }
    if record is not None:
        seconds = sum(block.seconds for block in record.blocks)
        count = header["config"]["num_layers"]
        if pooled := pooled_matrices(record.blocks):
            totals["matrices of experts with too few tokens, solved for those of all experts"] = f"{pooled:,}"
        totals["seconds to quantize"] = f"{seconds:,.1f} for {count:,} blocks"
    reports = {m.name: m.report for m in [*matrices, *ends] if m.report is not None}
    errors = {name: report.relative_error for name, report in reports.items() if math.isfinite(report.relative_error)}
    if errors:
        worst = max(errors, key=lambda name: errors[name])
        totals["largest relative error"] = f"{errors[worst]:.2e}, of {worst}"
    return totals


def _row(matrix: Matrix) -> tuple[str, ...]:
    recorded = (
        (MISSING, MISSING)
        if matrix.report is None
        else (f"{matrix.report.relative_error:.2e}", f"{matrix.report.seconds:.3f}")
    )
    shape = " × ".join(map(str, matrix.shape))
    return matrix.name, shape, f"{_bits([matrix]):.3f}", f"{_share([matrix]):.2%}", *recorded


def _settings(record: Record) -> dict[str, str]:
    shape = record.calibration
    calibration = "none: round-to-nearest" if shape is None else f"{shape[0]:,} sequences of {shape[1]:,} tokens"
    return _texts(dataclasses.asdict(record.config)) | described(record.rules) | {"calibration": calibration}


def _run(record: Record) -> dict[str, str]:
    device = record.device if record.devices == 1 else f"{record.devices} × {record.device}"
    return {"date": record.date, "device": device, "machine": record.machine, **record.versions}


def _model(header: Description) -> dict[str, str]:
    options = flatten_dict(header["config"], sep=".")
    return _texts({"family": header["family"], "dtype": header["dtype"], **options})


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    words = {None: "none", True: "yes", False: "no"}
    return {
        name.replace("_", " "): words[value] if value is None or isinstance(value, bool) else str(value)
        for name, value in values.items()
    }


def _figures(record: Record | None, matrices: Sequence[Matrix]) -> dict[str, Markup]:
    """Caption → plot of the matrices in blocks."""
    kinds: dict[str, list[Matrix]] = {}
    for matrix in matrices:
        if matrix.block is not None:
            kinds.setdefault(matrix.kind, []).append(matrix)

    def by_block(value: Callable[[Matrix], float]) -> dict[str, dict[int, float]]:
        return {kind: {m.block: value(m) for m in found if m.block is not None} for kind, found in kinds.items()}

    figures = {}
    if record is not None:
        errors = by_block(lambda matrix: matrix.report.relative_error if matrix.report else math.nan)
        uncalibrated = "‖W − Ŵ‖² / ‖W‖²"
        formula = uncalibrated if record.calibration is None else "‖(W − Ŵ) X‖² / ‖W X‖² on calibration inputs X"
        figures[f"Relative error {formula}, by block"] = lines("errors", errors, "relative error", "log")
    if kinds:
        shares = by_block(lambda matrix: 100 * _share([matrix]))
        figures["Share of weights kept as outliers, by block"] = lines("outliers", shares, "outliers (%)")
        bits = {kind: _bits(found) for kind, found in kinds.items()}
        figures["Bits per weight by kind of matrix, over all blocks"] = bars("bits", bits, "bits per weight")
    if record is not None:
        seconds = {block.number - 1: block.seconds for block in record.blocks if not any(map(is_end, block.matrices))}
        figures["Seconds per block, with reading and writing; the first block includes compilation"] = lines(
            "seconds", {"": seconds}, "seconds"
        )
    return {caption: Markup(svg) for caption, svg in figures.items()}
