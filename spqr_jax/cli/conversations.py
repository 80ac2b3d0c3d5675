"""Conversations: messages as files have them, and the model's chat template around them."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerFast

from pallas_kernels.errors import SpqrError
from spqr_jax.cli.models import encode
from spqr_jax.prompts import chat_text

ROLES = {"human": "user", "gpt": "assistant"}
"""Roles of messages of the form {"from": ..., "value": ...}, where they differ from those of chat templates."""

Message = Mapping[str, Any]


def messages_of(value: Any, origin: str) -> list[Message]:
    """The messages of a conversation, each with a role and a content.

    Args:
      value: as a file of JSON or Parquet has it.
      origin: of the value, named in errors.

    Raises:
      SpqrError: it is no list of messages.

    Example:
      >>> messages_of([{"from": "human", "value": "Why?"}], "row 1")
      [{'role': 'user', 'content': 'Why?'}]
    """
    if not isinstance(value, list) or not value or not all(isinstance(message, Mapping) for message in value):
        raise SpqrError(f"{origin} must be a list of messages, each an object with a role and a content")
    return [_with_role(message) for message in value]


def rendered(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerFast | None, origin: str, **options: bool
) -> str:
    """A conversation in the tokenizer's chat template.

    Args:
      messages: of the conversation.
      tokenizer: of the model; None if it has none.
      origin: of the messages, named in errors.
      options: of `prompts.chat_text`.

    Raises:
      SpqrError: there is no template, or it refuses the messages.
    """
    if tokenizer is None or not tokenizer.chat_template:
        raise SpqrError(f"{origin} needs a chat template, but the tokenizer has none: give a text")
    try:
        return chat_text(tokenizer, [dict(message) for message in messages], **options)
    except SpqrError as error:
        raise SpqrError(f"{origin} cannot be rendered by the chat template: {error.__cause__}") from None


def answer_prompt(messages: Sequence[Message], tokenizer: PreTrainedTokenizerFast | None, origin: str) -> list[int]:
    """Token ids of a conversation that the model is to continue with its answer.

    Raises:
      SpqrError: there is no template, or it refuses the messages.
    """
    # The template has put the special tokens in place.
    return encode(tokenizer, rendered(messages, tokenizer, origin, add_generation_prompt=True))


def _with_role(message: Message) -> Message:
    if "role" in message or "from" not in message:
        return message
    return {"role": ROLES.get(message["from"], message["from"]), "content": message.get("value")}
