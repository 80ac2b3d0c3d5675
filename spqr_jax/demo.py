"""A demonstration on a real model, from GGUF to generated text: `python -m spqr_jax.demo [smollm2|gemma3]`.

The model is converted, measured, quantized to 3 bits, saved, and run from its checkpoint in new processes.
SmolLM2's weights were stored in 4 bits before, so a 4-bit result would look better than it is; Gemma's have 4 to 8.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerFast

from converters import find_gemma3, find_smollm2, from_pretrained
from pallas_kernels.errors import SpqrError
from spqr_jax.cli import console
from spqr_jax.cli.models import encode
from spqr_jax.config import SpqrConfig
from spqr_jax.measure.perplexity import cut_windows, window_losses
from spqr_jax.models.decoder import Decoder, Params
from spqr_jax.models.precision import for_computing
from spqr_jax.quantization.model import quantize_blocks
from spqr_jax.storage import checkpoint
from spqr_jax.storage.directories import bytes_on_disk
from spqr_jax.storage.totals import summarize
from spqr_jax.texts import REFERENCE_STARTS, begun_with, tokens_of_text, wikitext2, windows_at

WINDOWS = 10


class Subject(NamedTuple):
    """A model to be shown.

    Attributes:
      title: its name.
      find: finds its file.
      dtype: type of its weights and activations.
      prompt: what it shall continue.
    """

    title: str
    find: Callable[[], Path]
    dtype: DTypeLike
    prompt: str


SUBJECTS = {
    "smollm2": Subject(
        "SmolLM2-135M-Instruct", find_smollm2, np.float16, "Why is the sky blue? Answer in one sentence."
    ),
    # Its activations exceed float16.
    "gemma3": Subject("Gemma 3 270M", find_gemma3, jnp.bfloat16, "The sky is blue because"),
}


def main(name: str = "smollm2") -> None:
    """Runs all steps for one of `SUBJECTS` and prints one table."""
    if name not in SUBJECTS:
        raise SpqrError(f"{name} is none of the models {', '.join(SUBJECTS)}")
    subject, destination = SUBJECTS[name], Path(f".cache/demo/{name}-3bit")
    checkpoint.check_destination(destination, overwrite=True)
    model, params, tokenizer = from_pretrained(subject.find(), dtype=subject.dtype)
    before = measure(model, params, tokenizer)
    quantizing = quantize_and_save(model, params, tokenizer, destination)
    after = fresh_process("eval", str(destination), "--windows", str(WINDOWS))
    answer = fresh_process("generate", str(destination), subject.prompt, "--max-new-tokens", "48")
    sizes = summarize(params).nbytes, bytes_on_disk(destination)
    print_results(subject, sizes, before, after, quantizing)
    Console().print(f"\n> {subject.prompt}\n{answer['text']}", highlight=False)


def measure(model: Decoder, params: Params, tokenizer: PreTrainedTokenizerFast | None) -> dict[str, float]:
    """Perplexity of the original, and the seconds to measure it."""
    started = time.perf_counter()
    windows = cut_windows(encode(tokenizer, wikitext2("test")), max_windows=WINDOWS, first=model.first_token)
    losses = list(
        console.track(window_losses(for_computing(model), params, windows), WINDOWS, "perplexity of the original")
    )
    return {"perplexity": float(np.exp(np.mean(losses))), "seconds": time.perf_counter() - started}


def quantize_and_save(
    model: Decoder, params: Params, tokenizer: PreTrainedTokenizerFast | None, destination: Path
) -> float:
    """Quantizes and saves the model, and returns the seconds to quantize."""
    started = time.perf_counter()
    text = np.array(encode(tokenizer, wikitext2("valid")))
    length = tokens_of_text(512, model.first_token)
    # The places are those of the tables in RESULTS.md; other tokenizers make fewer tokens of the text.
    starts = np.array(REFERENCE_STARTS) % (len(text) - length)
    calibration = begun_with(model.first_token, windows_at(text, starts, length))
    quantized = dict(params)
    blocks = quantize_blocks(params, calibration, model=model, config=SpqrConfig())
    for block in console.track(blocks, model.config.num_layers, "quantizing blocks"):
        quantized[block.name] = block.params
    seconds = time.perf_counter() - started
    checkpoint.save(destination, model, quantized, tokenizer=tokenizer, overwrite=True)
    return seconds


def print_results(
    subject: Subject, sizes: tuple[int, int], before: dict[str, float], after: dict[str, Any], quantizing: float
) -> None:
    """Prints the table of the original and the quantized model."""
    table = Table("", f"original ({jnp.dtype(subject.dtype).name})", "SpQR, 3 bits", title=subject.title)
    table.add_row("perplexity", f"{before['perplexity']:.2f}", f"{after['perplexity']:.2f}")
    table.add_row("bits per weight", "16", f"{after['bits_per_weight']:.2f}")
    table.add_row("bits per parameter, with the embedding", "16", f"{after['bits_per_parameter']:.2f}")
    table.add_row("outliers", "", f"{after['outlier_share']:.2%}")
    table.add_row("bytes on disk", *(f"{size:,}" for size in sizes))
    table.add_row("seconds to quantize", "", f"{quantizing:.0f}")
    table.add_row("seconds to measure", f"{before['seconds']:.0f}", f"{after['seconds']:.0f}")
    Console().print(table)
    Console().print(
        f"Perplexity is over the first {WINDOWS} windows of 1024 tokens of WikiText-2's test text. Bits per weight are "
        "those of the decoder blocks' matrices; the embedding stays in 16 bits.\nWhy 3 bits: most of these weights "
        "were stored in 4 to 5 bits before, so a 4-bit result would look better than it is.",
        highlight=False,
    )


def fresh_process(*arguments: str) -> dict[str, Any]:
    """Runs a command of `spqr` in a new process and returns its JSON."""
    command = [sys.executable, "-m", "spqr_jax.cli", *arguments, "--json"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


if __name__ == "__main__":
    console.quiet()
    console.run(lambda: main(*sys.argv[1:2]))
