"""Decoding and evaluation of a checkpoint on this CPU, beside PyTorch in the same run.

PyTorch runs transformers' model of the same sizes with random weights and its KV cache: its time does not depend on the
values. All timings alternate, so that other work on the machine meets all of them. Without AMX:

    XLA_FLAGS=--xla_cpu_max_isa=AVX512 ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 python -m spqr_jax.benchmark --cpu CHECKPOINT
"""

import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from inspect import signature
from statistics import median
from typing import Any

import jax
import numpy as np

from spqr_jax import generation
from spqr_jax.generation import Policy
from spqr_jax.measure.perplexity import token_losses
from spqr_jax.models.decoder import Decoder, Params
from spqr_jax.models.unpacked import for_measuring, form_of

ROUNDS = 5
NEW_TOKENS = 16
PROMPT_TOKENS = 32
BATCH = 8
WINDOWS = 16
REST = 0.2
"""Seconds between two timings: PyTorch's threads spin after a product, and would take a core from the next timing."""

LIMITS = {
    "times_as_fast_as_pytorch": (1.7, float("inf")),
    "step_of_8_by_step_of_1": (0.0, 3.0),
    "first_token_seconds": (0.0, 15.0),
    "first_token_seconds_warm": (0.0, 8.0),
    "evaluation_packed_by_dense": (0.0, 1.1),
}
"""Lowest and highest value of each result that the project aims at."""


def measure(source: str) -> dict[str, Any]:
    """Measures a packed checkpoint, and returns times in milliseconds and the ratios of `LIMITS`.

    Args:
      source: a checkpoint, as the commands take it.
    """
    # Only this benchmark reads checkpoints of other projects.
    from spqr_jax.cli.models import load_model

    cold, warm = first_token_seconds(source)
    model, params, _ = load_model(source)
    form = generation.for_decoding(model, params)
    steps = {
        "one sequence": decoder(model, form, 1),
        f"{BATCH} sequences": decoder(model, form, BATCH),
        **{f"PyTorch {dtype}": pytorch(model, dtype) for dtype in ("float32", "bfloat16")},
    }
    times = {name: 1e3 * seconds / NEW_TOKENS for name, seconds in alternating(steps).items()}
    theirs = min(times["PyTorch float32"], times["PyTorch bfloat16"])
    evaluating = alternating(evaluations(model, params), rounds=3)
    ratios = {
        "times_as_fast_as_pytorch": theirs / times["one sequence"],
        "step_of_8_by_step_of_1": times[f"{BATCH} sequences"] / times["one sequence"],
        "first_token_seconds": cold,
        "first_token_seconds_warm": warm,
        "evaluation_packed_by_dense": evaluating["packed"] / evaluating["dense"],
    }
    return {
        "weights": form_of(form),
        "threads": os.cpu_count(),
        "milliseconds_per_token": times,
        "evaluation_seconds": evaluating,
        **ratios,
        "missed": [name for name, (least, most) in LIMITS.items() if not least <= ratios[name] <= most],
    }


def alternating(functions: Mapping[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, float]:
    """Median seconds of each function, all of them timed once per round; a first round is not counted.

    Example:
      >>> sorted(alternating({"a": lambda: 1, "b": lambda: 2}, rounds=1))
      ['a', 'b']
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            time.sleep(REST)
            started = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - started)
    return {name: median(times[1:]) for name, times in seconds.items()}


def decoder(model: Decoder, params: Params, batch: int) -> Callable[[], object]:
    """A function that adds NEW_TOKENS tokens to prompts, in one program."""
    prompts = np.random.default_rng(0).integers(0, model.config.vocab_size, (batch, PROMPT_TOKENS)).tolist()
    capacity = (ROUNDS + 1) * NEW_TOKENS + 1
    state, tokens, mask = generation.start(model, params, prompts, capacity)
    state = generation.extend(model, Policy(), params, state, tokens, mask)

    def decode() -> None:
        nonlocal state
        limit = int(state.step) + NEW_TOKENS
        state = jax.block_until_ready(generation.decode(model, Policy(), params, state, limit))

    return decode


def pytorch(model: Decoder, dtype: str) -> Callable[[], object]:
    """A function that adds NEW_TOKENS tokens to a prompt with transformers' model, on all cores."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

    from converters.families.table import family_of

    torch.set_num_threads(os.cpu_count() or 1)
    content: dict[str, Any] = dict(family_of(model).to_huggingface(model.config))
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**content)).to(getattr(torch, dtype)).eval()
    # transformers 5.24 has renamed the argument.
    name = "cache" if "cache" in signature(theirs.forward).parameters else "past_key_values"
    cache = {name: DynamicCache(), "use_cache": True}
    with torch.inference_mode():
        done = theirs(torch.zeros((1, PROMPT_TOKENS), dtype=torch.long), **cache)

    def decode() -> None:
        nonlocal done
        with torch.inference_mode():
            for _ in range(NEW_TOKENS):
                done = theirs(done.logits[:, -1:].argmax(-1), **cache)

    return decode


def evaluations(model: Decoder, params: Params) -> dict[str, Callable[[], object]]:
    """Functions that measure windows of 1024 tokens with packed parameters, and with dense ones."""
    windows = np.random.default_rng(0).integers(0, model.config.vocab_size, (WINDOWS, 1024)).astype(np.int32)
    dense = for_measuring(params, "unpacked")
    forms = {"packed": params, "dense": dense}
    return {name: functools.partial(_losses, model, form, windows) for name, form in forms.items()}


def _losses(model: Decoder, params: Params, windows: np.ndarray) -> list[np.ndarray]:
    return list(token_losses(model, params, windows))


def first_token_seconds(source: str) -> tuple[float, float]:
    """Seconds from the start of `spqr generate` to its first token, without compiled programs and with them."""
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"SPQR_JAX_CACHE_DIR": cache}
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        command = [sys.executable, "-m", "spqr_jax.cli", "generate", source, "Hello", "--max-new-tokens", "1", "--json"]
        seconds = []
        for _ in range(2):
            started = time.perf_counter()
            done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
            seconds.append(time.perf_counter() - started)
            assert json.loads(done.stdout)["tokens"] is not None
    return seconds[0], seconds[1]
