"""The command `spqr chat`."""

import sys
import time
from collections.abc import Iterator
from typing import Any

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
)
from spqr_jax.runtime.memory import Memory

RESET = "/reset"


def chat(
    source: Model,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.0,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: SamplingSeed = 0,
    dtype: ComputingType = None,
    memory: InMemory = Memory.AUTO,
    as_json: Json = False,
) -> None:
    """Talk with a model: each line is a message, and the model's answer follows it.

    /reset starts a new conversation, and the end of input (Ctrl-D) ends the command.

    Example: spqr chat smollm2-spqr --temperature 0.7
    """
    from pallas_kernels.errors import SpqrError
    from spqr_jax.cli.conversations import Message, answer_prompt
    from spqr_jax.cli.models import decode, load_model, require
    from spqr_jax.cli.streaming import show_tokens
    from spqr_jax.generation import for_decoding, stream

    model, params, found = load_model(source, dtype)
    tokenizer = require(found)
    if not tokenizer.chat_template:
        raise SpqrError("the tokenizer has no chat template: use spqr generate, which continues a text")
    sampling: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "tokenizer": tokenizer}
    positions = model.config.max_positions
    params = for_decoding(model, params, memory)
    messages: list[Message] = []
    for turn, line in enumerate(_lines()):
        if line == RESET:
            messages = []
            _note("new conversation")
            continue
        asked = [*messages, {"role": "user", "content": line}]
        ids = answer_prompt(asked, tokenizer, "the conversation")
        if (room := positions - len(ids)) < 1:
            _note(
                f"the conversation has {len(ids)} tokens with this message, but the model takes {positions}: it "
                f"is left out, and {RESET} starts a new conversation"
            )
            continue
        started = time.perf_counter()
        steps = stream(model, params, [ids], max_new_tokens=min(max_new_tokens, room), seed=seed + turn, **sampling)
        tokens = show_tokens(steps, tokenizer, show=not as_json)
        text = decode(tokenizer, tokens)
        messages = [*asked, {"role": "assistant", "content": text}]
        if as_json:
            console.emit({"text": text, "tokens": tokens, "seconds": time.perf_counter() - started}, as_json)
            console.results().flush()


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _lines() -> Iterator[str]:
    """The lines of standard input that are not empty; a terminal shows where to write."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if line:
            yield line
