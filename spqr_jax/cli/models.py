"""Models and texts as the commands take them."""

from functools import partial
from pathlib import Path
from typing import Any, Literal

from pallas_kernels.errors import SpqrError


def load_model(source: str, dtype: str) -> tuple[Any, Any, Any]:
    """Model, parameters and tokenizer of a checkpoint of ours or of another project.

    Dense parameters come as `dtype`.
    """
    opened = open_model(source, dtype)
    return opened.model, opened.read(), opened.tokenizer


def open_model(source: str, dtype: str) -> Any:
    """The same, without reading the parameters yet: a `ModelSource`."""
    import jax
    import jax.numpy as jnp

    from converters import open_pretrained
    from pallas_kernels import SpqrTensor
    from spqr_jax.storage import checkpoint

    if not checkpoint.is_checkpoint(source):
        return open_pretrained(source, dtype=jnp.dtype(dtype))
    opened = checkpoint.open_checkpoint(source)

    def cast(leaf: Any) -> Any:
        is_weight = not isinstance(leaf, SpqrTensor) and jnp.issubdtype(leaf.dtype, jnp.floating)
        return leaf.astype(dtype) if is_weight else leaf

    def read(name: str) -> Any:
        return jax.tree.map(cast, opened.parts[name](), is_leaf=lambda leaf: isinstance(leaf, SpqrTensor))

    return opened._replace(parts={name: partial(read, name) for name in opened.parts})


def require(tokenizer: Any) -> None:
    """Raises a SpqrError where a checkpoint came without a tokenizer."""
    if tokenizer is None:
        raise SpqrError("the checkpoint has no tokenizer; add its tokenizer.json and tokenizer_config.json")


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, without special tokens."""
    require(tokenizer)
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def encode_text(tokenizer: Any, text: Path | None, split: Literal["valid", "test"]) -> list[int]:
    """The same of a text file, or of this part of the package's text."""
    from spqr_jax.texts import wikitext2

    return encode(tokenizer, wikitext2(split) if text is None else text.read_text(encoding="utf-8"))
