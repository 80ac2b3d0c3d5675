"""Generated text on standard output, as soon as there is more of it."""

from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerFast

from spqr_jax.cli import console
from spqr_jax.cli.models import decode


def show_tokens(
    steps: Iterable[Sequence[Sequence[int]]], tokenizer: PreTrainedTokenizerFast, *, show: bool
) -> list[int]:
    """The tokens of one prompt, whose text is shown while they are generated.

    Args:
      steps: of `generation.stream`, for one prompt.
      tokenizer: of the model.
      show: print the text, and a newline at its end.
    """
    tokens: list[int] = []
    shown = ""
    for (new,) in steps:
        tokens += new
        # An incomplete character of several tokens decodes to the replacement character: wait for the rest.
        if show and not (text := decode(tokenizer, tokens)).endswith("\N{REPLACEMENT CHARACTER}"):
            print(text[len(shown) :], end="", file=console.results(), flush=True)
            shown = text
    if show:
        print(file=console.results(), flush=True)
    return tokens
