"""The commands that measure: `spqr eval` and `spqr compare`."""

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from pallas_kernels.errors import SpqrError
from spqr_jax.cli import console
from spqr_jax.cli.app import Json, Model, app
from spqr_jax.cli.models import encode_text, load_model, require
from spqr_jax.measure.paper_texts import Protocol, protocol_tokens

TextFile = Annotated[Path | None, typer.Option(help="Text file; default: the start of WikiText-2's test text.")]
PaperText = Annotated[Protocol | None, typer.Option(help="A text as the papers cut it; needs the package datasets.")]
Window = Annotated[int, typer.Option(help="Tokens per window.")]
Windows = Annotated[int | None, typer.Option(help="Use only the first so many windows.")]


@app.command("eval")
def evaluate(
    source: Model,
    text: TextFile = None,
    protocol: PaperText = None,
    window: Window = 1024,
    stride: Annotated[int | None, typer.Option(help="Tokens between the starts of windows that overlap.")] = None,
    windows: Windows = None,
    as_json: Json = False,
) -> None:
    """Measure perplexity on a text.

    Example: spqr eval smollm2-spqr --windows 20
    """
    from spqr_jax.measure.perplexity import counted_perplexity, counted_windows, token_losses
    from spqr_jax.storage.totals import summarize

    model, params, tokenizer = load_model(source, "float32")
    started = time.perf_counter()
    ids = _tokens(tokenizer, text, protocol, window)
    parts, counted = counted_windows(ids, window=window, stride=stride, max_windows=windows)
    losses = console.track(token_losses(model, params, parts), len(parts), "perplexity")
    totals = summarize(params)
    result: dict[str, Any] = {
        "perplexity": counted_perplexity(losses, counted),
        "tokens": parts.size if stride is None else sum(counted) + 1,
    }
    if totals.weights:
        result |= {"bits_per_weight": totals.bits_per_weight, "outlier_share": totals.outlier_share}
    console.emit(result | {"seconds": time.perf_counter() - started}, as_json)


@app.command()
def compare(
    original: Model,
    quantized: Annotated[str, typer.Argument(help="Another checkpoint of the same model.")],
    text: TextFile = None,
    protocol: PaperText = None,
    window: Window = 1024,
    windows: Windows = None,
    prompts: Annotated[int, typer.Option(help="Windows of the text whose starts both models go on from.")] = 16,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of each prompt.")] = 32,
    new_tokens: Annotated[int, typer.Option(help="Tokens that each model writes.")] = 64,
    as_json: Json = False,
) -> None:
    """Measure how far a quantized model is from its original, by its predictions and by the text that it writes.

    Example: spqr compare HuggingFaceTB/SmolLM2-135M-Instruct smollm2-spqr --windows 20
    """
    import numpy as np

    from spqr_jax.measure.continuations import agreement_lengths, continuation_perplexity, continue_greedily
    from spqr_jax.measure.divergence import mean_divergence, window_divergences
    from spqr_jax.measure.perplexity import cut_windows

    model, before, tokenizer = load_model(original, "float32")
    other, after, _ = load_model(quantized, "float32")
    if model.config != other.config:
        raise SpqrError(f"{original} and {quantized} are not the same model: {model.config} and {other.config}")
    started = time.perf_counter()
    parts = cut_windows(_tokens(tokenizer, text, protocol, window), window=window, max_windows=windows)
    divergences = console.track(window_divergences(model, before, after, parts), len(parts), "distributions")
    divergence = mean_divergence(list(divergences))
    starts = parts[:prompts, :prompt_tokens]
    written, expected = (continue_greedily(model, params, starts, new_tokens) for params in (after, before))
    result = {
        "kl_divergence": divergence.kl,
        "top1_agreement": divergence.agreement,
        "tokens": parts.size,
        "agreement_length": float(np.mean(agreement_lengths(written, expected))),
        "perplexity_of_own_text": continuation_perplexity(model, before, starts, written),
        "perplexity_of_original_text": continuation_perplexity(model, before, starts, expected),
        "prompts": len(starts),
    }
    console.emit(result | {"seconds": time.perf_counter() - started}, as_json)


def _tokens(tokenizer: Any, text: Path | None, protocol: Protocol | None, window: int) -> Any:
    """Token ids of a text file, of a protocol's text, or of the package's."""
    if protocol is not None:
        if text is not None:
            raise SpqrError(f"give a text file or the protocol {protocol}, not both")
        require(tokenizer)
        return protocol_tokens(protocol, tokenizer, window)
    return encode_text(tokenizer, text, "test")
