"""Answers to the prompts of a file: those of single prompts, and the same after an interruption."""

import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from helpers.byte_tokenizer import byte_tokenizer
from helpers.command_line import result, spqr

from spqr_jax import save
from spqr_jax.cli import answers
from spqr_jax.models import Llama, LlamaConfig, RotaryConfig

CONFIG = LlamaConfig(257, 64, 128, 2, 4, 2, 16, RotaryConfig())
PROMPTS = [f"Prompt number {i}" + ", and more" * (i % 3) for i in range(5)]
OPTIONS = ("--max-new-tokens", 6, "--batch", 2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("answers") / "model"
    decoder = Llama(CONFIG)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    save(directory, decoder, decoder.init(jax.random.key(0), jnp.zeros((1, 4), int))["params"], tokenizer=tokenizer)
    return directory


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt, "id": i}) + "\n" for i, prompt in enumerate(PROMPTS)))
    return file


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.slow
def test_answers_are_those_of_single_prompts(model: Path, prompts: Path, tmp_path: Path) -> None:
    output = tmp_path / "answers.jsonl"
    counts = result("generate", model, "--prompts", prompts, "--output", output, *OPTIONS)
    found = rows(output)
    assert [(row["prompt"], row["id"]) for row in found] == [(prompt, i) for i, prompt in enumerate(PROMPTS)]
    alone = result("generate", model, PROMPTS[1], "--max-new-tokens", 6)
    assert (found[1]["text"], found[1]["tokens"]) == (alone["text"], alone["tokens"])
    tokens = sum(len(row["tokens"]) for row in found)
    assert (counts["prompts"], counts["answered_before"], counts["tokens"]) == (5, 0, tokens)
    again = result("generate", model, "--prompts", prompts, "--output", output, *OPTIONS)
    assert (again["answered_before"], again["tokens"]) == (5, 0)
    assert rows(output) == found


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [(), ("--temperature", 1.5, "--seed", 3)])
def test_an_interrupted_command_resumes(model: Path, prompts: Path, tmp_path: Path, sampling: tuple) -> None:
    command = ("generate", model, "--prompts", prompts, *OPTIONS, *sampling, "--output")
    result(*command, tmp_path / "whole.jsonl")
    whole = (tmp_path / "whole.jsonl").read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for name, cut, kept in (("line", ends[2] - 7, 2), ("batch", ends[1], 2), ("three", ends[2], 2), ("begun", 3, 0)):
        (tmp_path / name).write_bytes(whole[:cut])
        assert result(*command, tmp_path / name)["answered_before"] == kept
        assert (tmp_path / name).read_bytes() == whole


@pytest.mark.parametrize(
    ("content", "prompt"),
    [
        ('"Why?"\n"How?"\n', "Why?"),
        ('{"text": "Why?"}', "Why?"),
        ('{"messages": [{"role": "user", "content": "Why?"}]}', [{"role": "user", "content": "Why?"}]),
        ('{"conversations": [{"from": "human", "value": "Why?"}]}', [{"from": "human", "value": "Why?"}]),
    ],
)
def test_forms_of_prompts(content: str, prompt: object, model: Path, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(content)
    result("generate", model, "--prompts", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl", *OPTIONS)
    first = rows(tmp_path / "out.jsonl")[0]
    assert first["prompt"] == prompt
    assert first["tokens"] == result("generate", model, "Why?", "--max-new-tokens", 6)["tokens"]


def test_half_a_character_is_replaced(model: Path, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('"Why \\ud83d?"\n')
    result("generate", model, "--prompts", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl", *OPTIONS)
    assert rows(tmp_path / "out.jsonl")[0]["prompt"] == "Why \N{REPLACEMENT CHARACTER}?"


def other_options(answers: str) -> str:
    return answers.replace('"run": "', '"run": "0')


def other_prompts(answers: str) -> str:
    return answers.replace("number 0", "number 9")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_options, "line 1 is the answer of another model or of other options"),
        (other_prompts, "line 1 answers another prompt than row 1"),
        (lambda answers: "The sky\n", "line 1 is no answer of this command"),
        (lambda answers: '{"text": "a"}\n', "line 1 is no answer of this command"),
        (lambda answers: answers + answers, "line 6 answers another prompt than row 6"),
    ],
)
def test_a_file_of_something_else_stays(
    change: Callable[[str], str], message: str, model: Path, prompts: Path, tmp_path: Path
) -> None:
    output = tmp_path / "answers.jsonl"
    command = ("generate", model, "--prompts", prompts, "--output", output, *OPTIONS)
    result(*command)
    changed = change(output.read_text())
    output.write_text(changed)
    done = spqr(*command)
    assert done.returncode == 1
    assert message in done.stderr
    assert output.read_text() == changed


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        ('"a"', ("--output",), "--output is the file of prompts"),
        ('"a"', ("hello", "--output", "out"), "give PROMPT or --prompts"),
        ('"a"', (), "--prompts and --output belong together"),
        ('"a"', ("--output", "none/out"), "none is not a directory"),
        ('"a"', ("--output", "out", "--batch", 0), "--batch is 0, but must be at least 1"),
        ("", ("--output", "out"), "has no prompts"),
        ("[1]", ("--output", "out"), "row 1 is no prompt"),
        ('{"question": "a"}', ("--output", "out"), "row 1 is no prompt"),
        ('"a"\n"', ("--output", "out"), "line 2: not JSON"),
        ('"a"\n{"prompt": 5}', ("--output", "out"), "row 2, prompt must be a list of messages"),
        ('{"prompt": []}', ("--output", "out", "--no-chat"), "row 1 has messages, which need the chat template"),
        ('"a"\n""', ("--output", "out", "--no-chat"), "the prompt of row 2 is empty"),
        ('"a"\n"%s"' % ("b" * 3000), ("--output", "out"), "the prompt of row 2 has 3006 tokens"),
    ],
)
def test_errors_come_before_work(
    content: str,
    arguments: tuple,
    message: str,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(answers, "generate", None)
    Path("in.jsonl").write_text(content)
    if arguments == ("--output",):
        arguments = ("--output", "in.jsonl")
    done = spqr("generate", model, *arguments, "--prompts", "in.jsonl")
    assert done.returncode == 1
    assert message in done.stderr
    assert not Path("out").exists()


def test_without_a_prompt(model: Path) -> None:
    assert "there is no prompt" in spqr("generate", model).stderr
