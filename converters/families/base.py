"""The base of all families: their description, their sizes, and their tensors in both spellings."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypedDict, TypeVar

import numpy as np

from converters.families.rotary import ROTARY_KNOWN, ROTARY_NEUTRAL
from converters.formats.gguf.file import GgufFile
from converters.formats.options import Neutral, Options, require_groups, require_neutral, size
from converters.formats.source import Naming
from converters.layout import Layout, Target, Transform
from spqr_jax.models import Decoder, ModelConfig, layer_name

Config = TypeVar("Config", bound=ModelConfig)


@dataclass(frozen=True)
class Family(Generic[Config]):
    """Reads and writes the checkpoints of one family of models, under its own name or under an alias.

    An alias is `dataclasses.replace(FAMILY, name=…, alias=…, …)`: its models run as the family's.

    Attributes:
      name: Hugging Face's `model_type`.
      architectures: names of classes that `config.json` may have; the first one is written.
      model: the Flax module, made from a configuration.
      read: makes a configuration from the content of `config.json`.
      write: makes the content of `config.json` from a configuration.
      layout: lists the checkpoint's tensors, under the names of either project.
      read_gguf: makes a configuration from a GGUF file and the prefix of its keys.
      gguf: GGUF's `general.architecture`, the prefix of its keys; of several families with one prefix, the first in
        the table reads it. None where llama.cpp does not have the family.
      alias: the name that models keep, and are exported under; None for the family itself.
      defaults: options that `config.json` may leave out, with their values, where `read` has others.
      neutral: options of `config.json` that change the model, with the values under which they do not.
      rename: the layout's name of a stored tensor, or None for one that belongs to no language model and is left out.
    """

    name: str
    architectures: tuple[str, ...]
    model: type[Decoder]
    read: Callable[[Options], Config]
    write: Callable[[Config], dict[str, object]]
    layout: Callable[[Config, Naming], Layout]
    read_gguf: Callable[[GgufFile, str], Config] | None = None
    gguf: str | None = None
    alias: str | None = None
    defaults: Options = field(default_factory=dict)
    neutral: Neutral = field(default_factory=dict)
    rename: Callable[[str], str | None] | None = None

    def from_huggingface(self, content: Options) -> Config:
        """Configuration from the content of `config.json`.

        Raises:
          ConversionError: a size is missing or not a positive integer, or an option is not supported.
        """
        content = {**self.defaults, **content}
        require_neutral(content, {"architectures": (None, [], *([name] for name in self.architectures))})
        require_neutral(content, self.neutral)
        return self.read(content)

    def to_huggingface(self, config: Config) -> dict[str, object]:
        """Content of `config.json`; inverse of `from_huggingface`."""
        own = {"architectures": [self.architectures[0]], "model_type": self.name}
        return {**own, **self.write(config)}

    def from_gguf(self, file: GgufFile) -> Config:
        """Configuration from a GGUF file; what its keys do not say shows in its tensors.

        Raises:
          ConversionError: a size is missing, differs from block to block, or an option is not supported.
        """
        assert self.gguf is not None
        assert self.read_gguf is not None
        return self.read_gguf(file, self.gguf)


HUGGINGFACE_NEUTRAL: Neutral = {
    "partial_rotary_factor": (None, 1.0),
    "quantization_config": (None,),
    "sliding_window": (None,),
}
"""Options of `config.json` that no family supports, with the values under which they change nothing."""

GGUF_NEUTRAL: Neutral = {**ROTARY_NEUTRAL, "attention.causal": (True,), "attention.sliding_window": (0,)}
"""GGUF's keys, without the prefix, that no family supports, with the values under which they change nothing."""

GGUF_KNOWN = {
    *ROTARY_KNOWN,
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "rope.dimension_count",
    "vocab_size",
}
"""GGUF's keys that all families read."""


class HuggingFaceSizes(TypedDict):
    """Sizes that have the same name in the `config.json` of every family."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    max_positions: int


class GgufSizes(HuggingFaceSizes):
    """Sizes in a GGUF file."""

    mlp_size: int
    num_kv_heads: int
    tie_embeddings: bool


def huggingface_sizes(content: Options) -> HuggingFaceSizes:
    """Sizes from `config.json`; without `max_position_embeddings`, 2048 positions."""
    return {
        "vocab_size": size(content, "vocab_size"),
        "hidden_size": size(content, "hidden_size"),
        "num_layers": size(content, "num_hidden_layers"),
        "num_heads": size(content, "num_attention_heads"),
        "max_positions": size(content, "max_position_embeddings", 2048),
    }


def gguf_sizes(content: Options, file: GgufFile) -> GgufSizes:
    """Sizes from GGUF's keys without their prefix; a tied embedding is one without a head among the tensors."""
    num_heads = size(content, "attention.head_count")
    num_kv_heads = size(content, "attention.head_count_kv", num_heads)
    require_groups(num_heads, num_kv_heads)
    return {
        "vocab_size": size(content, "vocab_size", len(file.metadata.get("tokenizer.ggml.tokens", ())) or None),
        "hidden_size": size(content, "embedding_length"),
        "mlp_size": size(content, "feed_forward_length"),
        "num_layers": size(content, "block_count"),
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "max_positions": size(content, "context_length", 2048),
        "tie_embeddings": f"{GGUF_PARTS.head}.weight" not in file.tensors,
    }


