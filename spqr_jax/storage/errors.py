"""The error of everything that writes or reads checkpoints."""

import os
import re

from pallas_kernels.errors import SpqrError


class CheckpointError(SpqrError):
    """A checkpoint that cannot be written or read; the message names the path, the reason and the remedy."""


def reason(error: Exception) -> str:
    """The operating system's reason for a failed write; TensorStore buries its error number in a long message.

    Example:
      >>> reason(OSError(28, "No space left on device"))
      'No space left on device'
    """
    number = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(number[1])) if number else getattr(error, "strerror", None) or str(error)
