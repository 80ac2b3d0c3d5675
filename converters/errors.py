"""The one exception of this package."""

from pallas_kernels.errors import SpqrError


class ConversionError(SpqrError):
    """A checkpoint that cannot be read, or that this library would compute differently from its authors."""
