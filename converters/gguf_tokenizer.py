"""The tokenizer of a GGUF file under its earlier name; it is in `converters.formats.gguf.tokenizer`."""

from converters.formats.gguf.tokenizer import build_tokenizer

__all__ = ["build_tokenizer"]
