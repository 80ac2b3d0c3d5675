"""Prompts as users give them: texts, chats, lists and arrays of token ids; and the tokens that end an answer."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax import Array
from transformers import PreTrainedTokenizerBase

from pallas_kernels.errors import SpqrError
from spqr_jax.models.decoder import Decoder
from spqr_jax.texts import integer_ids

Prompts = str | Sequence[Any] | np.ndarray | Array
"""Texts, or token ids: lists or arrays of any lengths, or one array `[batch, tokens]`; or one prompt by itself."""


def prompt_ids(prompts: Prompts, tokenizer: PreTrainedTokenizerBase | None = None) -> list[list[int]]:
    """Token ids of one or more prompts.

    Args:
      prompts: token ids or texts.
      tokenizer: makes token ids of texts.

    Raises:
      SpqrError: a text without a tokenizer, or ids that are not integers `[tokens]`.

    Example:
      >>> prompt_ids(np.array([[5, 6], [7, 8]])), prompt_ids([9, 10]), prompt_ids(["Hi", [5]], tokenizer)
      ([[5, 6], [7, 8]], [[9, 10]], [[72, 105], [5]])
    """
    alone = isinstance(prompts, str) or (len(prompts) and not isinstance(prompts[0], str) and np.ndim(prompts[0]) == 0)
    return [_ids(index, prompt, tokenizer) for index, prompt in enumerate([prompts] if alone else prompts)]


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text, with the special tokens that the tokenizer puts around it, such as BOS before it.

    Example:
      >>> text_ids(tokenizer, "Hi")
      [72, 105]
    """
    return list(tokenizer(text, verbose=False)["input_ids"])


def chat_text(tokenizer: PreTrainedTokenizerBase, conversation: Sequence[dict[str, str]], **options: Any) -> str:
    """A conversation in the tokenizer's chat template, with all special tokens that belong to it.

    Args:
      tokenizer: has a chat template.
      conversation: messages, each with its `role` and `content`.
      options: further ones of `apply_chat_template`, such as `add_generation_prompt`.

    Raises:
      SpqrError: the template refuses the conversation, or is damaged.
    """
    try:
        text = tokenizer.apply_chat_template(list(conversation), tokenize=False, **options)
    except Exception as error:  # a template is a program of the checkpoint's authors, which can fail in every way
        reason = str(error) or type(error).__name__
        raise SpqrError(f"the tokenizer's chat template cannot be used ({reason}): use --no-chat") from error
    assert isinstance(text, str)
    return text


def chat_prompt(tokenizer: PreTrainedTokenizerBase, message: str) -> list[int]:
    """Token ids of a user's message in the tokenizer's chat template, or of the plain text where it has none.

    Args:
      tokenizer: a tokenizer of `transformers`.
      message: the user's message.

    Raises:
      SpqrError: as `chat_text`.

    Example:
      >>> tokenizer.decode(chat_prompt(tokenizer, "What is gravity?"))
      'What is gravity?...'
    """
    if not tokenizer.chat_template:
        return text_ids(tokenizer, message)
    text = chat_text(tokenizer, [{"role": "user", "content": message}], add_generation_prompt=True)
    # The template has put the special tokens in place.
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def end_tokens(model: Decoder, tokenizer: PreTrainedTokenizerBase | None = None) -> tuple[int, ...]:
    """All tokens that end a text: those of the model's generation configuration, and the tokenizer's.

    Example:
      >>> end_tokens(model, tokenizer)
      (256,)
    """
    last = None if tokenizer is None else tokenizer.eos_token_id
    return model.generation.ending_with([] if last is None else [last]).stop_tokens


def _ids(index: int, prompt: Any, tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    if isinstance(prompt, str):
        if tokenizer is None:
            raise SpqrError(f"prompt {index} is a text, which needs a tokenizer: give tokenizer, or token ids")
        return text_ids(tokenizer, prompt)
    try:
        ids = integer_ids(np.asarray(prompt))
    except SpqrError as error:
        raise SpqrError(f"prompt {index}: {error}") from None
    if ids.ndim != 1:
        raise SpqrError(f"prompt {index} has the shape {list(ids.shape)}, but must be ids [tokens]")
    return ids.tolist()
