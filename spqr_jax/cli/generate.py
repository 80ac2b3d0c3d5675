"""The command `spqr generate`."""

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from pallas_kernels.errors import SpqrError
from spqr_jax.cli import console
from spqr_jax.cli.options import (
    ComputingType,
    InMemory,
    Json,
    MaxNewTokens,
    Model,
    SamplingSeed,
    Temperature,
    TopK,
    TopP,
    at_least,
)
from spqr_jax.runtime.memory import Memory
from spqr_jax.storage.paths import absolute


def generate(
    source: Model,
    prompt: Annotated[str | None, typer.Argument(help="Text to continue, or a message to the model.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            parser=absolute, help="File of prompts in place of PROMPT: .jsonl with a prompt, text or messages a row."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(parser=absolute, help="File of the answers to --prompts, a row of JSON each; it is resumed."),
    ] = None,
    batch: Annotated[
        int, typer.Option(callback=at_least(1), help="Prompts of --prompts that are answered together.")
    ] = 8,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: SamplingSeed = 0,
    chat: Annotated[bool, typer.Option(help="Use the tokenizer's chat template where it has one.")] = True,
    dtype: ComputingType = None,
    memory: InMemory = Memory.AUTO,
    as_json: Json = False,
) -> None:
    """Generate text: the answer to one prompt, or to each prompt of a file.

    Answers to a file are written batch by batch: after an interruption, the same command resumes.

    Example: spqr generate smollm2-spqr "Why is the sky blue?" --temperature 0.7
    """
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, **sampling}
    if prompts is not None or output is not None:
        from spqr_jax.cli.answers import answer_file

        result = answer_file(
            source, prompt, prompts, output, batch=batch, seed=seed, chat=chat, dtype=dtype, memory=memory, **options
        )
        console.emit(result, as_json)
        return
    if prompt is None:
        raise SpqrError("there is no prompt: give PROMPT, or --prompts and --output")
    result = _answer(source, prompt, options, seed, chat, dtype, memory, show=not as_json)
    if as_json:
        console.emit(result, as_json)


def _answer(
    source: str,
    prompt: str,
    options: dict[str, Any],
    seed: int,
    chat: bool,
    dtype: str | None,
    memory: Memory,
    *,
    show: bool,
) -> dict[str, Any]:
    """The answer to one prompt, shown as it is generated if so asked."""
    from spqr_jax.cli.models import decode, load_model, require
    from spqr_jax.cli.speed import Speed
    from spqr_jax.cli.streaming import show_tokens
    from spqr_jax.generation import for_decoding, stream
    from spqr_jax.models.unpacked import form_of
    from spqr_jax.prompts import chat_prompt, end_tokens, text_ids

    model, params, found = load_model(source, dtype)
    tokenizer = require(found)
    ids = chat_prompt(tokenizer, prompt) if chat else text_ids(tokenizer, prompt)
    started = time.perf_counter()
    speed = Speed()
    params = for_decoding(model, params, memory)
    steps = stream(model, params, [ids], seed=seed, stop_tokens=end_tokens(model, tokenizer), **options)
    tokens = show_tokens(speed.watch(steps), tokenizer, show=show)
    if show:
        print(f"weights {form_of(params)}; {speed}", file=sys.stderr)
    spent = {"seconds": time.perf_counter() - started, **speed.values(), "weights": form_of(params)}
    return {"text": decode(tokenizer, tokens), "tokens": tokens, **spent}
