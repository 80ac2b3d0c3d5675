"""Documents in rows, of JSON, Parquet or a data set: a text each, or a conversation in the model's chat template."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from pallas_kernels.errors import SpqrError
from spqr_jax.cli.conversations import messages_of, rendered
from spqr_jax.cli.text_files import read_text
from spqr_jax.texts import SEPARATOR

TEXT_COLUMNS = ("text", "content")
"""Columns of text; the first that a row has is read."""

CHAT_COLUMNS = ("messages", "conversations", "conversation")
"""Columns of chat messages, read where a row has no text."""


def json_rows(file: Path) -> list[Any]:
    """Rows of a file of JSON: one object a line, or one list of objects.

    Raises:
      SpqrError: the file is not UTF-8, or a line is not JSON.
    """
    text = read_text(file)
    try:
        content = json.loads(text)
        rows = content if isinstance(content, list) else [content]
    except (json.JSONDecodeError, RecursionError):
        # Not splitlines, which also cuts at characters that JSON allows inside a string.
        lines = enumerate(text.split("\n"), 1)
        rows = [_parsed(line, f"{file}, line {number}") for number, line in lines if line.strip()]
    return [_in_unicode(row) for row in rows]


def parquet_rows(file: Path) -> list[Any]:
    """Rows of a Parquet file, with nothing but its first column of text or of messages.

    Raises:
      SpqrError: the file is not Parquet, or has no such column.
      ModuleNotFoundError: pyarrow is not installed.
    """
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(file) as opened:
            names = opened.schema_arrow.names
            column = next((name for name in (*TEXT_COLUMNS, *CHAT_COLUMNS) if name in names), None)
            if column is None:
                raise _without_text(str(file), names)
            return [{column: value} for value in opened.read([column]).column(column).to_pylist()]
    except ArrowException as error:
        raise SpqrError(f"{file} cannot be read as Parquet: {error}") from None


def joined_text(rows: Iterable[Any], tokenizer: PreTrainedTokenizerFast | None, origin: str) -> str:
    """The text of all rows, with an empty line between two.

    Args:
      rows: objects with a column of text or of chat messages.
      tokenizer: its chat template renders messages.
      origin: of the rows, named in errors.

    Raises:
      SpqrError: there are no rows, one has neither column or another type in it, or messages cannot be rendered.

    Example:
      >>> joined_text([{"text": "The sky."}, {"text": "The sea."}], tokenizer, "seas.jsonl")
      'The sky.\\n\\nThe sea.'
    """
    documents = [_document(row, tokenizer, f"{origin}, row {number}") for number, row in enumerate(rows, 1)]
    if not documents:
        raise SpqrError(f"{origin} has no rows")
    return SEPARATOR.join(documents)


def _document(row: Any, tokenizer: PreTrainedTokenizerFast | None, origin: str) -> str:
    if not isinstance(row, Mapping):
        raise SpqrError(f"{origin} is {type(row).__name__}, but must be an object with a text or messages")
    for column in TEXT_COLUMNS:
        if column in row:
            if not isinstance(row[column], str):
                raise SpqrError(f"{origin} has {column} of type {type(row[column]).__name__}, but a text is a string")
            return row[column]
    for column in CHAT_COLUMNS:
        if column in row:
            place = f"{origin}, {column}"
            return rendered(messages_of(row[column], place), tokenizer, place)
    raise _without_text(origin, list(row))


def _in_unicode(value: Any) -> Any:
    """A value of JSON in which lone surrogates, halves of a character that was cut, are replacement characters."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_in_unicode(item) for item in value]
    return {key: _in_unicode(item) for key, item in value.items()} if isinstance(value, dict) else value


def _parsed(line: str, origin: str) -> Any:
    try:
        return json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise SpqrError(f"{origin}: not JSON: {error}") from None


def _without_text(origin: str, found: Sequence[str]) -> SpqrError:
    wanted = ", ".join((*TEXT_COLUMNS, *CHAT_COLUMNS))
    return SpqrError(f"{origin} has the columns {', '.join(found) or '(none)'}, but a text is in one of {wanted}")
