"""OPT's checkpoints; llama.cpp has none."""

import numpy as np

from converters.errors import ConversionError
from converters.families.base import (
    Family,
    Matrix,
    Names,
    Norm,
    Parts,
    decoder_layout,
    huggingface_sizes,
    norm_targets,
    vocabulary,
)
from converters.formats.options import Options, flag, size
from converters.formats.source import Naming
from converters.layout import Layout, Target
from spqr_jax.models import Opt, OptConfig
from spqr_jax.models.opt_config import FIRST_POSITION

_PARTS = Parts("model.decoder.embed_tokens", "model.decoder.final_layer_norm", "lm_head", "model.decoder.layers")


def read(content: Options) -> OptConfig:
    """Configuration from `config.json`; missing options have the defaults of transformers' `OPTConfig`.

    Raises:
      ConversionError: a size is missing or not a positive integer, or an option is not supported.
    """
    sizes = huggingface_sizes(content)
    if sizes["hidden_size"] % sizes["num_heads"]:
        raise ConversionError(
            f"hidden_size {sizes['hidden_size']} cannot be divided among {sizes['num_heads']} attention heads"
        )
    first = flag(content, "do_layer_norm_before", True)
    return OptConfig(
        **sizes,
        mlp_size=size(content, "ffn_dim"),
        embedding_size=size(content, "word_embed_proj_dim", sizes["hidden_size"]),
        norm_first=first,
        final_norm=first and not flag(content, "_remove_final_layer_norm", False),
        bias=flag(content, "enable_bias", True),
        tie_embeddings=flag(content, "tie_word_embeddings", True),
    )


def write(config: OptConfig) -> dict[str, object]:
    """Content of `config.json`; inverse of `read`."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "word_embed_proj_dim": config.embedding_size,
        "ffn_dim": config.mlp_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "activation_function": "relu",
        "do_layer_norm_before": config.norm_first,
        "_remove_final_layer_norm": config.norm_first and not config.final_norm,
        "enable_bias": config.bias,
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": config.max_positions,
    }


def layout(config: OptConfig, naming: Naming) -> Layout:
    """The tensors of a checkpoint with this configuration."""
    hidden, mlp = config.hidden_size, config.mlp_size
    shapes = {
        "q_proj": ("self_attn.q_proj", (hidden, hidden)),
        "k_proj": ("self_attn.k_proj", (hidden, hidden)),
        "v_proj": ("self_attn.v_proj", (hidden, hidden)),
        "out_proj": ("self_attn.out_proj", (hidden, hidden)),
        "fc1": ("fc1", (mlp, hidden)),
        "fc2": ("fc2", (hidden, mlp)),
    }
    matrices = [Matrix(Names(name, stored, ""), shape, config.bias) for name, (stored, shape) in shapes.items()]
    norms = [Norm(Names(name, name, ""), hidden, bias=True) for name in ("self_attn_layer_norm", "final_layer_norm")]
    return decoder_layout(
        config, naming, parts=_PARTS, norms=norms, matrices=matrices, ignored=r"(?!)", ends=_ends(config)
    )


def _ends(config: OptConfig) -> list[Target]:
    """The tensors before the first and after the last block."""
    hidden, embedding = config.hidden_size, config.embedding_size
    rows = config.max_positions + FIRST_POSITION
    positions = Target(("embed_tokens", "positions"), "model.decoder.embed_positions.weight", (rows, hidden))
    targets = [*vocabulary(config, _PARTS, embedding), positions]
    if config.final_norm:
        targets += norm_targets(("norm", "final_layer_norm"), _PARTS.norm, hidden, bias=True)
    if hidden != embedding:
        shapes = {("embed_tokens", "project_in"): (hidden, embedding), ("norm", "project_out"): (embedding, hidden)}
        for (part, name), shape in shapes.items():
            path = part, name, "kernel"
            targets.append(Target(path, f"model.decoder.{name}.weight", shape, np.transpose))
    return targets


OPT = Family(
    name="opt",
    architectures=("OPTForCausalLM",),
    model=Opt,
    read=read,
    write=write,
    layout=layout,
    neutral={
        "activation_function": ("relu",),
        "layer_norm_elementwise_affine": (True,),
        "quantization_config": (None,),
    },
)
