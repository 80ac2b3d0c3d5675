"""A demonstration on a real model, from GGUF to generated text: `python -m spqr_jax.demo`.

SmolLM2-135M-Instruct is converted, measured, quantized to 3 bits, saved, and run from its checkpoint in new processes.
The package's weights were stored in 4 bits before, so a 4-bit result would look better than it is.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerFast

from converters import find_smollm2, from_pretrained
from spqr_jax.cli import console
from spqr_jax.cli.models import encode
from spqr_jax.config import SpqrConfig
from spqr_jax.measure.perplexity import cut_windows, window_losses
from spqr_jax.models.decoder import Decoder, Params
from spqr_jax.models.precision import for_computing
from spqr_jax.quantization.model import quantize_blocks
from spqr_jax.storage import checkpoint
from spqr_jax.storage.directories import bytes_on_disk
from spqr_jax.texts import REFERENCE_STARTS, wikitext2, windows_at

DESTINATION = Path(".cache/demo/smollm2-3bit")
WINDOWS = 10
PROMPT = "Why is the sky blue? Answer in one sentence."


def main() -> None:
    """Runs all steps and prints one table."""
    checkpoint.check_destination(DESTINATION, overwrite=True)
    model, params, tokenizer = from_pretrained(find_smollm2(), dtype=np.float16)
    before = measure(model, params, tokenizer)
    quantizing = quantize_and_save(model, params, tokenizer)
    after = fresh_process("eval", str(DESTINATION), "--windows", str(WINDOWS))
    answer = fresh_process("generate", str(DESTINATION), PROMPT, "--max-new-tokens", "48")
    print_results(sum(leaf.nbytes for leaf in jax.tree.leaves(params)), before, after, quantizing)
    Console().print(f"\n> {PROMPT}\n{answer['text']}", highlight=False)


def measure(model: Decoder, params: Params, tokenizer: PreTrainedTokenizerFast | None) -> dict[str, float]:
    """Perplexity of the original, and the seconds to measure it."""
    started = time.perf_counter()
    windows = cut_windows(encode(tokenizer, wikitext2("test")), max_windows=WINDOWS)
    losses = list(
        console.track(window_losses(for_computing(model), params, windows), WINDOWS, "perplexity of the original")
    )
    return {"perplexity": float(np.exp(np.mean(losses))), "seconds": time.perf_counter() - started}


def quantize_and_save(model: Decoder, params: Params, tokenizer: PreTrainedTokenizerFast | None) -> float:
    """Quantizes the model, saves it to `DESTINATION`, and returns the seconds to quantize."""
    started = time.perf_counter()
    text = np.array(encode(tokenizer, wikitext2("valid")))
    calibration = windows_at(text, np.array(REFERENCE_STARTS), 512)
    quantized = dict(params)
    blocks = quantize_blocks(params, calibration, model=model, config=SpqrConfig())
    for block in console.track(blocks, model.config.num_layers, "quantizing blocks"):
        quantized[block.name] = block.params
    seconds = time.perf_counter() - started
    checkpoint.save(DESTINATION, model, quantized, tokenizer=tokenizer, overwrite=True)
    return seconds


def print_results(original_bytes: int, before: dict[str, float], after: dict[str, Any], quantizing: float) -> None:
    """Prints the table of the original and the quantized model."""
    table = Table("", "original (float16)", "SpQR, 3 bits", title="SmolLM2-135M-Instruct")
    table.add_row("perplexity", f"{before['perplexity']:.2f}", f"{after['perplexity']:.2f}")
    table.add_row("bits per weight", "16", f"{after['bits_per_weight']:.2f}")
    table.add_row("outliers", "", f"{after['outlier_share']:.2%}")
    table.add_row("bytes on disk", f"{original_bytes:,}", f"{bytes_on_disk(DESTINATION):,}")
    table.add_row("seconds to quantize", "", f"{quantizing:.0f}")
    table.add_row("seconds to measure", f"{before['seconds']:.0f}", f"{after['seconds']:.0f}")
    Console().print(table)
    Console().print(
        f"Perplexity is over the first {WINDOWS} windows of 1024 tokens of WikiText-2's test text. Bits per weight are "
        "those of the decoder blocks' matrices; the embedding stays in 16 bits.\nWhy 3 bits: these weights were "
        "stored in 4 bits before, so a 4-bit result would look better than it is.",
        highlight=False,
    )


def fresh_process(*arguments: str) -> dict[str, Any]:
    """Runs a command of `spqr` in a new process and returns its JSON."""
    command = [sys.executable, "-m", "spqr_jax.cli", *arguments, "--json"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


if __name__ == "__main__":
    console.quiet()
    console.run(main)
