"""Every family gives the logits of transformers' PyTorch in float32 to 1e-4, with left padding, cached and exported."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.packed_models import LOGITS
from helpers.tiny_families import ARCHITECTURES, family_config, write_family, write_family_gguf
from helpers.torch_logits import torch_logits_of
from safetensors.numpy import load_file, save_file

from converters import ConversionError, Pretrained, export_hf_spqr, export_huggingface, from_pretrained
from spqr_jax import SpqrConfig, load, quantize, save
from spqr_jax.models.stacked_blocks import stack_blocks

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# Three sequences of 40 tokens, padded on the left to different lengths.
TOKENS = np.random.default_rng(1).integers(0, 96, (3, 40))
MASK = np.arange(40) >= np.array([[0], [7], [31]])

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}
LONG = {"short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [1.5 + 0.5 * i for i in range(8)]}
LONGROPE = {"rope_type": "longrope", "original_max_position_embeddings": 24, "factor": 4.0, **LONG}
WINDOWED = ["full_attention", "sliding_attention", "sliding_attention"]

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, yarn": ("llama", {"rope_scaling": YARN}),
    "llama, yarn, all options": (
        "llama",
        {"rope_scaling": {**YARN, "beta_fast": 8.0, "beta_slow": 2.0, "attention_factor": 1.3}},
    ),
    "llama, yarn, mscale": ("llama", {"rope_scaling": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.2}}),
    "llama, yarn, not truncated": ("llama", {"rope_scaling": {**YARN, "truncate": False}}),
    "llama, dynamic, short": ("llama", {"rope_scaling": DYNAMIC}),
    "llama, dynamic, long": ("llama", {"rope_scaling": DYNAMIC, "max_position_embeddings": 24}),
    "llama, longrope, long": ("llama", {"rope_scaling": LONGROPE}),
    "llama, longrope, short": ("llama", {"rope_scaling": {**LONGROPE, "original_max_position_embeddings": 64}}),
    "mistral": ("mistral", {}),
    "mistral, window": ("mistral", {"sliding_window": 9}),
    "qwen2": ("qwen2", {}),
    "qwen2, window": ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "qwen2, window off": ("qwen2", {"use_sliding_window": False, "sliding_window": 9, "max_window_layers": 1}),
    "qwen2, layer_types": ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "layer_types": WINDOWED}),
    "qwen3": ("qwen3", {}),
    "qwen3, tied, biases": ("qwen3", {"tie_word_embeddings": True, "attention_bias": True}),
    "qwen3, window": ("qwen3", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2}),
    "qwen3, yarn": ("qwen3", {"rope_scaling": YARN}),
    "qwen3 moe": ("qwen3_moe", {}),
    "qwen3 moe, weights as they are": ("qwen3_moe", {"norm_topk_prob": False, "num_experts_per_tok": 3}),
    "qwen3 moe, all experts": ("qwen3_moe", {"num_experts_per_tok": 6, "tie_word_embeddings": True}),
    "qwen3 moe, window": ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 9}),
    "qwen3 moe, biases, yarn": ("qwen3_moe", {"attention_bias": True, "rope_scaling": YARN}),
    "smollm3": ("smollm3", {}),
    "smollm3, defaults": ("smollm3", {"no_rope_layers": ..., "num_hidden_layers": 4, "rope_theta": ...}),
    "smollm3, interval": ("smollm3", {"no_rope_layers": ..., "no_rope_layer_interval": 2, "mlp_bias": True}),
    "smollm3, window": ("smollm3", {"use_sliding_window": True, "sliding_window": 9}),
    "granite": ("granite", {}),
    "granite, biases": ("granite", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "olmo2": ("olmo2", {}),
    "olmo2, grouped, biases": ("olmo2", {"num_key_value_heads": 1, "attention_bias": True}),
    "phi3": ("phi3", {}),
    "phi3, window": ("phi3", {"sliding_window": 9}),
    "phi3, partial": ("phi3", {"partial_rotary_factor": 0.75}),
    "phi3, longrope, long": (
        "phi3",
        {"rope_scaling": {"type": "longrope", **LONG}, "original_max_position_embeddings": 24},
    ),
    "phi3, longrope, short": (
        "phi3",
        {"rope_scaling": {"type": "longrope", **LONG}, "original_max_position_embeddings": 64},
    ),
    "phi3, longrope, partial": (
        "phi3",
        {
            "partial_rotary_factor": 0.5,
            "rope_scaling": {
                "type": "longrope",
                "short_factor": [1.0, 1.1, 1.2, 2.0],
                "long_factor": [2.0, 3.0, 4.0, 5.0],
            },
            "original_max_position_embeddings": 24,
        },
    ),
    "gemma2": ("gemma2", {}),
    "gemma2, no caps": ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gemma2, layer_types": ("gemma2", {"layer_types": WINDOWED, "attention_bias": True}),
    "gemma3": ("gemma3_text", {}),
    "gemma3, bases": ("gemma3_text", {"rope_theta": 5000.0, "rope_local_base_freq": 100.0}),
    "gemma3, linear": ("gemma3_text", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    "gemma3, caps": ("gemma3_text", {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 9.0}),
    "gemma3, layer_types": ("gemma3_text", {"layer_types": WINDOWED, "tie_word_embeddings": False}),
    "gemma3, nested rope": (
        "gemma3_text",
        {
            "rope_theta": ...,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 3000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 70.0},
            },
        },
    ),
    "opt": ("opt", {}),
    "opt, untied, no biases": ("opt", {"tie_word_embeddings": False, "enable_bias": False}),
    "opt, 350m": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 32}),
    "opt, norms behind": ("opt", {"do_layer_norm_before": False}),
    "opt, projections": ("opt", {"word_embed_proj_dim": 32}),
    "opt, no last norm": ("opt", {"_remove_final_layer_norm": True}),
}


def torch_logits(directory: Path) -> np.ndarray:
    return torch_logits_of(directory, TOKENS, MASK)


def assert_close(actual: Any, expected: np.ndarray) -> None:
    np.testing.assert_allclose(np.asarray(actual)[MASK], expected[MASK], rtol=0, atol=1e-4)


def cached(pretrained: Pretrained, params: Any) -> np.ndarray:
    """The logits of the last token: the first 30 tokens come together, the others one by one."""
    model = pretrained.model
    cache = model.init_cache(params, batch=3, slots=44)
    apply: Any = jax.jit(lambda tokens, mask, cache: model.apply({"params": params}, tokens, mask=mask, cache=cache))
    logits, cache = apply(TOKENS[:, :30], MASK[:, :30], cache)
    for index in range(30, 40):
        logits, cache = apply(TOKENS[:, index : index + 1], MASK[:, index : index + 1], cache)
    return np.asarray(logits[:, -1])


# One of each family is enough for a fast run.
FAST = [next(case for case, (own, _) in CASES.items() if own == family) for family in ARCHITECTURES]
IN_TURN = [pytest.param(*CASES[case], id=case, marks=[] if case in FAST else pytest.mark.slow) for case in CASES]


@pytest.mark.parametrize(("family", "options"), IN_TURN)
def test_logits(tmp_path: Path, family: str, options: dict[str, Any]) -> None:
    directory = write_family(tmp_path / "original", family_config(family, **options))
    expected = torch_logits(directory)
    assert 2 < expected[MASK].std() < 30
    pretrained = from_pretrained(directory)
    whole = pretrained.model.apply({"params": pretrained.params}, jnp.asarray(TOKENS), mask=jnp.asarray(MASK))
    assert_close(whole, expected)
    export_huggingface(tmp_path / "export", pretrained.model, pretrained.params)
    exported = json.loads((tmp_path / "export" / "config.json").read_text())
    assert exported["model_type"] == family
    assert_close(torch_logits(tmp_path / "export"), expected)
    assert from_pretrained(tmp_path / "export").model == pretrained.model


# One for each way in which positions, windows and rotations meet the cache. With dynamic scaling, each further token
# of a long text changes the states of all before it.
CACHED = (
    "llama, dynamic, short",
    "mistral, window",
    "smollm3, window",
    "phi3, longrope, long",
    "qwen3 moe",
    "gemma2",
    "gemma3, bases",
    "opt, 350m",
)


@pytest.mark.parametrize("case", CACHED)
def test_cached_logits_are_those_of_a_whole_pass(tmp_path: Path, case: str) -> None:
    family, options = CASES[case]
    pretrained = from_pretrained(write_family(tmp_path, family_config(family, **options)))
    whole = pretrained.model.apply({"params": pretrained.params}, jnp.asarray(TOKENS), mask=jnp.asarray(MASK))
    for params in (pretrained.params, stack_blocks(pretrained.params)):
        np.testing.assert_allclose(cached(pretrained, params), np.asarray(whole)[:, -1], rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in ARCHITECTURES if family not in ("llama", "mistral")])
def test_quantized_saved_and_loaded(tmp_path: Path, family: str) -> None:
    pretrained = from_pretrained(write_family(tmp_path / "original", family_config(family)))
    config = SpqrConfig(bits=4, group_size=16, outlier_threshold=0.5)
    quantized, report = quantize(pretrained.params, TOKENS[:2], model=pretrained.model, config=config)
    assert len(report) == pretrained.model.config.num_layers * len(pretrained.model.new_block().single_matrices())
    save(tmp_path / "packed", pretrained.model, quantized)
    model, params, _ = load(tmp_path / "packed")
    assert model == pretrained.model
    np.testing.assert_array_equal(LOGITS(model, params, TOKENS), LOGITS(model, quantized, TOKENS))


@pytest.mark.slow
def test_packed_experts_are_exported(tmp_path: Path) -> None:
    pretrained = from_pretrained(write_family(tmp_path / "original", family_config("qwen3_moe")))
    quantized, _ = quantize(pretrained.params, None, model=pretrained.model, config=SpqrConfig(group_size=16))
    expected = LOGITS(pretrained.model, quantized, TOKENS, mask=MASK)
    export_huggingface(tmp_path / "export", pretrained.model, quantized)
    assert_close(torch_logits(tmp_path / "export"), np.asarray(expected))
    with pytest.raises(ConversionError, match="a Qwen3Moe has experts, which the official SpQR format cannot hold"):
        export_hf_spqr(tmp_path / "official", pretrained.model, quantized)


LONG_TENSORS = {
    "rope_factors_short.weight": np.array(LONG["short_factor"], np.float32),
    "rope_factors_long.weight": np.array(LONG["long_factor"], np.float32),
}
GGUF_CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, np.ndarray]]] = {
    "qwen2": ("qwen2", {}, {}, {}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}, {}, {}),
    "qwen3, yarn": (
        "qwen3",
        {"rope_scaling": YARN},
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16},
        {},
    ),
    "qwen3 moe": (
        "qwen3_moe",
        {},
        {"expert_count": 6, "expert_used_count": 2, "expert_feed_forward_length": 32},
        {},
    ),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 1, 1, 0], "num_hidden_layers": 4}, {}, {}),
    "granite": (
        "granite",
        {},
        {"embedding_scale": 2.0, "attention.scale": 0.2, "residual_scale": 0.6, "logit_scale": 1.5},
        {},
    ),
    "olmo2": ("olmo2", {}, {}, {}),
    "phi3": ("phi3", {"sliding_window": 9}, {"rope.dimension_count": 16, "attention.sliding_window": 9}, {}),
    "phi3, partial": ("phi3", {"partial_rotary_factor": 0.5}, {"rope.dimension_count": 8}, {}),
    "phi3, longrope": (
        "phi3",
        {"rope_scaling": {"type": "longrope", **LONG}, "original_max_position_embeddings": 24},
        {"rope.dimension_count": 16, "rope.scaling.original_context_length": 24},
        LONG_TENSORS,
    ),
    "gemma2": (
        "gemma2",
        {"query_pre_attn_scalar": 16},
        {"attention.sliding_window": 12, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        {},
    ),
    "gemma3": (
        "gemma3_text",
        {"sliding_window_pattern": 6, "num_hidden_layers": 7},
        {"attention.sliding_window": 12},
        {},
    ),
}


@pytest.mark.parametrize(("family", "options", "keys", "added"), GGUF_CASES.values(), ids=GGUF_CASES.keys())
def test_gguf(
    tmp_path: Path, family: str, options: dict[str, Any], keys: dict[str, Any], added: dict[str, np.ndarray]
) -> None:
    config = family_config(family, **options)
    directory = write_family(tmp_path / "original", config)
    tensors = load_file(directory / "model.safetensors")
    write_family_gguf(tmp_path / "model.gguf", config, {**tensors, **added}, keys)
    expected, found = from_pretrained(directory), from_pretrained(tmp_path / "model.gguf")
    assert found.model.alias == expected.model.alias
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found.params, expected.params)
    logits = [
        np.asarray(one.model.apply({"params": one.params}, jnp.asarray(TOKENS), mask=jnp.asarray(MASK)))
        for one in (found, expected)
    ]
    assert_close(logits[0], logits[1])


@pytest.mark.parametrize(
    ("family", "options", "named"),
    [
        ("qwen2", {"layer_types": ["full_attention"]}, "layer_types must name 3 kinds of attention"),
        ("qwen3", {"layer_types": ["chunked_attention"] * 3}, "'chunked_attention' is not supported"),
        ("qwen2", {"layer_types": WINDOWED}, "layer_types has sliding_attention, but there is no sliding_window"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers must have a 0 or 1 for each of 3 blocks"),
        ("smollm3", {"num_hidden_layers": 10**9, "no_rope_layers": ...}, "1000000000 blocks are more than"),
        ("granite", {"attention_multiplier": 0.0}, "attention_multiplier must not be 0"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention True is not supported"),
        ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation 'gelu' is not supported"),
        ("qwen3_moe", {"num_experts_per_tok": 7}, "each token goes to 7 experts, but there are 6: give at most 6"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, r"mlp_only_layers \[1\] is not supported"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step 2 is not supported"),
        ("olmo2", {"clip_qkv": 8.0}, "clip_qkv 8.0 is not supported"),
        ("opt", {"activation_function": "gelu"}, "activation_function 'gelu' is not supported"),
        ("opt", {"num_attention_heads": 5}, "hidden_size 64 cannot be divided among 5 attention heads"),
        ("phi3", {"partial_rotary_factor": 1.5}, "partial_rotary_factor 1.5 must be above 0 and at most 1"),
    ],
)
def test_unusable_options_are_named(tmp_path: Path, family: str, options: dict[str, Any], named: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(family_config(family, **options)))
    save_file({"x": np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(ConversionError, match=named):
        from_pretrained(tmp_path)


def test_of_a_gemma_with_images_the_text_model_is_read(tmp_path: Path) -> None:
    config = family_config("gemma3_text")
    text = from_pretrained(write_family(tmp_path / "text", config))
    tensors = load_file(tmp_path / "text" / "model.safetensors")
    for prefix in ("language_model.model.", "model.language_model."):
        directory = tmp_path / prefix
        directory.mkdir()
        renamed = {name.replace("model.", prefix, 1): tensor for name, tensor in tensors.items()}
        renamed["vision_tower.vision_model.post_layernorm.weight"] = np.ones(4, np.float32)
        save_file(renamed, directory / "model.safetensors")
        outer = {
            "model_type": "gemma3",
            "architectures": ["Gemma3ForConditionalGeneration"],
            "text_config": config,
            "vision_config": {},
        }
        (directory / "config.json").write_text(json.dumps(outer))
        with pytest.warns(UserWarning, match=r"only the text model is read, not vision_tower\.vision_model"):
            found = from_pretrained(directory)
        assert found.model == text.model
        jax.tree.map(np.testing.assert_array_equal, found.params, text.params)
