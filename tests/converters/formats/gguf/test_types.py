"""Every type of quantization in GGUF files: parameters equal what the `gguf` package makes of the file's bytes."""

from pathlib import Path

import gguf
import numpy as np
import pytest
from helpers.tiny_models import random_tensors, tiny_config

from converters import ConversionError, from_pretrained

# Blocks have up to 256 features of a row.
CONFIG = tiny_config(hidden_size=256, intermediate_size=512, num_hidden_layers=1, vocab_size=32)
HEADS = {"q_proj": CONFIG["num_attention_heads"], "k_proj": CONFIG["num_key_value_heads"]}


def can_dequantize(kind: gguf.GGMLQuantizationType) -> bool:
    try:
        gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


SUPPORTED = {kind.name: kind for kind in gguf.GGMLQuantizationType if can_dequantize(kind)}
UNSUPPORTED = {kind.name: kind for kind in gguf.GGMLQuantizationType if not can_dequantize(kind)}


def stored_bytes(weight: np.ndarray, kind: gguf.GGMLQuantizationType, rng: np.random.Generator) -> np.ndarray:
    """The weight quantized, or where the package cannot, random blocks: any bytes whose scales are finite will do."""
    try:
        return gguf.quantize(weight, kind).view(np.uint8)
    except NotImplementedError:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        blocks = rng.integers(0, 256, (weight.size // block, size), np.uint8)
    with np.errstate(all="ignore"):
        while can_dequantize(kind) and (bad := ~np.isfinite(gguf.dequantize(blocks, kind)).all(axis=1)).any():
            blocks[bad] = rng.integers(0, 256, (bad.sum(), size), np.uint8)
    return blocks.reshape(len(weight), -1)


def write(path: Path, kind: gguf.GGMLQuantizationType) -> dict[str, np.ndarray]:
    """A GGUF file whose matrices are of one type, and the bytes of these matrices under Hugging Face's names."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(CONFIG["max_position_embeddings"])
    writer.add_vocab_size(CONFIG["vocab_size"])
    writer.add_embedding_length(CONFIG["hidden_size"])
    writer.add_feed_forward_length(CONFIG["intermediate_size"])
    writer.add_block_count(1)
    writer.add_head_count(CONFIG["num_attention_heads"])
    writer.add_head_count_kv(CONFIG["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 1)
    matrices = {}
    for name, tensor in random_tensors(CONFIG).items():
        renamed = names.get_name(name, try_suffixes=(".weight",))
        if tensor.ndim == 1:
            writer.add_tensor(renamed, tensor)
        else:
            matrices[name] = stored_bytes(tensor, kind, rng)
            writer.add_tensor(renamed, matrices[name], raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return matrices


def in_halves(name: str, weight: np.ndarray) -> np.ndarray:
    """Row (head, i, j) of a query or key matrix in the file is feature i + half · j of the head."""
    heads = next((count for part, count in HEADS.items() if part in name), None)
    if heads is None:
        return weight
    return weight.reshape(heads, -1, 2, weight.shape[1]).transpose(0, 2, 1, 3).reshape(weight.shape)


@pytest.mark.parametrize("kind", SUPPORTED.values(), ids=SUPPORTED.keys())
def test_type(tmp_path: Path, kind: gguf.GGMLQuantizationType) -> None:
    matrices = write(tmp_path / "model.gguf", kind)
    params = from_pretrained(tmp_path / "model.gguf").params
    for name, stored in matrices.items():
        weight = in_halves(name, gguf.dequantize(stored, kind))
        assert np.isfinite(weight).all()
        assert weight.std() > 0
        module = name.split(".")[-2]
        if module == "embed_tokens":
            np.testing.assert_array_equal(params["embed_tokens"]["embedding"], weight)
        else:
            parent = params if module == "lm_head" else params["layers_0"]
            np.testing.assert_array_equal(parent[module]["kernel"], weight.T)


@pytest.mark.parametrize("kind", UNSUPPORTED.values(), ids=UNSUPPORTED.keys())
def test_type_that_cannot_be_dequantized(tmp_path: Path, kind: gguf.GGMLQuantizationType) -> None:
    write(tmp_path / "model.gguf", kind)
    with pytest.raises(ConversionError) as raised:
        from_pretrained(tmp_path / "model.gguf")
    assert "token_embd.weight" in str(raised.value)
    assert kind.name in str(raised.value)
    assert "model.gguf" in str(raised.value)


def test_the_types_of_common_files_are_among_them() -> None:
    common = "F32 F16 BF16 Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 Q2_K Q3_K Q4_K Q5_K Q6_K IQ2_XXS IQ3_S IQ4_NL IQ4_XS IQ1_S"
    assert set(common.split()) <= SUPPORTED.keys()
