"""The one exception of this package."""


class ConversionError(ValueError):
    """A checkpoint that cannot be read, or that this library would compute differently from its authors."""
