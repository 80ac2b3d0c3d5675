"""Rules on the command line: `--skip`, `--rule`, and a file of them."""

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from pallas_kernels.errors import SpqrError
from spqr_jax.config import Rules
from spqr_jax.storage.paths import absolute

Skip = Annotated[
    list[str] | None,
    typer.Option(help="Leave matrices as they are: a pattern on their names, such as layers_29.down_proj."),
]
Rule = Annotated[
    list[str] | None,
    typer.Option(help="Settings of some matrices: 'layers_0.*: bits=8, group_size=32'. The first match decides."),
]
RulesFile = Annotated[
    Path | None,
    typer.Option("--rules", parser=absolute, help="TOML file of rules, which follow those of --skip and --rule."),
]


def read_rules(skip: Sequence[str] | None, rule: Sequence[str] | None, file: Path | None) -> Rules:
    """The rules of a command: those of `--skip`, then of `--rule`, then of the file.

    Raises:
      SpqrError: a rule or the file cannot be read.

    Example:
      >>> read_rules(["layers_1.*"], ["*.q_proj: bits=8, outlier_threshold=none"], None)
      [('layers_1.*', None), ('*.q_proj', {'bits': 8, 'outlier_threshold': None})]
    """
    given = [(pattern, None) for pattern in skip or ()]
    return [*given, *map(_parse, rule or ()), *(() if file is None else _read(file))]


def _parse(text: str) -> tuple[str, dict[str, Any]]:
    pattern, _, settings = text.partition(":")
    pairs = [pair.partition("=") for pair in settings.split(",")]
    if not pattern.strip() or not all(name.strip() and value.strip() for name, _, value in pairs):
        raise SpqrError(f"--rule {text!r} cannot be read: give pattern and settings, 'layers_0.*: bits=8'")
    return pattern.strip(), {name.strip(): _value(value.strip()) for name, _, value in pairs}


def _value(text: str) -> Any:
    if text in (words := {"none": None, "null": None, "true": True, "false": False}):
        return words[text]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def _read(file: Path) -> Rules:
    """The rules of a file: tables `[[rule]]` with a `match`, and settings or `skip = true`."""
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SpqrError(f"{file} cannot be read as TOML: {error}") from None
    rules = content.pop("rule", None)
    if content or not isinstance(rules, list) or not all(isinstance(rule, dict) for rule in rules):
        raise SpqrError(f"{file} must hold tables [[rule]] and nothing else")
    return [_from_table(file, dict(rule)) for rule in rules]


def _from_table(file: Path, rule: dict[str, Any]) -> tuple[str, dict[str, Any] | None]:
    pattern, skip = rule.pop("match", None), rule.pop("skip", False)
    if not isinstance(pattern, str) or not isinstance(skip, bool) or skip == bool(rule):
        raise SpqrError(f"{file}: each [[rule]] needs a match, and either settings or skip = true; one has {rule}")
    return pattern, None if skip else {name: None if value == "none" else value for name, value in rule.items()}
