"""The speed of decoding, as commands show it."""

import time
from collections.abc import Iterable, Iterator


class Speed:
    """Times the tokens that pass through `watch`: the first apart, because programs are compiled before it.

    Example:
      >>> speed = Speed()
      >>> [tokens for (tokens,) in speed.watch([[[5]], [[6]], [[7, 8]]])]
      [[5], [6], [7, 8]]
      >>> sorted(speed.values())
      ['first_token_seconds', 'tokens_per_second']
    """

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.first = self.last = self.started
        self.later = 0
        """Tokens after the first chunk."""

    def watch(self, chunks: Iterable[list[list[int]]]) -> Iterator[list[list[int]]]:
        """Yields chunks of tokens of several sequences as they come."""
        for index, chunk in enumerate(chunks):
            self.last = time.perf_counter()
            if index == 0:
                self.first = self.last
            else:
                self.later += sum(map(len, chunk))
            yield chunk

    def values(self) -> dict[str, float]:
        """Seconds to the first chunk, and tokens per second after it, if there were any."""
        first = {"first_token_seconds": self.first - self.started}
        return first | ({"tokens_per_second": self.later / (self.last - self.first)} if self.later else {})

    def __str__(self) -> str:
        values = self.values()
        rate = f", then {values['tokens_per_second']:.1f} tokens/s" if self.later else ""
        return f"first token after {values['first_token_seconds']:.1f} s{rate}"
