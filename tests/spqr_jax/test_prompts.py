"""Prompts in every form are the same prompt, and chat templates may fail in any way."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny_llama
from helpers.byte_tokenizer import byte_tokenizer
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from pallas_kernels.errors import SpqrError
from spqr_jax.generation import generate
from spqr_jax.models.generation_options import GenerationOptions
from spqr_jax.prompts import chat_prompt, end_tokens, prompt_ids, text_ids

LISTS = [[1, 2, 3], [4, 5, 6]]


def with_bos(template: str | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer that puts the token of `^` before a text."""
    tokenizer = byte_tokenizer()
    (start,) = tokenizer("^")["input_ids"]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="^ $A", pair="^ $A $B", special_tokens=[("^", start)]
    )
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    "prompts",
    [
        np.array(LISTS),
        np.array(LISTS, np.uint8),
        jnp.array(LISTS),
        [np.array(row) for row in LISTS],
        [jnp.array(row) for row in LISTS],
        tuple(map(tuple, LISTS)),
    ],
    ids=lambda prompts: type(prompts).__name__,
)
def test_arrays_are_lists(prompts: Any) -> None:
    assert prompt_ids(prompts) == LISTS
    params = tiny_llama.tiny_params(0)
    expected = generate(tiny_llama.MODEL, params, LISTS, max_new_tokens=3)
    assert generate(tiny_llama.MODEL, params, prompts, max_new_tokens=3) == expected


def test_arrays_of_pytorch() -> None:
    torch = pytest.importorskip("torch")
    assert prompt_ids([torch.tensor(row) for row in LISTS]) == LISTS


@pytest.mark.parametrize("prompt", [[1, 2, 3], (1, 2, 3), np.array([1, 2, 3]), jnp.array([1, 2, 3])])
def test_one_prompt_may_stand_alone(prompt: Any) -> None:
    assert prompt_ids(prompt) == [[1, 2, 3]]


@pytest.mark.parametrize(
    ("prompts", "named"),
    [
        (np.array([[1.0, 2.5]]), "prompt 0: .*have type float64"),
        ([[1, 2], [True, False]], "prompt 1: .*have type bool"),
        (np.zeros((1, 2, 3), int), r"shape \[2, 3\]"),
        (["text"], "prompt 0 is a text, which needs a tokenizer"),
        ("text", "needs a tokenizer"),
        ([["a", "b"]], "prompt 0: .*have type <U1"),
    ],
)
def test_what_is_no_prompt(prompts: Any, named: str) -> None:
    with pytest.raises(SpqrError, match=named):
        prompt_ids(prompts)


@pytest.mark.parametrize("prompts", [[], [[]], [[1], []], np.zeros((1, 0), int), np.zeros((0, 3), int)])
def test_empty_prompts(prompts: Any) -> None:
    with pytest.raises(SpqrError, match=r"empty|no prompts"):
        generate(tiny_llama.MODEL, tiny_llama.tiny_params(0), prompts, max_new_tokens=1)


def test_texts_have_the_special_tokens_of_their_tokenizer() -> None:
    tokenizer = with_bos()
    expected = tokenizer("hi")["input_ids"]
    assert len(expected) == 3
    assert prompt_ids(["hi", "hi"], tokenizer) == [expected] * 2
    assert prompt_ids("hi", tokenizer) == [expected]
    # Without a template a message is a text.
    assert chat_prompt(tokenizer, "hi") == text_ids(tokenizer, "hi") == expected


def test_a_template_puts_its_own_special_tokens() -> None:
    tokenizer = with_bos("^^{{ messages[0].content }}")
    conversation = [{"role": "user", "content": "hi"}]
    assert chat_prompt(tokenizer, "hi") == tokenizer.apply_chat_template(conversation, return_dict=False)
    assert tokenizer.decode(chat_prompt(tokenizer, "hi")) == "^^hi"


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('a system message must come first') }}",
        "{% if %}",
        "{{ messages + 1 }}",
        "{{ 1 / 0 }}",
        "{{ messages[0].content.absent.absent }}",
        "{{ absent() }}",
        "{% include 'absent' %}",
        "{{ messages.append(1) }}",
        {"rag": "{{ 1 }}"},
    ],
)
def test_a_template_that_fails_is_one_line(template: Any) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(SpqrError, match="the tokenizer's chat template cannot be used"):
        chat_prompt(tokenizer, "hi")


def test_a_text_ends_at_every_end() -> None:
    model = tiny_llama.MODEL.clone(generation=GenerationOptions.of({"eos_token_id": [7, 9]}))
    assert model == tiny_llama.MODEL
    assert end_tokens(model) == (7, 9)
    assert end_tokens(model, byte_tokenizer()) == (7, 9, byte_tokenizer().eos_token_id)
    params = tiny_llama.tiny_params(0)
    free = generate(tiny_llama.MODEL, params, LISTS, max_new_tokens=12)
    stop = free[0][3]
    ended = tiny_llama.MODEL.clone(generation=GenerationOptions.of({"eos_token_id": [60, stop]}))
    expected = [row[: row.index(stop)] if stop in row else row for row in free]
    assert generate(ended, params, LISTS, max_new_tokens=12) == expected
    assert generate(ended, params, LISTS, max_new_tokens=12, stop_tokens=()) == free


@pytest.mark.parametrize("value", ["2", 2.0, True, [2, "3"], {"a": 1}, [[2]]])
def test_ends_that_are_no_ids(value: Any) -> None:
    with pytest.raises(SpqrError, match=r"eos_token_id is .* token id or a list"):
        GenerationOptions.of({"eos_token_id": value})
