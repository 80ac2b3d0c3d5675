"""Memory of the process that nothing uses any more."""

import ctypes
import sys


def release_freed() -> None:
    """Gives back to the operating system what the C library keeps of freed memory, where that is glibc.

    What a compiler has used for its work, and arrays of less than 32 MB, otherwise stay with the process: several
    hundred MB while a first block is quantized.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
