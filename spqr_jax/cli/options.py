"""Arguments and options that several commands share."""

import math
from collections.abc import Callable
from enum import StrEnum
from typing import Annotated, Any

import typer

from pallas_kernels.errors import SpqrError
from spqr_jax.measure.paper_texts import Protocol
from spqr_jax.runtime.memory import Memory

LARGEST_SEED = 2**64 - 1

Number = int | float | None
Check = Callable[[Any, Any, Number], Number]


def at_least(least: float, most: float = math.inf) -> Check:
    """A callback of typer that checks an option's number before any work; None passes.

    Raises:
      SpqrError: the number is NaN, infinite or out of its range; the message has the option's name.

    Example:
      >>> Windows = Annotated[int | None, typer.Option(callback=at_least(1), help="Number of windows.")]
    """
    end = f" and at most {most}" if math.isfinite(most) else ""
    return _checked(lambda value: least <= value <= most, f"at least {least}{end}")


def over(least: float, most: float) -> Check:
    """Like `at_least`, without the lower limit itself."""
    return _checked(lambda value: least < value <= most, f"over {least} and at most {most}")


def _checked(allows: Callable[[float], bool], limits: str) -> Check:
    # By position: typer's own classes for context and parameter are not those of the objects.
    def check(context: Any, param: Any, value: Number) -> Number:
        if isinstance(value, float) and not math.isfinite(value):
            raise SpqrError(f"{param.opts[0]} is {value}, but must be a finite number")
        if value is not None and not allows(value):
            raise SpqrError(f"{param.opts[0]} is {value}, but must be {limits}")
        return value

    return check


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
InMemory = Annotated[
    Memory,
    typer.Option(
        "--memory", help="On a CPU: keep matrices packed, or unpack them once, which is faster; auto: as they fit."
    ),
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
Sequences = Annotated[int, typer.Option(callback=at_least(1), help="Number of calibration sequences.")]
SequenceLength = Annotated[int, typer.Option(callback=at_least(1), help="Tokens per calibration sequence.")]
Seed = Annotated[
    int,
    typer.Option(
        callback=at_least(0, LARGEST_SEED), help="Seed of the random places where calibration sequences are cut."
    ),
]

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
Window = Annotated[int, typer.Option(callback=at_least(2), help="Tokens per window.")]
Windows = Annotated[
    int | None, typer.Option(callback=at_least(1), help="Number of windows to use, from the start; default: all.")
]

MaxNewTokens = Annotated[int, typer.Option(callback=at_least(1), help="Most tokens to generate.")]
Temperature = Annotated[float, typer.Option(callback=at_least(0), help="0 for greedy decoding.")]
TopK = Annotated[int | None, typer.Option(callback=at_least(1), help="Sample from the k likeliest tokens.")]
TopP = Annotated[
    float | None,
    typer.Option(callback=over(0, 1), help="Sample from the likeliest tokens that add up to this probability."),
]
SamplingSeed = Annotated[int, typer.Option(callback=at_least(0, LARGEST_SEED), help="Seed of sampling.")]
