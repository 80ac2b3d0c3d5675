"""Models whose parameters stay on the disk until they are asked for, one block at a time."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from transformers import PreTrainedTokenizerFast

from spqr_jax.models.decoder import Decoder, Params


class ModelSource(NamedTuple):
    """A model in files: what opens in a moment, and reads of its parameters what is asked for.

    Attributes:
      model: the Flax module.
      parts: what reads each entry at the top of the parameter tree (`embed_tokens`, `layers_0`, …, `norm`, `lm_head`)
        into host memory; nothing of it stays there but what the caller keeps.
      tokenizer: None if there is none.

    Example:
      >>> source = open_pretrained("HuggingFaceTB/SmolLM2-135M")
      >>> source.parts["layers_3"]()["q_proj"]["kernel"].shape
      (576, 576)
    """

    model: Decoder
    parts: Mapping[str, Callable[[], Params]]
    tokenizer: PreTrainedTokenizerFast | None

    def read(self) -> Params:
        """All parameters."""
        return {name: read() for name, read in self.parts.items()}