class Parts(NamedTuple):
    """Names of a model's parts in one spelling: embedding, final norm, head, and blocks without their number."""

    embedding: str
    norm: str
    head: str
    block: str


GGUF_PARTS = Parts("token_embd", "output_norm", "output", "blk")


class Names(NamedTuple):
    """Name of a part of a block: as module, in a Hugging Face checkpoint, in a GGUF file."""

    module: str
    huggingface: str
    gguf: str


@dataclass(frozen=True)
class Matrix:
    """A linear layer of a block.

    Attributes:
      names: its names.
      shape: (out, in).
      bias: whether it has a bias.
      from_gguf: puts rows, of weight or bias, from GGUF's order into that of Hugging Face.
      experts: their number, where each has one, under Hugging Face's name with its own number for `{}`; else None.
    """

    names: Names
    shape: tuple[int, int]
    bias: bool = False
    from_gguf: Transform = np.asarray
    experts: int | None = None


@dataclass(frozen=True)
class Norm:
    """A norm of a block.

    Attributes:
      names: its names.
      features: their number.
      bias: whether it has a bias.
    """

    names: Names
    features: int
    bias: bool = False


def decoder_layout(
    config: ModelConfig,
    naming: Naming,
    *,
    parts: Parts,
    norms: Sequence[Norm],
    matrices: Sequence[Matrix],
    ignored: str,
    ends: Sequence[Target] | None = None,
    norm_bias: bool = False,
    from_gguf: Transform = np.asarray,
) -> Layout:
    """The tensors of a checkpoint of a decoder-only model.

    Args:
      config: the model's sizes.
      naming: whose names the tensors have.
      parts: Hugging Face's names of the model's parts; GGUF's are those of every family.
      norms: of a block.
      matrices: of a block.
      ignored: matches the names of tensors that are no parameters, as frequencies that the configuration gives already.
      ends: tensors before the first and after the last block, where they are not an embedding, a norm and a head.
      norm_bias: whether the norm after the last block has a bias.
      from_gguf: makes the weight of a norm from that of GGUF.
    """
    parts = GGUF_PARTS if naming == "gguf" else parts
    scaled = from_gguf if naming == "gguf" else np.asarray
    embedding, head = f"{parts.embedding}.weight", f"{parts.head}.weight"
    copies = {head: embedding} if config.tie_embeddings else {}
    targets = list(vocabulary(config, parts, config.hidden_size) if ends is None else ends)
    if ends is None:
        targets += norm_targets(("norm",), parts.norm, config.hidden_size, norm_bias, scaled)
    for index in range(config.num_layers):
        prefix, layer = f"{parts.block}.{index}", layer_name(index)
        for norm in norms:
            name = f"{prefix}.{getattr(norm.names, naming)}"
            targets += norm_targets((layer, norm.names.module), name, norm.features, norm.bias, scaled)
        for matrix in matrices:
            targets += _linear(matrix, layer, f"{prefix}.{getattr(matrix.names, naming)}", naming)
    return Layout(tuple(targets), copies, re.compile(ignored))


def vocabulary(config: ModelConfig, parts: Parts, features: int) -> list[Target]:
    """Embedding and head; a tied head may be stored as well, and must be equal."""
    shape = config.vocab_size, features
    targets = [Target(("embed_tokens", "embedding"), f"{parts.embedding}.weight", shape)]
    if config.tie_embeddings:
        return targets
    return [*targets, Target(("lm_head", "kernel"), f"{parts.head}.weight", shape, np.transpose)]


def norm_targets(
    path: tuple[str, ...], name: str, features: int, bias: bool = False, transform: Transform = np.asarray
) -> Iterator[Target]:
    """The tensors of a norm."""
    yield Target((*path, "scale"), f"{name}.weight", (features,), transform)
    if bias:
        yield Target((*path, "bias"), f"{name}.bias", (features,))


def _linear(matrix: Matrix, layer: str, name: str, naming: Naming) -> Iterator[Target]:
    path = layer, matrix.names.module
    rows = matrix.from_gguf if naming == "gguf" else np.asarray
    if matrix.experts is None:
        yield Target((*path, "kernel"), f"{name}.weight", matrix.shape, _transposed(rows))
    elif naming == "gguf":
        yield Target((*path, "kernel"), f"{name}.weight", (matrix.experts, *matrix.shape), _transposed(rows))
    else:
        for index in range(matrix.experts):
            place = index, matrix.experts
            yield Target((*path, "kernel"), f"{name.format(index)}.weight", matrix.shape, _transposed(rows), place)
    if matrix.bias:
        yield Target((*path, "bias"), f"{name}.bias", matrix.shape[:1], rows)


def _transposed(rows: Transform) -> Transform:
    """A PyTorch weight is `[out, in]`, a Flax kernel `[in, out]`; stacks of them alike."""
    return lambda weight: rows(weight).swapaxes(-1, -2)
