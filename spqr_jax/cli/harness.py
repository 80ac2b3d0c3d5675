"""A checkpoint as a model of EleutherAI's lm-eval.

lm-eval runs models that are registered with it. This module registers one and starts lm-eval with its own arguments:

    python -m spqr_jax.cli.harness run --model spqr --model_args pretrained=smollm2-spqr --tasks piqa --batch_size 8

Source: github.com/EleutherAI/lm-evaluation-harness, version 0.4.13. Requests have the tokens of its `HFLM`, and are
truncated as there.
"""

import itertools
from collections import defaultdict
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from pallas_kernels.errors import SpqrError
from spqr_jax.cli.models import decode, load_model, require
from spqr_jax.generation import for_decoding, stream
from spqr_jax.measure.likelihood import likelihoods
from spqr_jax.prompts import chat_text, end_tokens

STOP_CHECK = 16
"""Tokens generated between two searches for the texts that end an answer."""

OPTIONS = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"}
"""Options of generation that a task may set."""


@register_model("spqr")
class SpqrLM(TemplateLM):
    """A checkpoint, packed or dense, in any form that the commands read.

    Args:
      pretrained: the checkpoint.
      batch_size: requests that run together.
      max_length: most tokens of a request; None for the model's positions.
      dtype: type of activations and of dense parameters; None for the checkpoint's own, on a CPU float32.
      memory: on a CPU, whether matrices stay packed: see `for_decoding`.
      device, max_batch_size: arguments that lm-eval passes for PyTorch, ignored here.

    Raises:
      SpqrError: the checkpoint has no tokenizer, or an argument is out of its range.

    Example:
      >>> results = lm_eval.simple_evaluate(SpqrLM("smollm2-spqr"), tasks=["piqa"])["results"]
      >>> results["piqa"]["acc,none"]
    """

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 8,
        max_length: int | None = None,
        dtype: str | None = None,
        memory: str = "auto",
        device: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise SpqrError(f"batch_size is {batch_size}, but must be a number of at least 1")
        self.batch_size = int(batch_size)
        model, params, tokenizer = load_model(pretrained, dtype)
        self.model, self.tokenizer = model, require(tokenizer)
        positions = self.model.config.max_positions
        self.max_length = positions if max_length is None else max_length
        if not 1 <= self.max_length <= positions:
            raise SpqrError(f"max_length is {max_length}, but must be at least 1 and at most the model's {positions}")
        self.params = for_decoding(self.model, params, memory)

    @property
    def eot_token_id(self) -> int | None:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without a context."""
        start = self.tokenizer.bos_token_id
        first = self.eot_token_id if start is None else start
        if first is None:
            raise SpqrError(
                "the tokenizer has no token for the start or the end of a text, but the task needs one: set bos_token"
            )
        return first

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return chat_text(
            self.tokenizer,
            chat_history,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        if add_special_tokens is None:
            add_special_tokens = not has_bos_prefix(string, self.tokenizer.bos_token)
        return self.tokenizer(string, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = [self._shortened(context, continuation) for _, context, continuation in requests]
        found = likelihoods(self.model, self.params, pairs, batch_size=self.batch_size)
        answers: dict[int, tuple[float, bool]] = {}
        for index, likelihood in tqdm(found, "loglikelihood", len(pairs), disable=disable_tqdm):
            answers[index] = tuple(likelihood)
            if (texts := requests[index][0]) is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answers[index])
        return [answers[index] for index in range(len(pairs))]

    def _shortened(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """The context, truncated at its start to fit `max_length`; the last token of a request is never run."""
        room = self.max_length + 1 - len(continuation)
        if room < 1:
            raise SpqrError(
                f"a continuation of {len(continuation)} tokens is too long for max_length {self.max_length}: raise it"
            )
        return context[-room:], continuation

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        windows: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for index, request in enumerate(requests):
            (text,) = request.args
            tokens = self.tok_encode(text)
            cut = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            for context, continuation in map(make_disjoint_window, cut):
                windows.append((None, context, continuation))
                owners.append(index)
        totals = [0.0] * len(requests)
        for owner, (log, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[owner] += log
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        alike = defaultdict(list)
        for index, request in enumerate(requests):
            alike[repr(request.args[1])].append(index)
        answers: dict[int, str] = {}
        seeds = itertools.count()
        with tqdm(total=len(requests), desc="generate_until", disable=disable_tqdm) as progress:
            for indices in alike.values():
                options = requests[indices[0]].args[1]
                prompts = {index: self.tok_encode(requests[index].args[0]) for index in indices}
                indices.sort(key=lambda index: -len(prompts[index]))
                size = min(self.batch_size, len(indices))
                for start in range(0, len(indices), size):
                    batch = indices[start : start + size]
                    # All batches have one shape, so they share a compiled program.
                    filled = batch + batch[-1:] * (size - len(batch))
                    texts = self._write([prompts[index] for index in filled], options, next(seeds))
                    for index, text in zip(batch, texts, strict=False):
                        answers[index] = text
                        self.cache_hook.add_partial("generate_until", requests[index].args, text)
                    progress.update(len(batch))
        return [answers[index] for index in range(len(requests))]

    def _write(self, prompts: list[list[int]], options: dict[str, Any], seed: int) -> list[str]:
        """The model's answer to each prompt, up to the first text that ends it."""
        asked = normalize_gen_kwargs(options)
        if unknown := asked.keys() - OPTIONS:
            known = ", ".join(sorted(OPTIONS))
            raise SpqrError(f"a task asks for generation with {', '.join(sorted(unknown))}, but supported are {known}")
        room = self.max_length - asked["max_gen_toks"]
        if room < 1:
            raise SpqrError(
                f"{asked['max_gen_toks']} new tokens (max_gen_toks) leave no room for a prompt in a max_length of "
                f"{self.max_length}: raise it"
            )
        ends = end_tokens(self.model, self.tokenizer)
        last = None if self.eot_token_id is None else decode(self.tokenizer, [self.eot_token_id], special=True)
        until = handle_stop_sequences(asked["until"], last)
        chunks = stream(
            self.model,
            self.params,
            [prompt[-room:] for prompt in prompts],
            max_new_tokens=asked["max_gen_toks"],
            temperature=asked.get("temperature", 0.0),
            top_k=asked.get("top_k"),
            top_p=asked.get("top_p"),
            seed=seed,
            stop_tokens=ends,
            chunk=STOP_CHECK,
        )
        written: list[list[int]] = [[] for _ in prompts]
        texts: list[str] = []
        for chunk in chunks:
            written = [tokens + new for tokens, new in zip(written, chunk, strict=True)]
            texts = [decode(self.tokenizer, tokens) for tokens in written]
            stopped = (len(new) < STOP_CHECK for new in chunk)
            if all(over or any(stop in text for stop in until) for text, over in zip(texts, stopped, strict=True)):
                break
        return [postprocess_generated_text(text, until, think_end_token=None) for text in texts]


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
