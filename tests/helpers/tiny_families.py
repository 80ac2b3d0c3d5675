"""Tiny random checkpoints of every LLaMA-like family and of OPT, made and written by transformers."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "granite": "GraniteForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "opt": "OPTForCausalLM",
}

OWN: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "qwen3": {"head_dim": 32},
    "qwen3_moe": {
        "head_dim": 32,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    },
    "smollm3": {"no_rope_layers": [1, 0, 1], "tie_word_embeddings": False},
    "granite": {
        "embedding_multiplier": 2.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.6,
        "logits_scaling": 1.5,
    },
    "gemma2": {"head_dim": 16, "sliding_window": 12, "query_pre_attn_scalar": 32},
    "gemma3_text": {"head_dim": 32, "sliding_window": 12, "query_pre_attn_scalar": 32, "sliding_window_pattern": 3},
}

OPT_SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "ffn_dim": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


def family_config(family: str, **options: Any) -> dict[str, Any]:
    """Content of a config.json; an option of `...` is left out."""
    sizes = OPT_SIZES if family == "opt" else SIZES
    names = {"model_type": family, "architectures": [ARCHITECTURES[family]]}
    content = {**names, **sizes, **OWN.get(family, {}), **options}
    return {key: value for key, value in content.items() if value is not ...}


def write_family(directory: Path, config: dict[str, Any], seed: int = 0) -> Path:
    """Writes a checkpoint with a config.json as given, and weights of such a size that logits are of order 10."""
    import torch
    import transformers

    rng = np.random.default_rng(seed)
    known = {key: value for key, value in config.items() if key != "architectures"}
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**json.loads(json.dumps(known)))
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            shape = tuple(parameter.shape)
            if len(shape) == 1 and "norm" in name and name.endswith("weight"):
                centre = 0.0 if "gemma" in config["model_type"] else 1.0
                values = centre + rng.uniform(-0.5, 0.5, shape)
            elif len(shape) == 1:
                values = rng.normal(0, 0.5, shape)
            else:
                gain = 10 if "embed_tokens" in name or "lm_head" in name else 1.0
                values = rng.normal(0, gain / math.sqrt(shape[-1]), shape)
            parameter.copy_(torch.from_numpy(values.astype(np.float32)))
    model.save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


GGUF = {
    "qwen2": "QWEN2",
    "qwen3": "QWEN3",
    "qwen3_moe": "QWEN3MOE",
    "smollm3": "SMOLLM3",
    "granite": "GRANITE",
    "olmo2": "OLMO2",
    "phi3": "PHI3",
    "gemma2": "GEMMA2",
    "gemma3_text": "GEMMA3",
}
"""Architecture of each family in the package `gguf`, which knows the tensors' names."""

PAIRED = ("smollm3", "granite")
"""Families whose rotated features llama.cpp's converter puts beside each other."""


def write_family_gguf(path: Path, config: dict[str, Any], tensors: dict[str, np.ndarray], keys: dict[str, Any]) -> Path:
    """A GGUF file of a checkpoint as llama.cpp's converter writes it; keys are given without the architecture."""
    import gguf

    architecture = getattr(gguf.MODEL_ARCH, GGUF[config["model_type"]])
    prefix = gguf.MODEL_ARCH_NAMES[architecture]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim", config["hidden_size"] // heads)
    content = {
        "vocab_size": config["vocab_size"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": config["rope_theta"],
        **keys,
    }
    writer = gguf.GGUFWriter(path, prefix)
    add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in content.items():
        add[type(value)](f"{prefix}.{key}", value)
    names = gguf.get_tensor_name_map(architecture, config["num_hidden_layers"])
    for name, tensor in _with_stacks(tensors).items():
        if config["model_type"] in PAIRED and ("q_proj" in name or "k_proj" in name):
            count = heads if "q_proj" in name else kv_heads
            halves = tensor.reshape(count, 2, head_dim // 2, *tensor.shape[1:])
            tensor = halves.swapaxes(1, 2).reshape(tensor.shape)
        if "gemma" in config["model_type"] and name.endswith("norm.weight"):
            tensor = tensor + 1
        renamed = names.get_name(name, try_suffixes=(".weight", ".bias")) or name
        writer.add_tensor(renamed, np.ascontiguousarray(tensor, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _with_stacks(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors, with those of all experts of a block in one, as llama.cpp's converter joins them."""
    kept, stacks = {}, {}
    for name, tensor in tensors.items():
        before, experts, after = name.partition(".experts.")
        if experts:
            index, kind = after.split(".", 1)
            stacks.setdefault(f"{before}.experts.{kind}", {})[int(index)] = tensor
        else:
            kept[name] = tensor
    return {**kept, **{name: np.stack([of[index] for index in sorted(of)]) for name, of in stacks.items()}}
