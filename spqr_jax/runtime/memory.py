"""Freed memory that the process still holds."""

import ctypes
import sys


def release_freed() -> None:
    """Releases to the operating system the freed memory that the C library keeps, where that is glibc.

    The compiler's working memory, and arrays under 32 MB, otherwise stay with the process: several hundred MB while the
    first block is quantized.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
