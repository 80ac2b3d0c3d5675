"""Errors of the command line: one line for a user's fault, a bug that says so, and the extra of a missing package."""

import json
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.byte_tokenizer import byte_tokenizer
from helpers.command_line import spqr

from pallas_kernels.errors import SpqrError
from spqr_jax import save
from spqr_jax.cli import NEEDED, console
from spqr_jax.cli.calibration import calibration_tokens
from spqr_jax.models import Llama, LlamaConfig, RotaryConfig

ROOT = Path(__file__).parents[3]
CONFIG = LlamaConfig(257, 64, 128, 2, 4, 2, 16, RotaryConfig())


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("errors") / "plain"
    model = Llama(CONFIG)
    params = model.init(jax.random.key(0), jnp.zeros((1, 4), int))["params"]
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    save(directory, model, params, tokenizer=tokenizer)
    return directory


def write_files(root: Path) -> None:
    (root / "latin.txt").write_bytes("caf\xe9".encode("latin-1") * 999)
    (root / "damaged.npy").write_bytes(b"\x93NUMPY\x01\x00nonsense")
    (root / "empty.npy").write_bytes(b"")
    np.save(root / "pickled.npy", np.array([{}]), allow_pickle=True)
    np.save(root / "floats.npy", np.zeros((4, 64)))
    np.save(root / "fractions.npy", np.full((4, 64), 0.7, np.float16))
    np.save(root / "booleans.npy", np.ones((4, 64), bool))
    np.save(root / "times.npy", np.ones((4, 64), "m8[s]"))
    np.save(root / "negative.npy", np.full((4, 64), -1))
    np.save(root / "line.npy", np.zeros(256, int))
    np.save(root / "huge.npy", np.full((4, 64), 2**32))
    (root / "rows.jsonl").write_text('{"url": "a"}')
    (root / "chat.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}')
    (root / "damaged.json").write_text('[{"method": ')
    (root / "object.json").write_text('{"method": "spqr"}')
    (root / "string.json").write_text('["spqr"]')
    (root / "method.json").write_text('[{"method": "awq"}]')
    (root / "type.json").write_text('[{"method": "spqr", "damping": ["0.1"]}]')


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("quantize", "plain", "new", "--calibration", "latin.txt"), "latin.txt is not a text in UTF-8: byte 0xe9"),
        (("quantize", "plain", "new", "--calibration", "damaged.npy"), "damaged.npy is not an array of NumPy"),
        (("quantize", "plain", "new", "--calibration", "empty.npy"), "empty.npy is not an array of NumPy"),
        (("quantize", "plain", "new", "--calibration", "pickled.npy"), "pickled.npy is not an array of NumPy"),
        (("quantize", "plain", "new", "--calibration", "floats.npy"), "floats.npy has float64 of shape [4, 64]"),
        (("quantize", "plain", "new", "--calibration", "fractions.npy"), "fractions.npy has float16 of shape [4, 64]"),
        (("quantize", "plain", "new", "--calibration", "booleans.npy"), "booleans.npy has bool of shape [4, 64]"),
        (("quantize", "plain", "new", "--calibration", "times.npy"), "times.npy has timedelta64[s] of shape [4, 64]"),
        (("quantize", "plain", "new", "--calibration", "line.npy"), "line.npy has int64 of shape [256]"),
        (("quantize", "plain", "new", "--calibration", "huge.npy"), "huge.npy: token id 4294967296 exceeds 32 bits"),
        (("quantize", "plain", "new", "--calibration", "negative.npy"), "token id -1 is outside the vocabulary"),
        (("quantize", "plain", "new", "--calibration", "rows.jsonl"), "rows.jsonl, row 1 has the columns url"),
        (("quantize", "plain", "new", "--calibration", "chat.jsonl"), "rendered by the chat template: no system role"),
        (("quantize", "plain", "new", "--calibration", "nowhere.txt"), "nowhere.txt is neither a file nor one of"),
        (("eval", "plain", "--text", "fractions.npy"), "fractions.npy has float16"),
        (("compare", "plain", "plain", "--text", "rows.jsonl"), "rows.jsonl, row 1 has the columns url"),
        (("quantize", "plain", "new", "--sequences", 0), "--sequences is 0, but must be at least 1"),
        (("quantize", "plain", "new", "--sequence-length", -1), "--sequence-length is -1, but must be at least 1"),
        (("quantize", "plain", "new", "--seed", -1), "--seed is -1, but must be at least 0"),
        (("eval", "plain", "--text", "latin.txt"), "latin.txt is not a text in UTF-8"),
        (("eval", "plain", "--text", "."), "Is a directory"),
        (("compare", "plain", "plain", "--prompts", 0), "--prompts is 0, but must be at least 1"),
        (("compare", "plain", "plain", "--prompt-tokens", 0), "--prompt-tokens is 0, but must be at least 1"),
        (("sweep", "plain", "new", "--grid", "damaged.json"), "damaged.json is not JSON"),
        (("sweep", "plain", "new", "--grid", "object.json"), "object.json is no list of settings"),
        (("sweep", "plain", "new", "--grid", "string.json"), "'spqr' is no object of settings"),
        (("sweep", "plain", "new", "--grid", "method.json"), "has method 'awq': give spqr or gptq or rtn"),
        (("sweep", "plain", "new", "--grid", "type.json"), "has damping '0.1': give float"),
        (("sweep", "plain", "new", "--grid", "latin.txt"), "latin.txt is not a text in UTF-8"),
        (("generate", "plain", "hi"), "chat template cannot be used (no system role): use --no-chat"),
        (("generate", "plain", "hi", "--no-chat", "--temperature", -1), "temperature"),
        (("tasks", "plain", "--include-path", "nowhere"), "nowhere is not a directory"),
    ],
)
def test_a_users_fault_is_one_line(
    arguments: tuple[object, ...], message: str, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(console.TRACEBACK, raising=False)
    done = spqr(*(plain if argument == "plain" else argument for argument in arguments))
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()[-1:]
    assert line.startswith("error: ")
    assert message in line
    assert "internal error" not in line
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "new").exists()


