"""The main job on a real model, from GGUF to generated text: `python -m spqr_jax.demo`.

SmolLM2-135M-Instruct is converted, measured, quantized to 3 bits, saved, and run from the checkpoint by fresh
processes. The package's weights were 4-bit before they came here, so that 4 bits would flatter; 3 bits are a real loss.
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

from converters import find_smollm2, from_pretrained
from spqr_jax.cli import console
from spqr_jax.cli.models import encode
from spqr_jax.config import SpqrConfig
from spqr_jax.measure.perplexity import cut_windows, window_losses
from spqr_jax.quantization.model import quantize_blocks
from spqr_jax.storage import checkpoint
from spqr_jax.storage.directories import bytes_on_disk
from spqr_jax.texts import REFERENCE_STARTS, wikitext2, windows_at

DESTINATION = Path(".cache/demo/smollm2-3bit")
WINDOWS = 10
PROMPT = "Why is the sky blue? Answer in one sentence."


def main() -> None:
    """Runs the whole job and prints one table."""
    checkpoint.check_destination(DESTINATION, overwrite=True)
    model, params, tokenizer = from_pretrained(find_smollm2(), dtype=np.float16)

    started = time.perf_counter()
    windows = cut_windows(encode(tokenizer, wikitext2("test")), max_windows=WINDOWS)
    losses = list(console.track(window_losses(model, params, windows), WINDOWS, "perplexity of the original"))
    before = {"perplexity": float(np.exp(np.mean(losses))), "seconds": time.perf_counter() - started}

    started = time.perf_counter()
    text = np.array(encode(tokenizer, wikitext2("valid")))
    calibration = windows_at(text, np.array(REFERENCE_STARTS), 512)
    quantized = dict(params)
    blocks = quantize_blocks(params, calibration, model=model, config=SpqrConfig())
    for block in console.track(blocks, model.config.num_layers, "quantizing blocks"):
        quantized[block.name] = block.params
    quantizing = time.perf_counter() - started
    checkpoint.save(DESTINATION, model, quantized, tokenizer=tokenizer, overwrite=True)

    after = fresh_process("eval", str(DESTINATION), "--windows", str(WINDOWS))
    answer = fresh_process("generate", str(DESTINATION), PROMPT, "--max-new-tokens", "48")

    original_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
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
        "stored in 4 bits before, so a 4-bit result would flatter.",
        highlight=False,
    )
    Console().print(f"\n> {PROMPT}\n{answer['text']}", highlight=False)


def fresh_process(*arguments: str) -> dict[str, Any]:
    """Runs a command of `spqr` in a process of its own and returns its JSON."""
    command = [sys.executable, "-m", "spqr_jax.cli", *arguments, "--json"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


if __name__ == "__main__":
    console.quiet()
    console.run(main)
