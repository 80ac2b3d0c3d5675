"""The generation configuration of a model: the tokens that end its texts, and all else that its authors chose."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pallas_kernels.errors import SpqrError

END = "eos_token_id"
"""The entry with the tokens that end a text: an id, or a list of ids."""


@dataclass(frozen=True)
class GenerationOptions:
    """The generation configuration of a model, kept whole; of its entries, only the ends of texts are used here.

    Attributes:
      text: a JSON object, as text, so that a model with these options can be hashed.

    Example:
      >>> GenerationOptions.of({"eos_token_id": [2, 7], "temperature": 0.6}).stop_tokens
      (2, 7)
    """

    text: str = "{}"

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> "GenerationOptions":
        """The options of a JSON object.

        Raises:
          SpqrError: its `eos_token_id` is neither an id nor a list of ids.
        """
        token_ids(content.get(END))
        return cls(json.dumps(dict(content)))

    @property
    def content(self) -> dict[str, Any]:
        """The JSON object."""
        return json.loads(self.text)

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """The tokens that end a text."""
        return token_ids(self.content.get(END))

    def ending_with(self, ids: Iterable[int]) -> "GenerationOptions":
        """The options in which more tokens end a text.

        Example:
          >>> GenerationOptions.of({"eos_token_id": 2}).ending_with([2, 7]).content
          {'eos_token_id': [2, 7]}
        """
        ends = tuple(dict.fromkeys((*self.stop_tokens, *ids)))
        if ends == self.stop_tokens:
            return self
        return GenerationOptions.of({**self.content, END: ends[0] if len(ends) == 1 else list(ends)})


def token_ids(value: object) -> tuple[int, ...]:
    """Token ids of an entry: an id, a list of ids, or None for none; negative ones mean none too.

    Raises:
      SpqrError: it is something else.

    Example:
      >>> token_ids([2, 7, 2]), token_ids(2), token_ids(None), token_ids(-1)
      ((2, 7), (2,), (), ())
    """
    ids: Any = value if isinstance(value, list | tuple) else [] if value is None else [value]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise SpqrError(f"{END} is {value!r}, but must be a token id or a list of them")
    return tuple(dict.fromkeys(token for token in ids if token >= 0))
