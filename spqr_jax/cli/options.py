"""Arguments and options that several commands share."""

from enum import StrEnum
from typing import Annotated

import typer

from spqr_jax.measure.paper_texts import Protocol

Model = Annotated[
    str,
    typer.Argument(
        help="A checkpoint of spqr; a Hugging Face directory or hub id (safetensors, PyTorch or SpQR); "
        "a directory that the official SpQR code has written; or a GGUF file."
    ),
]


class Dtype(StrEnum):
    """Types of activations, and of weights that are not packed."""

    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"


StoredType = Annotated[
    Dtype | None,
    typer.Option("--dtype", help="Type of the model, and of weights that are not packed; default: the checkpoint's."),
]
ComputingType = Annotated[
    Dtype | None, typer.Option("--dtype", help="Type to compute in; default: the checkpoint's, on a CPU float32.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]

Calibration = Annotated[
    list[str] | None,
    typer.Option(
        help="A text file in UTF-8; rows with a text or messages in a .jsonl, .json or .parquet file; token ids in a "
        ".npy file; or a public set: wikitext2, c4, pajama, refinedweb, pile-10k, ultrachat. Repeat it for several; "
        "default: WikiText-2's validation text."
    ),
]
Sequences = Annotated[int, typer.Option(help="Number of calibration sequences.")]
SequenceLength = Annotated[int, typer.Option(help="Tokens per calibration sequence.")]
Seed = Annotated[int, typer.Option(help="Seed of the random places where calibration sequences are cut.")]

Texts = Annotated[
    list[str] | None,
    typer.Option(
        help="Files or public sets, as --calibration of spqr quantize; repeat it for several; default: the start of "
        "WikiText-2's test text."
    ),
]
PaperText = Annotated[
    Protocol | None, typer.Option(help="A text as the papers cut it; needs the package datasets, and a network.")
]
Window = Annotated[int, typer.Option(help="Tokens per window.")]
Windows = Annotated[int | None, typer.Option(help="Number of windows to use, from the start; default: all.")]
