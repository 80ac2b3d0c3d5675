"""The base class of all errors that a user can cause."""


class SpqrError(ValueError):
    """An input that cannot be used. The message is one sentence: what is wrong, with the numbers, and what to do."""
