"""Conversations with a model: the turns it sees, and commands."""

import io
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from helpers.byte_tokenizer import byte_tokenizer
from helpers.command_line import Done, spqr

from spqr_jax import generate, load, save
from spqr_jax.models import Llama, LlamaConfig, RotaryConfig

CONFIG = LlamaConfig(257, 64, 128, 2, 4, 2, 16, RotaryConfig(), max_positions=160)
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("chat") / "model", TEMPLATE)


def write_model(directory: Path, template: str | None) -> Path:
    decoder = Llama(CONFIG)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    save(directory, decoder, decoder.init(jax.random.key(0), jnp.zeros((1, 4), int))["params"], tokenizer=tokenizer)
    return directory


def talk(model: Path, said: str, monkeypatch: pytest.MonkeyPatch, *options: object) -> Done:
    monkeypatch.setattr(sys, "stdin", io.StringIO(said))
    return spqr("chat", model, "--max-new-tokens", 5, *options)


def answer(model: Path, prompt: str) -> str:
    decoder, params, tokenizer = load(model)
    (tokens,) = generate(decoder, params, [tokenizer.encode(prompt)], max_new_tokens=5)
    return tokenizer.decode(tokens, skip_special_tokens=True)


@pytest.mark.slow
def test_the_model_sees_all_turns_until_a_reset(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = talk(model, "Hi\n\nWhy?\n/reset\nWhy?", monkeypatch, "--json")
    assert done.returncode == 0
    assert done.stderr.splitlines() == ["new conversation"]
    texts = [json.loads(line)["text"] for line in done.stdout.splitlines()]
    first = answer(model, "<user>Hi<assistant>")
    second = answer(model, f"<user>Hi<assistant>{first}<user>Why?<assistant>")
    assert texts == [first, second, answer(model, "<user>Why?<assistant>")]


def test_answers_are_shown(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = talk(model, "Hi\n", monkeypatch).stdout
    text = json.loads(talk(model, "Hi\n", monkeypatch, "--json").stdout)["text"]
    assert shown.rstrip("\n") == text.rstrip("\N{REPLACEMENT CHARACTER}").rstrip("\n")


def test_a_conversation_that_is_too_long_goes_on_without_the_message(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = talk(model, f"{'a' * 160}\nHi\n", monkeypatch, "--json")
    assert done.returncode == 0
    assert "has 177 tokens with this message, but the model takes 160" in done.stderr
    assert json.loads(done.stdout)["text"] == answer(model, "<user>Hi<assistant>")


def test_without_a_chat_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = talk(write_model(tmp_path / "model", None), "Hi\n", monkeypatch)
    assert (done.returncode, "has no chat template: use spqr generate" in done.stderr) == (1, True)
