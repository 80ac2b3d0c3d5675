"""The command `spqr generate`."""

import time
from typing import Annotated

import typer

from spqr_jax.cli import console
from spqr_jax.cli.app import Json, Model, app
from spqr_jax.cli.models import encode, load_model, require


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

    Example: spqr generate smollm2-spqr "Why is the sky blue?" --temperature 0.7
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
