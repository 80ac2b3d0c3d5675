"""Converted Falcons give the logits of transformers' PyTorch: in float32, to 1e-4, at logits of order 10."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from helpers.tiny_falcon import STYLES, falcon_config, falcon_tensors, write_falcon_gguf
from helpers.tiny_models import to_bfloat16, write_checkpoint

from converters import Pretrained, from_pretrained
from spqr_jax.models.falcon import alibi_bias

torch = pytest.importorskip("torch")

# Three sequences of 40 tokens, padded on the left to different lengths.
TOKENS = np.random.default_rng(1).integers(0, 96, (3, 40))
MASK = np.arange(40) >= np.array([[0], [7], [31]])

NEW, RW = {"new_decoder_architecture": True}, STYLES["RW"]
LINEAR = {"rope_type": "linear", "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

OPTIONS = {
    **STYLES,
    "untied": {"tie_word_embeddings": False},
    "bias": {"bias": True},
    "ffn_hidden_size": {"ffn_hidden_size": 96},
    "epsilon": {"layer_norm_epsilon": 0.1},
    "ignored: num_kv_heads": {"num_kv_heads": 4},
    "a key for each query, in parallel": {"multi_query": False},
    "one key, not in parallel": {"parallel_attn": False},
    "not in parallel, num_ln 2": {"parallel_attn": False, "num_ln_in_parallel_attn": 2},
    "new, one key": {**NEW, "num_kv_heads": 1},
    "new, a key for each query": NEW,
    "new, bias": {**NEW, "num_kv_heads": 2, "bias": True, "multi_query": False},
    "new, alibi": {**NEW, "num_kv_heads": 2, "alibi": True},
    "alibi, one key": {"alibi": True},
    "alibi, slopes of six heads": {**RW, "num_attention_heads": 6, "hidden_size": 96},
    "4: theta": {"rope_theta": 500.0},
    "4: linear": {"rope_theta": 500.0, "rope_scaling": LINEAR},
    "4: llama3": {"rope_theta": 500.0, "rope_scaling": LLAMA3},
    "5: theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "5: linear": {"rope_parameters": {"rope_theta": 500.0, **LINEAR}},
}


def torch_logits(directory: Path, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    # Not eager: there, transformers adds the bias of ALiBi twice, once with the mask and once more.
    model = transformers.FalconForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="sdpa")
    mask = torch.from_numpy(mask.astype(np.int64))
    with torch.no_grad():
        outputs = model(torch.from_numpy(tokens), attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
    return outputs.logits.numpy()


def assert_same_logits(
    pretrained: Pretrained, directory: Path, tokens: np.ndarray = TOKENS, mask: np.ndarray = MASK
) -> None:
    expected = torch_logits(directory, tokens, mask)
    assert 5 < expected[mask].std() < 25
    # Not jitted: the small operations are compiled once for all tests.
    logits = pretrained.model.apply({"params": pretrained.params}, jnp.asarray(tokens), mask=jnp.asarray(mask))
    np.testing.assert_allclose(np.asarray(logits)[mask], expected[mask], rtol=0, atol=1e-4)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_huggingface_option(tmp_path: Path, options: dict) -> None:
    config = falcon_config(**options)
    write_checkpoint(tmp_path, config, falcon_tensors(config))
    assert_same_logits(from_pretrained(tmp_path), tmp_path)


def test_alibi_beyond_where_bfloat16_is_exact(tmp_path: Path) -> None:
    config = falcon_config(**RW)
    write_checkpoint(tmp_path, config, falcon_tensors(config))
    tokens = np.random.default_rng(2).integers(0, 96, (2, 500))
    mask = np.arange(500) >= np.array([[0], [30]])
    assert_same_logits(from_pretrained(tmp_path), tmp_path, tokens, mask)


@pytest.mark.parametrize("heads", [1, 2, 3, 5, 8, 12, 31, 32, 71, 128, 232])
def test_alibi_bias(heads: int) -> None:
    from transformers.models.falcon.modeling_falcon import build_alibi_tensor

    positions = jnp.arange(4096)[None]
    expected = build_alibi_tensor(torch.ones(1, 4096, dtype=torch.long), heads, torch.float32)[:, 0].numpy()
    for bias in (alibi_bias(positions, heads), jax.jit(alibi_bias, static_argnums=1)(positions, heads)):
        np.testing.assert_array_equal(bias[0], expected)


def test_bfloat16_in_shards(tmp_path: Path) -> None:
    config = falcon_config(**STYLES["40B"])
    write_checkpoint(tmp_path, config, to_bfloat16(falcon_tensors(config)), shards=3)
    assert_same_logits(from_pretrained(tmp_path), tmp_path)


@pytest.mark.parametrize("rotary", ["h.1.self_attention.maybe_rotary", "h.1.self_attention.rotary_emb", "rotary_emb"])
def test_tied_head_and_frequencies_may_be_stored(tmp_path: Path, rotary: str) -> None:
    config = falcon_config()
    tensors = falcon_tensors(config)
    tensors["lm_head.weight"] = tensors["transformer.word_embeddings.weight"].copy()
    tensors[f"transformer.{rotary}.inv_freq"] = np.ones(8, np.float32)
    write_checkpoint(tmp_path, config, tensors)
    assert_same_logits(from_pretrained(tmp_path), tmp_path)


@pytest.mark.parametrize("style", STYLES)
def test_bfloat16_parameters(tmp_path: Path, style: str) -> None:
    config = falcon_config(**STYLES[style])
    write_checkpoint(tmp_path, config, falcon_tensors(config))
    model, params, _ = from_pretrained(tmp_path, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    assert model.apply({"params": params}, TOKENS[:, :2]).dtype == jnp.bfloat16


# Names and defaults of the configurations that came with the first releases.
OLD = {
    "7B": (STYLES["7B"], {"model_type": "RefinedWebModel", "multi_query": True, "parallel_attn": True}),
    "40B": (STYLES["40B"], {"model_type": "RefinedWeb", "n_head_kv": 2, "parallel_attn": True}),
    "40B, no parallel_attn": (STYLES["40B"], {"model_type": "RefinedWeb", "n_head_kv": 2}),
    "RW": (RW, {"model_type": "RefinedWebModel", "alibi": True, "bias": True}),
    "RW, n_head_kv null": (RW, {"model_type": "RefinedWeb", "alibi": True, "bias": True, "n_head_kv": None}),
    "one key": ({"parallel_attn": False}, {"model_type": "RefinedWeb", "multi_query": True}),
}


@pytest.mark.parametrize(("options", "old"), OLD.values(), ids=OLD.keys())
@pytest.mark.parametrize("hidden", ["hidden_size", "n_embed"])
def test_old_names_and_defaults(tmp_path: Path, options: dict, old: dict, hidden: str) -> None:
    config = falcon_config(**options)
    tensors = falcon_tensors(config)
    write_checkpoint(tmp_path / "new", config, tensors)
    old = {"architectures": ["RWForCausalLM"], "vocab_size": 96, hidden: 64, "n_head": 4, "n_layer": 2, **old}
    write_checkpoint(tmp_path / "old", old, tensors)
    assert_same_logits(from_pretrained(tmp_path / "old"), tmp_path / "new")


GGUF_OPTIONS = {
    "7B": ({}, {}),
    "7B, untied": ({"tie_word_embeddings": False}, {}),
    "40B": (STYLES["40B"], {}),
    "11B": (STYLES["11B"], {"falcon.rope.freq_base": 500042.0}),
    "linear": (
        {"rope_theta": 500.0, "rope_scaling": LINEAR},
        {"falcon.rope.freq_base": 500.0, "falcon.rope.scaling.type": "linear", "falcon.rope.scaling.factor": 4.0},
    ),
    "layout not named": (STYLES["40B"], {"falcon.tensor_data_layout": None}),
}


@pytest.mark.parametrize(("options", "metadata"), GGUF_OPTIONS.values(), ids=GGUF_OPTIONS.keys())
def test_gguf_option(tmp_path: Path, options: dict, metadata: dict) -> None:
    config = falcon_config(**options)
    tensors = falcon_tensors(config)
    write_checkpoint(tmp_path, config, tensors)
    write_falcon_gguf(tmp_path / "model.gguf", config, tensors, metadata=metadata)
    assert_same_logits(from_pretrained(tmp_path / "model.gguf"), tmp_path)
