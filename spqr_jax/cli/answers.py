"""Answers to the prompts of a file, written batch by batch, so that an interrupted command resumes."""

import hashlib
import itertools
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from pallas_kernels.errors import SpqrError
from spqr_jax.cli import console
from spqr_jax.cli.conversations import answer_prompt, messages_of
from spqr_jax.cli.documents import CHAT_COLUMNS, TEXT_COLUMNS, json_rows
from spqr_jax.cli.models import decode, load_model, require
from spqr_jax.generation import for_decoding, generate
from spqr_jax.models.decoder import Decoder, Params
from spqr_jax.prompts import chat_prompt, end_tokens, text_ids

PROMPT = "prompt"
COLUMNS = (PROMPT, *TEXT_COLUMNS, *CHAT_COLUMNS)
"""Columns of prompts; the first that a row has is read."""


@dataclass(frozen=True)
class Prompt:
    """A prompt of a file.

    Attributes:
      row: its row, with the text or the messages under `prompt`.
      ids: its token ids.
    """

    row: Mapping[str, Any]
    ids: Sequence[int]


def read_prompts(file: Path, tokenizer: PreTrainedTokenizerFast, *, chat: bool) -> list[Prompt]:
    """Reads the prompts of a file of JSON: strings, or objects with a text or messages in one of `COLUMNS`.

    Args:
      file: one row a line, or one list of rows.
      tokenizer: of the model.
      chat: put texts into the chat template, where the tokenizer has one.

    Raises:
      SpqrError: the file has no prompts, or one cannot be read; the message names its row.
    """
    rows = json_rows(file)
    if not rows:
        raise SpqrError(f"{file} has no prompts")
    return [_prompt(row, tokenizer, f"{file}, row {number}", chat) for number, row in enumerate(rows, 1)]


def check_lengths(prompts: Sequence[Prompt], max_new_tokens: int, positions: int) -> None:
    """Checks all prompts before the first is answered.

    Raises:
      SpqrError: a prompt is empty, or exceeds the model's positions with its answer.
    """
    for number, prompt in enumerate(prompts, 1):
        if not prompt.ids:
            raise SpqrError(f"the prompt of row {number} is empty")
        if len(prompt.ids) + max_new_tokens > positions:
            raise SpqrError(
                f"the prompt of row {number} has {len(prompt.ids)} tokens, but with {max_new_tokens} new ones they "
                f"exceed the {positions} positions of the model: shorten it, or lower --max-new-tokens"
            )


