"""A LLaMA with random weights, of a size that says something about memory: `python tests/random_llama.py DIRECTORY`.

By default TinyLlama's shape, 1.1 B parameters in 2.2 GB, one shard per block. Its tokens are the bytes of a text.
"""

import json
import sys
from pathlib import Path

import numpy as np
from helpers.byte_tokenizer import byte_tokenizer
from helpers.tiny_models import tensor_shapes, tiny_config
from safetensors.numpy import save_file

TINYLLAMA = tiny_config(
    vocab_size=32000,
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=22,
    num_attention_heads=32,
    num_key_value_heads=4,
    max_position_embeddings=2048,
)


def write_random_llama(directory: Path, config: dict) -> None:
    """config.json, a tokenizer, and float16 weights of standard deviation 0.02, norms 1; one shard in memory."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    byte_tokenizer().save_pretrained(directory)
    rng = np.random.default_rng(0)
    shards: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in tensor_shapes(config).items():
        parts = name.split(".")
        shard = parts[2] if parts[1] == "layers" else "ends"
        shards.setdefault(f"model-{shard}.safetensors", {})[name] = shape
    for file, shapes in shards.items():
        tensors = {
            name: np.ones(shape, np.float16)
            if len(shape) == 1
            else (0.02 * rng.standard_normal(shape, np.float32)).astype(np.float16)
            for name, shape in shapes.items()
        }
        save_file(tensors, directory / file)
    weight_map = {name: file for file, shapes in shards.items() for name in shapes}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


if __name__ == "__main__":
    write_random_llama(Path(sys.argv[1]), TINYLLAMA)
