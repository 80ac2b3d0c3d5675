"""The exception of this package."""

from pallas_kernels.errors import SpqrError


class ConversionError(SpqrError):
    """A checkpoint cannot be read or written, or this library would compute its model differently from its authors."""
