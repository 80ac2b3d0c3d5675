"""What the commands share: the application they belong to, and their common arguments."""

from typing import Annotated

import typer

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)

Model = Annotated[
    str,
    typer.Argument(
        help="A checkpoint of spqr; a Hugging Face directory or hub id (safetensors, PyTorch or SpQR); "
        "a directory that the official SpQR code has written; or a GGUF file."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


@app.callback()
def about() -> None:
    """Near-lossless compression of language models to 3-4 bits per weight."""