@dataclass(frozen=True)
class AnswerFile:
    """A file with an answer a line, in the order of the prompts.

    Attributes:
      path: of the file.
      settings: what the answers depend on besides their prompts: the model and all options.
    """

    path: Path
    settings: Mapping[str, Any]

    @property
    def run(self) -> str:
        """Digest of the settings; every answer has it, so that answers of other settings are recognized."""
        return hashlib.blake2b(json.dumps(self.settings, sort_keys=True).encode(), digest_size=8).hexdigest()

    def finished(self, prompts: Sequence[Prompt], batch: int) -> int:
        """Number of prompts with an answer in the file, in whole batches; what follows them is cut off.

        Raises:
          SpqrError: the file has something else: other prompts, answers of other settings, or no answers.
        """
        if not self.path.exists():
            return 0
        # A line without its end was being written when the command was interrupted.
        lines = self.path.read_bytes().split(b"\n")[:-1]
        for number, line in enumerate(lines, 1):
            self._check(line, number, prompts)
        # A batch is generated together, so that its answers are those of a command that was not interrupted.
        kept = len(lines) if len(lines) == len(prompts) else len(lines) // batch * batch
        os.truncate(self.path, sum(len(line) + 1 for line in lines[:kept]))
        return kept

    def append(self, prompts: Sequence[Prompt], tokens: Sequence[Sequence[int]], texts: Sequence[str]) -> None:
        """Writes the answers of a batch, and returns when they are on the disk."""
        with self.path.open("a", encoding="utf-8") as file:
            for prompt, ids, text in zip(prompts, tokens, texts, strict=True):
                answer = {**prompt.row, "text": text, "tokens": list(ids), "run": self.run}
                file.write(json.dumps(answer) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _check(self, line: bytes, number: int, prompts: Sequence[Prompt]) -> None:
        try:
            answer = json.loads(line)
            run, prompt = answer["run"], answer[PROMPT]
        except (ValueError, KeyError, TypeError):
            raise SpqrError(f"{self.path}, line {number} is no answer of this command: give another --output") from None
        if run != self.run:
            raise SpqrError(
                f"{self.path}, line {number} is the answer of another model or of other options: repeat the command "
                "that wrote it, or give another --output"
            )
        if number > len(prompts) or prompt != prompts[number - 1].row[PROMPT]:
            raise SpqrError(
                f"{self.path}, line {number} answers another prompt than row {number}: give another --output"
            )


def answer_file(
    source: str,
    prompt: str | None,
    file: Path | None,
    output: Path | None,
    *,
    batch: int,
    seed: int,
    chat: bool,
    dtype: str | None,
    memory: str,
    **options: Any,
) -> dict[str, Any]:
    """Answers every prompt of a file, with progress on standard error, and returns the command's result.

    Args:
      source: the model.
      prompt: the prompt of the command line, which must be None.
      file, output: files of prompts and of answers.
      batch: prompts that are answered together.
      seed: of sampling.
      chat: put texts into the chat template.
      dtype: type to compute in; None chooses it.
      memory: on a CPU, whether matrices stay packed, see `for_decoding`.
      options: of `generate`.

    Raises:
      SpqrError: options contradict, a file cannot be used, or the model cannot be read.
    """
    if file is None or output is None:
        raise SpqrError("--prompts and --output belong together: give both files")
    if prompt is not None:
        raise SpqrError(f"give PROMPT or --prompts {file}, not both")
    _check_output(output, file)
    model, params, found = load_model(source, dtype)
    tokenizer = require(found)
    prompts = read_prompts(file, tokenizer, chat=chat)
    check_lengths(prompts, options["max_new_tokens"], model.config.max_positions)
    settings = {"model": source, "dtype": dtype, "batch": batch, "seed": seed, "chat": chat, **options}
    answers = AnswerFile(output, settings | {"ends": end_tokens(model, tokenizer)})
    done = answers.finished(prompts, batch)
    started, tokens = time.perf_counter(), 0
    if done < len(prompts):
        params = for_decoding(model, params, memory)
        steps = answer_batches(model, params, tokenizer, prompts, answers, done, batch=batch, seed=seed, **options)
        tokens = sum(console.track(steps, -(-(len(prompts) - done) // batch), "batches of prompts"))
    spent = time.perf_counter() - started
    counts = {"prompts": len(prompts), "answered_before": done, "tokens": tokens}
    return {"output": str(output), **counts, "seconds": spent, "tokens_per_second": tokens / spent if tokens else 0.0}


def answer_batches(
    model: Decoder,
    params: Params,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Prompt],
    output: AnswerFile,
    done: int,
    *,
    batch: int,
    seed: int,
    **options: Any,
) -> Iterator[int]:
    """Answers the prompts that have no answer yet, and writes each batch.

    Args:
      model: the language model.
      params: its parameters, in the form of `for_decoding`.
      tokenizer: of the model.
      prompts: all prompts.
      output: the file of answers.
      done: number of prompts that have an answer, of `AnswerFile.finished`.
      batch: prompts that are answered together.
      seed: of sampling; each batch has its own random numbers.
      options: of `generate`.

    Returns:
      An iterator over the numbers of new tokens of each batch.

    Raises:
      SpqrError: as `generate`.
    """
    for first in range(done, len(prompts), batch):
        part = prompts[first : first + batch]
        # All batches have one shape, so they share a compiled program.
        filled = [prompt.ids for prompt in (*part, *itertools.repeat(part[-1], batch - len(part)))]
        (drawn,) = np.random.SeedSequence((seed, first)).generate_state(1)
        tokens = generate(model, params, filled, seed=int(drawn), tokenizer=tokenizer, **options)[: len(part)]
        output.append(part, tokens, [decode(tokenizer, ids) for ids in tokens])
        yield sum(map(len, tokens))


def _check_output(output: Path, file: Path) -> None:
    if not output.parent.is_dir():
        raise SpqrError(f"{output} cannot be made, because {output.parent} is not a directory")
    if output.resolve() == file.resolve():
        raise SpqrError(f"--output is the file of prompts, {file}: give another file")


def _prompt(row: Any, tokenizer: PreTrainedTokenizerFast, origin: str, chat: bool) -> Prompt:
    row = {PROMPT: row} if isinstance(row, str) else row
    column = next((name for name in COLUMNS if name in row), None) if isinstance(row, dict) else None
    if column is None:
        raise SpqrError(f"{origin} is no prompt: give a string, or an object with one of {', '.join(COLUMNS)}")
    value = row[column]
    others = {name: other for name, other in row.items() if name != column}
    if isinstance(value, str):
        ids = chat_prompt(tokenizer, value) if chat else text_ids(tokenizer, value)
    elif chat:
        ids = answer_prompt(messages_of(value, f"{origin}, {column}"), tokenizer, origin)
    else:
        raise SpqrError(f"{origin} has messages, which need the chat template: leave --no-chat out")
    return Prompt({PROMPT: value} | others, ids)
