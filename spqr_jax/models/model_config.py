"""The configuration that every family of models has."""

from dataclasses import Field
from typing import Any, ClassVar, Protocol, runtime_checkable

from spqr_jax.models.attention import AttentionKind


@runtime_checkable
class ModelConfig(Protocol):
    """Sizes of a decoder-only model, as the shared code reads them; a family's frozen dataclass adds its own options.

    Attributes:
      vocab_size: rows of the embedding and of the head.
      hidden_size: features of the residual stream.
      num_layers: blocks.
      num_heads: attention heads.
      num_kv_heads: key-value heads, each for num_heads / num_kv_heads attention heads.
      head_dim: features of a head.
      max_positions: longest sequence that the model was made for.
      tie_embeddings: the head is the embedding, transposed.
    """

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def vocab_size(self) -> int: ...

    @property
    def hidden_size(self) -> int: ...

    @property
    def num_layers(self) -> int: ...

    @property
    def num_heads(self) -> int: ...

    @property
    def num_kv_heads(self) -> int: ...

    @property
    def head_dim(self) -> int: ...

    @property
    def max_positions(self) -> int: ...

    @property
    def tie_embeddings(self) -> bool: ...

    def attention(self, index: int) -> AttentionKind:
        """How a block attends."""
        ...