def test_token_ids_are_read_as_they_are(tmp_path: Path) -> None:
    ids = np.arange(256, dtype=np.uint16).reshape(4, 64)
    np.save(tmp_path / "ids.npy", ids)
    tokens = calibration_tokens(None, [str(tmp_path / "ids.npy")], 99, 99, 99)
    np.testing.assert_array_equal(tokens, ids)
    assert tokens.dtype == np.int32


def raises(error: BaseException) -> Callable[[], None]:
    def command() -> None:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (SpqrError("bits is 6,\n  but can be 3"), "bits is 6, but can be 3"),
        (FileNotFoundError(2, "No such file or directory", "a"), "[Errno 2] No such file or directory: 'a'"),
        (
            ValueError("cannot\nbroadcast"),
            "internal error: ValueError: cannot broadcast; set SPQR_TRACEBACK=1 for the traceback, and report it",
        ),
        (
            KeyError("q_proj"),
            "internal error: KeyError: 'q_proj'; set SPQR_TRACEBACK=1 for the traceback, and report it",
        ),
        (
            ModuleNotFoundError("No module named 'gguf'", name="gguf"),
            'gguf is not installed: pip install "spqr-jax[models]"',
        ),
        (
            ModuleNotFoundError("No module named 'torch.nn'", name="torch.nn"),
            'torch is not installed: pip install "spqr-jax[torch]"',
        ),
        (
            ModuleNotFoundError("No module named 'spqr_jax.nothing'", name="spqr_jax.nothing"),
            "internal error: ModuleNotFoundError: No module named 'spqr_jax.nothing'; set SPQR_TRACEBACK=1 for the "
            "traceback, and report it",
        ),
        (MemoryError(), "out of memory: this process cannot allocate more"),
        (RuntimeError("Unable to initialize backend 'moon'"), "Unable to initialize backend 'moon'"),
        (RuntimeError("RESOURCE_EXHAUSTED: 2 GB"), "out of memory on the device: RESOURCE_EXHAUSTED: 2 GB"),
    ],
)
def test_every_error_is_one_line_and_its_traceback_is_asked_for(
    error: Exception, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(console.TRACEBACK, raising=False)
    with pytest.raises(SystemExit, match="1"):
        console.run(raises(error))
    assert capsys.readouterr().err == f"error: {line}\n"
    monkeypatch.setenv(console.TRACEBACK, "1")
    with pytest.raises(SystemExit, match="1"):
        console.run(raises(error))
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback (most recent call last):")
    assert shown.endswith(f"error: {line}\n")


def test_an_interrupted_command_exits_with_130(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="130"):
        console.run(raises(KeyboardInterrupt()))
    assert capsys.readouterr().err == "interrupted\n"


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("missing", [["typer"], ["flax", "transformers"], list(NEEDED)])
def test_missing_packages_are_one_line(missing: list[str]) -> None:
    code = f"import sys; sys.modules |= dict.fromkeys({missing}); from spqr_jax.cli import main; main()"
    done = python(code, "quantize", "a", "b")
    assert done.returncode == 1
    assert done.stderr == f'error: spqr needs {", ".join(missing)}: pip install "spqr-jax[models]"\n'


def test_public_names_name_the_extra_too() -> None:
    done = python("import sys; sys.modules['flax'] = None; from spqr_jax import quantize")
    last = done.stderr.splitlines()[-1]
    assert last == 'ModuleNotFoundError: spqr_jax.quantize needs flax: pip install "spqr-jax[models]"'


def test_what_the_command_needs_is_the_extra_models() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extra = {need.partition(">=")[0] for need in project["optional-dependencies"]["models"]}
    assert {name.replace("_", "-").replace("orbax", "orbax-checkpoint") for name in NEEDED} == extra


def test_starting_the_command_imports_no_model() -> None:
    code = (
        "import json, sys; sys.argv[1:] = ['--version']; from spqr_jax.cli import main\n"
        "try: main()\n"
        "except SystemExit: print(json.dumps([name for name in ('flax', 'transformers') if name in sys.modules]))"
    )
    version, modules = python(code).stdout.splitlines()
    assert version.startswith("spqr-jax ")
    assert json.loads(modules) == []
