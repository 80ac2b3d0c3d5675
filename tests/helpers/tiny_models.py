"""Tiny random LLaMA checkpoints, written as Hugging Face and as llama.cpp write them."""

import json
import math
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

Tensors = dict[str, np.ndarray]


def tiny_config(**options: Any) -> dict[str, Any]:
    """Content of a config.json; an option of None is left out."""
    content = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        **options,
    }
    return {key: value for key, value in content.items() if value is not None}


def mistral_config(**options: Any) -> dict[str, Any]:
    """Content of a Mistral's config.json, without sliding window."""
    names = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    return {**tiny_config(**{**names, **options}), "sliding_window": None}


def tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of all weights under Hugging Face's names."""
    hidden, mlp, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim", hidden // heads)
    queries, keys = heads * head_dim, config.get("num_key_value_heads", heads) * head_dim
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (vocabulary, hidden)
    for index in range(config["num_hidden_layers"]):
        block = f"model.layers.{index}"
        shapes[f"{block}.input_layernorm.weight"] = shapes[f"{block}.post_attention_layernorm.weight"] = (hidden,)
        attention = {"q_proj": (queries, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden)}
        attention["o_proj"] = (hidden, queries)
        feed_forward = {"gate_proj": (mlp, hidden), "up_proj": (mlp, hidden), "down_proj": (hidden, mlp)}
        for part, matrices, option in (("self_attn", attention, "attention_bias"), ("mlp", feed_forward, "mlp_bias")):
            for name, shape in matrices.items():
                shapes[f"{block}.{part}.{name}.weight"] = shape
                if config.get(option):
                    shapes[f"{block}.{part}.{name}.bias"] = shape[:1]
    return shapes


def random_tensors(config: dict[str, Any], seed: int = 0) -> Tensors:
    """Weights under Hugging Face's names, of such a size that logits are of order 10."""
    rng = np.random.default_rng(seed)

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if len(shape) == 1:
            return rng.uniform(0.5, 1.5, shape) if "norm" in name else rng.normal(0, 0.5, shape)
        gain = 10 if name in ("model.embed_tokens.weight", "lm_head.weight") else 1.5
        return rng.normal(0, gain / math.sqrt(shape[1]), shape)

    return {name: draw(name, shape).astype(np.float32) for name, shape in tensor_shapes(config).items()}


def write_checkpoint(directory: Path, config: dict[str, Any], tensors: Tensors, shards: int = 1) -> Path:
    """config.json and model.safetensors, or an index and its shards."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return directory
    weight_map = {}
    for index in range(shards):
        file = f"model-{index + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[index::shards]}
        save_file(part, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def write_gguf(
    path: Path,
    config: dict[str, Any],
    tensors: Tensors,
    *,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    metadata: dict[str, Any] | None = None,
    tensors_per_part: int = 0,
) -> Path:
    """A GGUF file with matrices of type `kind`; `metadata` adds keys, or leaves them out where it says None.

    With `tensors_per_part` it is split, into `<name>-00001-of-0000N.gguf` and so on.
    """
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    kv_heads = config.get("num_key_value_heads", heads)
    head_dim = config.get("head_dim", hidden // heads)
    content = {
        "llama.vocab_size": config["vocab_size"],
        "llama.context_length": config["max_position_embeddings"],
        "llama.embedding_length": hidden,
        "llama.block_count": config["num_hidden_layers"],
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.attention.head_count": heads,
        "llama.attention.head_count_kv": kv_heads,
        "llama.attention.key_length": head_dim,
        "llama.attention.value_length": head_dim,
        "llama.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "llama.rope.dimension_count": head_dim,
        "llama.rope.freq_base": config["rope_theta"],
        **(metadata or {}),
    }
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=tensors_per_part)
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in content.items():
        if value is not None:
            add.get(type(value), writer.add_array)(key, value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, tensor in tensors.items():
        for projection, count in (("q_proj", heads), ("k_proj", kv_heads)):
            if projection in name:
                # Pairs of features that turn together become neighbours, as in llama.cpp's converter.
                halves = tensor.reshape(count, 2, head_dim // 2, *tensor.shape[1:])
                tensor = halves.swapaxes(1, 2).reshape(tensor.shape)
        stored = kind if tensor.ndim == 2 else gguf.GGMLQuantizationType.F32
        renamed = names.get_name(name, try_suffixes=(".weight", ".bias")) or name
        writer.add_tensor(renamed, gguf.quantize(np.ascontiguousarray(tensor), stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def to_bfloat16(tensors: Tensors) -> Tensors:
    return {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors.items()}
