"""The command `spqr eval`."""

import time
from typing import Annotated, Any

import typer

from spqr_jax.cli import console
from spqr_jax.cli.options import ComputingType, InMemory, Json, Model, PaperText, Texts, Window, Windows, at_least
from spqr_jax.runtime.memory import Memory


def evaluate(
    source: Model,
    text: Texts = None,
    protocol: PaperText = None,
    window: Window = 1024,
    stride: Annotated[
        int | None, typer.Option(callback=at_least(1), help="Tokens between the starts of windows that overlap.")
    ] = None,
    windows: Windows = None,
    dtype: ComputingType = None,
    memory: InMemory = Memory.AUTO,
    as_json: Json = False,
) -> None:
    """Measure perplexity on a text.

    Example: spqr eval smollm2-spqr --windows 20
    """
    from spqr_jax.cli.models import load_model
    from spqr_jax.cli.texts import evaluation_tokens
    from spqr_jax.measure.perplexity import counted_perplexity, counted_windows, token_losses
    from spqr_jax.models.unpacked import for_measuring
    from spqr_jax.storage.totals import summarize

    model, params, tokenizer = load_model(source, dtype)
    started = time.perf_counter()
    ids = evaluation_tokens(tokenizer, text, protocol, window)
    parts, counted = counted_windows(ids, window=window, stride=stride, max_windows=windows, first=model.first_token)
    losses = console.track(token_losses(model, for_measuring(params, memory), parts), len(parts), "perplexity")
    result: dict[str, Any] = {
        "perplexity": counted_perplexity(losses, counted),
        "tokens": parts.size if stride is None else sum(counted) + 1,
        **summarize(params).sizes(),
    }
    console.emit(result | {"seconds": time.perf_counter() - started}, as_json)
