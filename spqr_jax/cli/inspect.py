"""The command `spqr inspect`."""

import math
from collections.abc import Sequence
from typing import Any

from rich.table import Column, Table

from spqr_jax.cli import console
from spqr_jax.cli.options import Json, Model


def inspect(source: Model, as_json: Json = False) -> None:
    """Show the form of a checkpoint and a table of its tensors, without reading them.

    Example: spqr inspect smollm2-spqr
    """
    from spqr_jax.storage import checkpoint

    content, table = inspect_own(source) if checkpoint.is_checkpoint(source) else inspect_foreign(source)
    if as_json:
        console.emit(content, as_json)
        return
    output = console.output()
    for label in (label for label in ("form", "family", "alias") if label in content):
        output.print(f"{label}: {content[label]}")
    for name, value in content.get("sizes", {}).items():
        output.print(f"{name.replace('_', ' ')}: {value:{',.4f' if isinstance(value, float) else ','}}")
    output.print(table)


def inspect_own(directory: str) -> tuple[dict[str, Any], Table]:
    """A checkpoint of this project: as JSON, and as a table with a row per matrix."""
    from spqr_jax.storage.checkpoint import describe
    from spqr_jax.storage.directories import bytes_on_disk
    from spqr_jax.storage.paths import resolved
    from spqr_jax.storage.totals import summarize_described

    header: Any = describe(directory)
    columns = ("out x in", "bits", "group", "statistics", "outliers", "bits/weight")
    table = Table(Column("matrix", no_wrap=True), *columns, box=None)
    for path, matrix in header["matrices"].items():
        weights = math.prod(matrix["shape"])
        matrix["bits_per_weight"] = 8 * matrix["bytes"] / weights
        matrix["outlier_share"] = (matrix["outliers"] or 0) / weights
        statistics = "16 bit" if matrix["scale_bits"] is None else f"{matrix['scale_bits']} bit"
        share, size = f"{matrix['outlier_share']:.2%}", f"{matrix['bits_per_weight']:.3f}"
        numbers = (str(matrix["bits"]), str(matrix["group_size"]), statistics, share, size)
        table.add_row(path, times(matrix["shape"]), *numbers)
    for path, array in header["dense"].items():
        table.add_row(path, times(array["shape"]), array["dtype"], "", "", "", "")
    sizes = summarize_described(header).sizes_with_files(bytes_on_disk(resolved(directory)))
    return {"form": "spqr-jax checkpoint", "sizes": sizes, **header}, table


def inspect_foreign(source: str) -> tuple[dict[str, Any], Table]:
    """A checkpoint of another project: as JSON, and as a table with a row per tensor."""
    from converters.formats.detect import open_source

    found = open_source(source)
    table = Table(Column("tensor", no_wrap=True), "shape", "type", box=None)
    for name, tensor in found.tensors.items():
        table.add_row(name, times(tensor.shape), tensor.kind)
    tensors = {name: {"shape": tensor.shape, "kind": tensor.kind} for name, tensor in found.tensors.items()}
    return {"form": found.form, "path": str(found.path), "family": found.model_type, "tensors": tensors}, table


def times(shape: Sequence[int]) -> str:
    """A shape as text: `4096 x 11008`."""
    return " x ".join(map(str, shape))
