"""The command `spqr compare`."""

import time
from typing import Annotated

import typer

from pallas_kernels.errors import SpqrError
from spqr_jax.cli import console
from spqr_jax.cli.options import ComputingType, InMemory, Json, Model, PaperText, Texts, Window, Windows, at_least
from spqr_jax.runtime.memory import Memory


def compare(
    original: Model,
    quantized: Annotated[str, typer.Argument(help="Another checkpoint of the same model.")],
    text: Texts = None,
    protocol: PaperText = None,
    window: Window = 1024,
    windows: Windows = None,
    dtype: ComputingType = None,
    prompts: Annotated[
        int, typer.Option(callback=at_least(1), help="Number of prompts: the starts of the first windows.")
    ] = 16,
    prompt_tokens: Annotated[int, typer.Option(callback=at_least(1), help="Tokens of each prompt.")] = 32,
    new_tokens: Annotated[
        int, typer.Option(callback=at_least(1), help="Tokens that each model generates after a prompt.")
    ] = 64,
    memory: InMemory = Memory.AUTO,
    as_json: Json = False,
) -> None:
    """Measure how far a quantized model is from its original: by its predictions, and by the text it generates.

    Example: spqr compare HuggingFaceTB/SmolLM2-135M-Instruct smollm2-spqr --windows 20
    """
    import numpy as np

    from spqr_jax.cli.models import load_model
    from spqr_jax.cli.texts import evaluation_tokens
    from spqr_jax.generation import for_decoding
    from spqr_jax.measure.continuations import agreement_lengths, continuation_perplexity, continue_greedily
    from spqr_jax.measure.divergence import mean_divergence, window_divergences
    from spqr_jax.measure.perplexity import cut_windows
    from spqr_jax.models.unpacked import for_measuring

    model, before, tokenizer = load_model(original, dtype)
    other, after, _ = load_model(quantized, dtype)
    if model.config != other.config:
        raise SpqrError(f"{original} and {quantized} are not the same model: {model.config} and {other.config}")
    started = time.perf_counter()
    ids = evaluation_tokens(tokenizer, text, protocol, window)
    parts = cut_windows(ids, window=window, max_windows=windows, first=model.first_token)
    first, second = (for_measuring(params, memory) for params in (before, after))
    divergences = console.track(window_divergences(model, first, second, parts), len(parts), "distributions")
    divergence = mean_divergence(list(divergences))
    starts = parts[:prompts, :prompt_tokens]
    decoding = (for_decoding(model, params, memory) for params in (after, before))
    written, expected = (continue_greedily(model, params, starts, new_tokens) for params in decoding)
    result = {
        "kl_divergence": divergence.kl,
        "top1_agreement": divergence.agreement,
        "tokens": parts.size,
        "agreement_length": float(np.mean(agreement_lengths(written, expected))),
        "perplexity_of_own_text": continuation_perplexity(model, first, starts, written),
        "perplexity_of_original_text": continuation_perplexity(model, first, starts, expected),
        "prompts": len(starts),
    }
    console.emit(result | {"seconds": time.perf_counter() - started}, as_json)
