"""Options of a Falcon that depend on each other: key-value heads and the arrangement of a block."""

from typing import Literal

from converters.errors import ConversionError
from converters.formats.options import Options, flag, require_groups, size


def kv_heads(content: Options, num_heads: int) -> int:
    """Number of key-value heads, which depends on three options.

    Raises:
      ConversionError: the options contradict each other.
    """
    num_kv_heads = size(content, "num_kv_heads", num_heads)
    if flag(content, "new_decoder_architecture", False):
        require_groups(num_heads, num_kv_heads)
        return num_kv_heads
    if flag(content, "multi_query", True):
        return 1
    if num_kv_heads != num_heads:
        raise ConversionError(
            f"num_kv_heads {num_kv_heads} of {num_heads} attention heads needs new_decoder_architecture or multi_query"
        )
    return num_heads


def arrangement(content: Options) -> Literal["sequential", "parallel", "parallel_two_norms"]:
    """Order of attention and MLP, and their norms.

    Raises:
      ConversionError: the options contradict each other.
    """
    new, parallel = flag(content, "new_decoder_architecture", False), flag(content, "parallel_attn", True)
    norms = size(content, "num_ln_in_parallel_attn", 2 if new else 1)
    if new and not parallel:
        raise ConversionError("new_decoder_architecture needs parallel_attn")
    if not parallel:
        return "sequential"
    if norms not in ((1, 2) if new else (1,)):
        raise ConversionError(
            f"num_ln_in_parallel_attn {norms} is not supported, only 1 or, with new_decoder_architecture, 2"
        )
    return "parallel_two_norms" if norms == 2 else "parallel"
