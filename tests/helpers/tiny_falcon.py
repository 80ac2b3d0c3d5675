"""Tiny random Falcon checkpoints, written as Hugging Face and as llama.cpp write them."""

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from helpers.tiny_models import Tensors

# What the released models set.
STYLES: dict[str, dict[str, Any]] = {
    "7B": {},
    "40B": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "11B": {
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
        "num_ln_in_parallel_attn": 1,
        "tie_word_embeddings": False,
        "rope_theta": 500042.0,
    },
    "RW": {"alibi": True, "bias": True, "multi_query": False, "parallel_attn": False},
}


def falcon_config(**options: Any) -> dict[str, Any]:
    """Content of a config.json; an option of None is left out."""
    content = {
        "architectures": ["FalconForCausalLM"],
        "model_type": "falcon",
        "vocab_size": 96,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "layer_norm_epsilon": 1e-5,
        "multi_query": True,
        "parallel_attn": True,
        "new_decoder_architecture": False,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        **options,
    }
    return {key: value for key, value in content.items() if value is not None}


def falcon_tensors(config: dict[str, Any], seed: int = 0) -> Tensors:
    """Weights under Hugging Face's names, of such a size that logits are of order 10."""
    rng = np.random.default_rng(seed)
    hidden, heads, vocabulary = config["hidden_size"], config["num_attention_heads"], config["vocab_size"]
    mlp = config.get("ffn_hidden_size", 4 * hidden)
    new = config["new_decoder_architecture"]
    kv_heads = config.get("num_kv_heads", heads) if new or not config["multi_query"] else 1
    norms, matrices = ["transformer.ln_f"], {}
    for index in range(config["num_hidden_layers"]):
        block = f"transformer.h.{index}"
        matrices[f"{block}.self_attention.query_key_value"] = (heads + 2 * kv_heads) * (hidden // heads), hidden
        matrices[f"{block}.self_attention.dense"] = hidden, hidden
        matrices[f"{block}.mlp.dense_h_to_4h"] = mlp, hidden
        matrices[f"{block}.mlp.dense_4h_to_h"] = hidden, mlp
        names = ["input_layernorm"] if config["parallel_attn"] else ["input_layernorm", "post_attention_layernorm"]
        if new and config.get("num_ln_in_parallel_attn", 2) == 2:
            names = ["ln_attn", "ln_mlp"]
        norms += [f"{block}.{name}" for name in names]
    tensors = {"transformer.word_embeddings.weight": rng.normal(0, 10 / math.sqrt(hidden), (vocabulary, hidden))}
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = rng.normal(0, 10 / math.sqrt(hidden), (vocabulary, hidden))
    for name in norms:
        tensors[f"{name}.weight"] = rng.uniform(0.5, 1.5, hidden)
        tensors[f"{name}.bias"] = rng.normal(0, 0.3, hidden)
    for name, shape in matrices.items():
        tensors[f"{name}.weight"] = rng.normal(0, 1.5 / math.sqrt(shape[1]), shape)
        if config.get("bias"):
            tensors[f"{name}.bias"] = rng.normal(0, 0.5, shape[0])
    return {name: tensor.astype(np.float32) for name, tensor in tensors.items()}


def write_falcon_gguf(
    path: Path, config: dict[str, Any], tensors: Tensors, *, metadata: dict[str, Any] | None = None
) -> Path:
    """A GGUF file as llama.cpp's converter writes it; `metadata` adds keys, or leaves them out where it says None."""
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    kv_heads = config.get("num_kv_heads", 1)
    content = {
        "falcon.context_length": config["max_position_embeddings"],
        "falcon.tensor_data_layout": "jploski",
        "falcon.embedding_length": hidden,
        "falcon.feed_forward_length": 4 * hidden,
        "falcon.block_count": config["num_hidden_layers"],
        "falcon.attention.head_count": heads,
        "falcon.attention.head_count_kv": kv_heads,
        "falcon.attention.layer_norm_epsilon": config["layer_norm_epsilon"],
        "falcon.vocab_size": config["vocab_size"],
        **(metadata or {}),
    }
    writer = gguf.GGUFWriter(path, "falcon")
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in content.items():
        if value is not None:
            add[type(value)](key, value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.FALCON, config["num_hidden_layers"])
    for name, tensor in tensors.items():
        if name.endswith("query_key_value.weight"):
            # Head by head: which part each belongs to, and then all heads of one part after those of another.
            parts = [part for _ in range(kv_heads) for part in [0] * (heads // kv_heads) + [1, 2]]
            pieces = np.split(tensor, len(parts))
            tensor = np.concatenate([pieces[index] for index in np.argsort(parts, kind="stable")])
        renamed = names.get_name(name, try_suffixes=(".weight", ".bias")) or name
        writer.add_tensor(renamed, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
