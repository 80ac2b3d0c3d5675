"""Numbers that are none, or out of their range, are refused before any work, with the option's name."""

from pathlib import Path

import pytest
from helpers.command_line import spqr

from pallas_kernels.errors import SpqrError
from spqr_jax import SpqrConfig, generate
from spqr_jax.models import Llama, LlamaConfig, RotaryConfig
from spqr_jax.search.sweep import cells

MODEL = Llama(LlamaConfig(257, 64, 128, 1, 4, 2, 16, RotaryConfig()))

QUANTIZE = {
    "--outlier-threshold": ("nan", "inf", "-inf", "-1", "-1e-9"),
    "--damping": ("nan", "inf", "-1"),
    "--shrinkage": ("nan", "inf", "-0.1"),
    "--target-size": ("nan", "-4MB", "4 XB", "MB"),
    "--target-bits": ("nan", "inf", "-4", "0", "17"),
    "--bits": ("0", "-3"),
    "--group-size": ("0", "-16"),
    "--stats-bits": ("-1",),
    "--sequences": ("0", "-1"),
    "--sequence-length": ("0", "-1"),
    "--seed": ("-1", str(2**64), str(10**400)),
}
OTHERS = {
    "generate": {
        "--max-new-tokens": ("0", "-1"),
        "--temperature": ("nan", "inf", "-1"),
        "--top-k": ("0", "-1"),
        "--top-p": ("nan", "0", "-0.5", "1.5"),
        "--seed": ("-1", str(2**64)),
    },
    "eval": {"--window": ("1", "0", "-1"), "--windows": ("0", "-1"), "--stride": ("0", "-1")},
    "compare": {"--prompts": ("0",), "--prompt-tokens": ("-1",), "--new-tokens": ("0",), "--windows": ("0",)},
    "sweep": {"--windows": ("0",), "--seed": ("-1",), "--window": ("1",), "--sequences": ("0",)},
    "analyze": {
        "--outlier-threshold": ("nan", "-1"),
        "--bits": ("0",),
        "--group-size": ("-1",),
        "--seed": (str(2**64),),
    },
    "tasks": {"--batch": ("0", "-1")},
}
CASES = [
    (command, option, value)
    for command, options in {"quantize": QUANTIZE, **OTHERS}.items()
    for option, values in options.items()
    for value in values
]
ARGUMENTS = {"quantize": 2, "generate": 2, "eval": 1, "compare": 2, "sweep": 2, "analyze": 2, "tasks": 1}


@pytest.mark.parametrize(("command", "option", "value"), CASES)
def test_a_senseless_number_is_refused_before_work(
    command: str, option: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # There is no model, and the number is refused first.
    done = spqr(command, *["nowhere", "out"][: ARGUMENTS[command]], option, value)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {option} is ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--sequences", "--seed", "--damping"])
def test_text_is_wrong_usage(option: str) -> None:
    done = spqr("quantize", "nowhere", "out", option, "many")
    assert done.returncode == 2
    assert option in done.stderr


@pytest.mark.parametrize("name", ["outlier_threshold", "damping", "shrinkage", "outlier_rows"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_settings_in_python_are_checked_too(name: str, value: float) -> None:
    with pytest.raises(SpqrError, match=f"{name} is {value}, but must be a finite number of at least 0"):
        SpqrConfig(**{name: value})  # type: ignore[arg-type]
    with pytest.raises(SpqrError, match=f"the grid's entry .* {name} is {value}"):
        cells([{"method": "spqr", name: [0.5, value]}])


def test_zero_is_a_number() -> None:
    assert SpqrConfig(outlier_threshold=0.0, damping=0.0, shrinkage=0.0).damping == 0


@pytest.mark.parametrize("seed", [-1, 2**64, 10**30])
def test_seeds_in_python_are_checked_too(seed: int) -> None:
    with pytest.raises(SpqrError, match="seed is"):
        generate(MODEL, {}, [[1]], max_new_tokens=1, temperature=1.0, seed=seed)
