"""The command line `spqr`: quantize, eval, generate, inspect, export.

Results go to standard output, progress to standard error. Exit status: 0 done, 1 an error told in one line, 2 wrong
usage.
"""

import time
from collections.abc import Sequence
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from spqr_jax import console

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)

Model = Annotated[
    str,
    typer.Argument(
        help="A checkpoint of spqr; a Hugging Face directory or hub id (safetensors, PyTorch or SpQR); "
        "a directory that the official SpQR code has written; or a GGUF file."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


class Method(StrEnum):
    """What to quantize with."""

    SPQR = "spqr"
    GPTQ = "gptq"
    RTN = "rtn"


class Preset(StrEnum):
    """The paper's two settings."""

    COMPACT = "compact"
    NEAR_LOSSLESS = "near-lossless"


class Order(StrEnum):
    """Orders of input features."""

    ACT_ORDER = "act_order"
    IDENTITY = "identity"


class Format(StrEnum):
    """What to write a checkpoint as."""

    SPQR = "spqr"
    HF = "hf"
    HF_SPQR = "hf-spqr"


class Dtype(StrEnum):
    """Types of exported dense weights."""

    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"


def main() -> None:
    """Entry point of `spqr`."""
    console.quiet()
    console.run(app)


@app.callback()
def about() -> None:
    """Near-lossless compression of language models to 3-4 bits per weight."""


@app.command()
def quantize(
    source: Model,
    destination: Annotated[Path, typer.Argument(help="Directory to write.")],
    preset: Annotated[Preset, typer.Option(help="compact: 3 bits; near-lossless: 4 bits.")] = Preset.COMPACT,
    method: Annotated[Method, typer.Option(help="gptq: no outliers; rtn: round-to-nearest.")] = Method.SPQR,
    bits: Annotated[int | None, typer.Option(help="Width of a weight code: 2, 3, 4, 5 or 8.")] = None,
    group_size: Annotated[int | None, typer.Option(help="Weights that share a scale: 8, 16, 32, 64 or 128.")] = None,
    stats_bits: Annotated[int | None, typer.Option(help="Width of scale and zero codes; 0 for 16-bit floats.")] = None,
    outlier_threshold: Annotated[float | None, typer.Option(help="The paper's τ; lower keeps more outliers.")] = None,
    permutation: Annotated[Order | None, typer.Option(help="Order in which input features are quantized.")] = None,
    damping: Annotated[float | None, typer.Option(help="Share of mean diag H added to it.")] = None,
    calibration: Annotated[Path | None, typer.Option(help="Text file; default: WikiText-2's validation text.")] = None,
    sequences: Annotated[int, typer.Option(help="Calibration sequences.")] = 32,
    sequence_length: Annotated[int, typer.Option(help="Tokens per calibration sequence.")] = 512,
    seed: Annotated[int, typer.Option(help="Seed of the places where sequences are cut.")] = 0,
    hidden_on_disk: Annotated[
        bool, typer.Option("--hidden-on-disk", help="Keep hidden states in mapped files, not in memory.")
    ] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace a checkpoint at the destination.")] = False,
    distributed: Annotated[
        bool, typer.Option("--distributed", help="One of several processes with this command, see README.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Quantize a model and save it; one block is in memory at a time, and all devices share the work.

    What is finished is kept in DESTINATION.partial: stopped by whatever, the same command goes on from there.

    Example: spqr quantize HuggingFaceTB/SmolLM2-135M-Instruct smollm2-3bit
    """
    from dataclasses import replace

    if distributed:
        from spqr_jax.processes import join

        console.reserve_output()
        join()

    import jax

    from spqr_jax.checkpoint import describe
    from spqr_jax.config import COMPACT, NEAR_LOSSLESS
    from spqr_jax.processes import is_first
    from spqr_jax.streaming import quantize_checkpoint

    config = {Preset.COMPACT: COMPACT, Preset.NEAR_LOSSLESS: NEAR_LOSSLESS}[preset]
    chosen = {
        "bits": bits,
        "group_size": group_size,
        "outlier_threshold": outlier_threshold,
        "permutation": None if permutation is None else permutation.value,
        "damping": damping,
    }
    config = replace(config, **{name: value for name, value in chosen.items() if value is not None})  # type: ignore[arg-type]
    if stats_bits is not None:
        config = replace(config, scale_bits=stats_bits or None, zero_bits=stats_bits or None)
    if method is not Method.SPQR:
        config = replace(config, outlier_threshold=None)

    opened = open_model(source, "float16")
    tokens = None
    if method is not Method.RTN:
        tokens = calibration_tokens(opened.tokenizer, calibration, sequences, sequence_length, seed)

    started = time.perf_counter()
    mesh = jax.make_mesh((jax.device_count(),), ("devices",)) if jax.device_count() > 1 else None
    with console.track_blocks(opened.model.config.num_layers) as show:
        blocks = quantize_checkpoint(
            opened,
            destination,
            tokens,
            config=config,
            mesh=mesh,
            hidden_on_disk=hidden_on_disk,
            overwrite=overwrite,
            on_block=show if is_first() else None,
        )
    if not is_first():
        return
    matrices = describe(destination)["matrices"].values()
    weights = sum(matrix["shape"][0] * matrix["shape"][1] for matrix in matrices)
    console.emit(
        {
            "destination": str(destination),
            "bits_per_weight": 8 * sum(matrix["bytes"] for matrix in matrices) / weights,
            "outlier_share": sum(matrix["outliers"] or 0 for matrix in matrices) / weights,
            "seconds": time.perf_counter() - started,
            "bytes_on_disk": console.bytes_on_disk(destination),
            "seconds_per_block": [block.seconds for block in blocks],
            "matrices": {name: matrix._asdict() for block in blocks for name, matrix in block.matrices.items()},
        },
        as_json,
    )


@app.command("eval")
def evaluate(
    source: Model,
    text: Annotated[Path | None, typer.Option(help="Text file; default: the start of WikiText-2's test text.")] = None,
    window: Annotated[int, typer.Option(help="Tokens per window.")] = 1024,
    windows: Annotated[int | None, typer.Option(help="Use only the first so many windows.")] = None,
    as_json: Json = False,
) -> None:
    """Measure perplexity on a text.

    Example: spqr eval smollm2-3bit --windows 20
    """
    import numpy as np

    from spqr_jax.corpus import wikitext2
    from spqr_jax.evaluation import cut_windows, window_losses
    from spqr_jax.summary import summarize

    model, params, tokenizer = load_model(source, "float32")
    started = time.perf_counter()
    ids = encode(tokenizer, wikitext2("test") if text is None else text.read_text(encoding="utf-8"))
    parts = cut_windows(ids, window=window, max_windows=windows)
    losses = list(console.track(window_losses(model, params, parts), len(parts), "perplexity"))
    totals = summarize(params)
    result: dict[str, Any] = {"perplexity": float(np.exp(np.mean(losses))), "tokens": parts.size}
    if totals.weights:
        result |= {"bits_per_weight": totals.bits_per_weight, "outlier_share": totals.outlier_share}
    console.emit(result | {"seconds": time.perf_counter() - started}, as_json)


@app.command()
def generate(
    source: Model,
    prompt: Annotated[str, typer.Argument(help="What to say to the model.")],
    max_new_tokens: Annotated[int, typer.Option(help="Stop after so many tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Sample among the k likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample among the likeliest tokens of this total share.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    chat: Annotated[bool, typer.Option(help="Use the tokenizer's chat template where it has one.")] = True,
    as_json: Json = False,
) -> None:
    """Generate text.

    Example: spqr generate smollm2-3bit "Why is the sky blue?" --temperature 0.7
    """
    from spqr_jax.generation import chat_prompt, stream

    model, params, tokenizer = load_model(source, "float32")
    require(tokenizer)
    ids = chat_prompt(tokenizer, prompt) if chat else encode(tokenizer, prompt)
    stops = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    started = time.perf_counter()
    steps = stream(
        model,
        params,
        [ids],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop_tokens=stops,
    )
    tokens: list[int] = []
    said = ""
    for (new,) in steps:
        tokens += new
        now = tokenizer.decode(tokens, skip_special_tokens=True)
        # A character of several tokens is shown when it is complete.
        if not as_json and not now.endswith("\N{REPLACEMENT CHARACTER}"):
            print(now[len(said) :], end="", flush=True)
            said = now
    if not as_json:
        print()
        return
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    console.emit({"text": text, "tokens": tokens, "seconds": time.perf_counter() - started}, as_json)


@app.command()
def inspect(source: Model, as_json: Json = False) -> None:
    """Show what is in a checkpoint, tensor by tensor, without reading the tensors.

    Example: spqr inspect smollm2-3bit
    """
    from spqr_jax import checkpoint

    content, table = inspect_own(source) if checkpoint.is_checkpoint(source) else inspect_foreign(source)
    if as_json:
        console.emit(content, as_json)
        return
    terminal = Console()
    # Where nobody looks, a file or a pipe, nothing is cut.
    output = Console(width=None if terminal.is_terminal else 120)
    for label in ("form", "family"):
        output.print(f"{label}: {content[label]}", highlight=False, markup=False)
    output.print(table)


@app.command()
def export(
    source: Model,
    destination: Annotated[Path, typer.Argument(help="Directory to write; must not exist.")],
    as_format: Annotated[
        Format,
        typer.Option(
            "--format",
            help="hf: Hugging Face, dequantized; hf-spqr: the official packed format; spqr: a checkpoint of spqr.",
        ),
    ],
    dtype: Annotated[Dtype | None, typer.Option(help="Type of the weights of hf; default: float16.")] = None,
    as_json: Json = False,
) -> None:
    """Write a checkpoint in another form.

    Example: spqr export smollm2-3bit smollm2-hf-spqr --format hf-spqr
    """
    from converters import export_hf_spqr, export_huggingface
    from spqr_jax import checkpoint

    if dtype is not None and as_format is not Format.HF:
        raise ValueError(f"--dtype {dtype} goes with --format hf, not with {as_format}")
    kind = dtype or Dtype.FLOAT16
    checkpoint.check_destination(destination)
    model, params, tokenizer = load_model(source, kind)
    if as_format is Format.HF:
        export_huggingface(destination, model, params, tokenizer=tokenizer, dtype=kind.value)
    elif as_format is Format.HF_SPQR:
        export_hf_spqr(destination, model, params, tokenizer=tokenizer)
    else:
        checkpoint.save(destination, model, params, tokenizer=tokenizer)
    result = {"destination": str(destination), "bytes_on_disk": console.bytes_on_disk(destination)}
    console.emit(result, as_json)


def inspect_own(directory: str) -> tuple[dict[str, Any], Table]:
    """Content of a checkpoint of ours, for machines and for people."""
    from spqr_jax.checkpoint import describe

    header = describe(directory)
    columns = ("out x in", "bits", "group", "statistics", "outliers", "bits/weight")
    table = Table(Column("matrix", no_wrap=True), *columns, box=None)
    for path, matrix in header["matrices"].items():
        weights = matrix["shape"][0] * matrix["shape"][1]
        matrix["bits_per_weight"] = 8 * matrix["bytes"] / weights
        matrix["outlier_share"] = (matrix["outliers"] or 0) / weights
        statistics = "16 bit" if matrix["scale_bits"] is None else f"{matrix['scale_bits']} bit"
        share, size = f"{matrix['outlier_share']:.2%}", f"{matrix['bits_per_weight']:.3f}"
        numbers = (str(matrix["bits"]), str(matrix["group_size"]), statistics, share, size)
        table.add_row(path, times(matrix["shape"]), *numbers)
    for path, array in header["dense"].items():
        table.add_row(path, times(array["shape"]), array["dtype"], "", "", "", "")
    return {"form": "spqr-jax checkpoint", **header}, table


def inspect_foreign(source: str) -> tuple[dict[str, Any], Table]:
    """Content of a checkpoint of another project, for machines and for people."""
    from converters.forms import open_source

    found = open_source(source)
    table = Table(Column("tensor", no_wrap=True), "shape", "type", box=None)
    for name, tensor in found.tensors.items():
        table.add_row(Text(name), times(tensor.shape), tensor.kind)
    tensors = {name: {"shape": tensor.shape, "kind": tensor.kind} for name, tensor in found.tensors.items()}
    return {"form": found.form, "path": str(found.path), "family": found.model_type, "tensors": tensors}, table


def times(shape: Sequence[int]) -> str:
    """A shape as people write it."""
    return " x ".join(map(str, shape))


def load_model(source: str, dtype: str) -> tuple[Any, Any, Any]:
    """Model, parameters and tokenizer of a checkpoint of ours or of another project.

    Dense parameters come as `dtype`.
    """
    opened = open_model(source, dtype)
    return opened.model, opened.read(), opened.tokenizer


def open_model(source: str, dtype: str) -> Any:
    """The same, without reading the parameters yet: a `ModelSource`."""
    import jax
    import jax.numpy as jnp

    from converters import open_pretrained
    from spqr_jax import checkpoint

    if not checkpoint.is_checkpoint(source):
        return open_pretrained(source, dtype=jnp.dtype(dtype))
    opened = checkpoint.open_checkpoint(source)

    def cast(leaf: Any) -> Any:
        is_weight = not isinstance(leaf, checkpoint.SpqrTensor) and jnp.issubdtype(leaf.dtype, jnp.floating)
        return leaf.astype(dtype) if is_weight else leaf

    def read(name: str) -> Any:
        return jax.tree.map(cast, opened.parts[name](), is_leaf=lambda leaf: isinstance(leaf, checkpoint.SpqrTensor))

    return opened._replace(parts={name: partial(read, name) for name in opened.parts})


def require(tokenizer: Any) -> None:
    """Raises a ValueError where a checkpoint came without a tokenizer."""
    if tokenizer is None:
        raise ValueError("the checkpoint has no tokenizer; add its tokenizer.json and tokenizer_config.json")


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, without special tokens."""
    require(tokenizer)
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def calibration_tokens(tokenizer: Any, text: Path | None, sequences: int, length: int, seed: int) -> Any:
    """Calibration windows at random places of a text file, or of the package's."""
    import numpy as np

    from spqr_jax.corpus import random_windows, wikitext2

    ids = encode(tokenizer, wikitext2("valid") if text is None else text.read_text(encoding="utf-8"))
    return random_windows(np.array(ids), sequences, length, seed)


if __name__ == "__main__":
    main()
