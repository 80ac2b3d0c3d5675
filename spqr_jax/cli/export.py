"""The command `spqr export`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from pallas_kernels.errors import SpqrError
from spqr_jax.cli import console
from spqr_jax.cli.options import Dtype, Json, Model
from spqr_jax.storage.destination import check_destination, check_outside
from spqr_jax.storage.paths import resolved


class Format(StrEnum):
    """Forms that a checkpoint can be written in."""

    SPQR = "spqr"
    HF = "hf"
    HF_SPQR = "hf-spqr"


def export(
    source: Model,
    destination: Annotated[Path, typer.Argument(parser=resolved, help="Directory to write; must not exist.")],
    as_format: Annotated[
        Format,
        typer.Option(
            "--format",
            help="hf: Hugging Face, dequantized; hf-spqr: the official packed format; spqr: a checkpoint of spqr.",
        ),
    ],
    dtype: Annotated[Dtype | None, typer.Option(help="Type of the weights of hf; default: the checkpoint's.")] = None,
    as_json: Json = False,
) -> None:
    """Write a checkpoint in another form.

    Example: spqr export smollm2-spqr smollm2-hf --format hf
    """
    from converters import export_hf_spqr, export_huggingface
    from spqr_jax.cli.models import open_model
    from spqr_jax.storage import checkpoint
    from spqr_jax.storage.directories import bytes_on_disk
    from spqr_jax.storage.model_card import Origin
    from spqr_jax.storage.record import read_record

    if dtype is not None and as_format is not Format.HF:
        raise SpqrError(f"--dtype {dtype} needs --format hf, but the format is {as_format}: leave it out")
    check_outside(destination, source)
    check_destination(destination)
    opened = open_model(source)
    model, params, tokenizer = opened.model, opened.read(), opened.tokenizer
    record = read_record(source) if checkpoint.is_checkpoint(source) else None
    origin = Origin(opened.name if record is None else record.base_model, record)
    if as_format is Format.HF:
        kind: Any = None if dtype is None else dtype.value
        export_huggingface(destination, model, params, tokenizer=tokenizer, dtype=kind, origin=origin)
    elif as_format is Format.HF_SPQR:
        export_hf_spqr(destination, model, params, tokenizer=tokenizer, origin=origin)
    else:
        checkpoint.save(destination, model, params, tokenizer=tokenizer, origin=origin)
    result = {"destination": str(destination), "bytes_on_disk": bytes_on_disk(destination)}
    console.emit(result, as_json)
