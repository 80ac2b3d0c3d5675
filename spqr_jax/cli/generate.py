"""The command `spqr generate`."""

import time
from typing import Annotated

import typer

from spqr_jax.cli import console
from spqr_jax.cli.options import LARGEST_SEED, ComputingType, Json, Model, at_least, over


def generate(
    source: Model,
    prompt: Annotated[str, typer.Argument(help="Text to continue, or a message to the model.")],
    max_new_tokens: Annotated[int, typer.Option(callback=at_least(1), help="Most tokens to generate.")] = 128,
    temperature: Annotated[float, typer.Option(callback=at_least(0), help="0 for greedy decoding.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(callback=at_least(1), help="Sample from the k likeliest tokens.")] = None,
    top_p: Annotated[
        float | None,
        typer.Option(callback=over(0, 1), help="Sample from the likeliest tokens that add up to this probability."),
    ] = None,
    seed: Annotated[int, typer.Option(callback=at_least(0, LARGEST_SEED), help="Seed of sampling.")] = 0,
    chat: Annotated[bool, typer.Option(help="Use the tokenizer's chat template where it has one.")] = True,
    dtype: ComputingType = None,
    as_json: Json = False,
) -> None:
    """Generate text.

    Example: spqr generate smollm2-spqr "Why is the sky blue?" --temperature 0.7
    """
    from spqr_jax.cli.models import decode, load_model, require
    from spqr_jax.generation import stream
    from spqr_jax.prompts import chat_prompt, end_tokens, text_ids

    model, params, found = load_model(source, dtype)
    tokenizer = require(found)
    ids = chat_prompt(tokenizer, prompt) if chat else text_ids(tokenizer, prompt)
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
        stop_tokens=end_tokens(model, tokenizer),
    )
    tokens: list[int] = []
    shown = ""
    for (new,) in steps:
        tokens += new
        text = decode(tokenizer, tokens)
        # An incomplete character of several tokens decodes to the replacement character: wait for the rest.
        if not as_json and not text.endswith("\N{REPLACEMENT CHARACTER}"):
            print(text[len(shown) :], end="", file=console.results(), flush=True)
            shown = text
    if not as_json:
        print(file=console.results())
        return
    text = decode(tokenizer, tokens)
    console.emit({"text": text, "tokens": tokens, "seconds": time.perf_counter() - started}, as_json)
