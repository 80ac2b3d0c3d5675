"""Models whose parameters stay on the disk until they are read, one block at a time."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from transformers import PreTrainedTokenizerFast

from spqr_jax.models.decoder import Decoder, Params


class ModelSource(NamedTuple):
    """An opened model whose parameters are read part by part.

    Attributes:
      model: the Flax module.
      parts: a function for each entry at the top of the parameter tree (`embed_tokens`, `layers_0`, …, `norm`,
        `lm_head`), which reads it into host memory and keeps no reference to it.
      tokenizer: None if there is none.
      name: id on the hub, or name of the directory or file; for model cards.

    Example:
      >>> source = open_pretrained("HuggingFaceTB/SmolLM2-135M")
      >>> source.parts["layers_1"]()["q_proj"]["kernel"].shape
      (64, 64)
    """

    model: Decoder
    parts: Mapping[str, Callable[[], Params]]
    tokenizer: PreTrainedTokenizerFast | None
    name: str | None = None

    def read(self) -> Params:
        """Reads all parameters."""
        return {name: read() for name, read in self.parts.items()}
