"""The command line, on a tiny checkpoint."""

import io
import json
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from unittest import mock

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.byte_tokenizer import byte_tokenizer
from helpers.command_line import result, spqr
from helpers.tiny_models import random_tensors, tiny_config, write_checkpoint, write_gguf
from rich.console import Console

from spqr_jax import COMPACT, save
from spqr_jax.cli import console, progress
from spqr_jax.cli.app import COMMANDS
from spqr_jax.config import SMALL
from spqr_jax.models import Llama, LlamaConfig, RotaryConfig
from spqr_jax.storage import partial_run
from spqr_jax.storage.record import BlockReport, read_record

CONFIG = LlamaConfig(257, 64, 128, 2, 4, 2, 16, RotaryConfig())


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("cli") / "plain"
    model = Llama(CONFIG)
    params = model.init(jax.random.key(0), jnp.zeros((1, 4), int))["params"]
    save(directory, model, params, tokenizer=byte_tokenizer())
    return directory


@pytest.fixture(scope="module")
def quantized(plain: Path) -> Path:
    directory = plain.parent / "quantized"
    options = "--preset", "paper", "--sequences", 4, "--sequence-length", 64
    assert spqr("quantize", plain, directory, *options).returncode == 0
    return directory


def test_help_of_every_command_has_an_example() -> None:
    for command in COMMANDS:
        done = spqr(command, "--help")
        assert done.returncode == 0
        assert f"Example: spqr {command} " in " ".join(done.stdout.split())


def test_quantize_reports_and_saves(plain: Path, tmp_path: Path) -> None:
    arguments = ("--sequences", 4, "--sequence-length", 64, "--bits", 4, "--method", "gptq")
    report = result("quantize", plain, tmp_path / "out", *arguments)
    assert report["outlier_share"] == 0
    # 4 bits, 6/64 of first-level and 4·16/2048 of second-level statistics, and the permutations.
    assert 4.124 < report["bits_per_weight"] < 4.125 + 16 / 32 + 0.01
    assert report["bytes_on_disk"] == sum(p.stat().st_size for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert set(report["matrices"]["layers_1.v_proj"]) == {
        "bits_per_weight",
        "outlier_share",
        "relative_error",
        "seconds",
    }
    inspected = result("inspect", tmp_path / "out")
    assert inspected["matrices"]["layers_1.v_proj.kernel"]["bits"] == 4
    for name, value in inspected["sizes"].items():
        assert report[name] == value
    # Embedding and head are in 8 bits, norms in 32.
    assert inspected["matrices"]["lm_head.kernel"]["bits"] == 8
    assert report["bits_per_weight"] < report["bits_per_parameter"] < 32
    record = read_record(tmp_path / "out")
    assert record is not None
    assert record.sizes is not None
    assert record.sizes["bits_per_parameter"] == report["bits_per_parameter"]
    assert len(report["seconds_per_block"]) == 2


@pytest.mark.slow
def test_where_nobody_watches_progress_is_lines(plain: Path, tmp_path: Path) -> None:
    arguments = ("--sequences", 4, "--sequence-length", 64, "--hidden-on-disk")
    done = spqr("quantize", plain, tmp_path / "out", *arguments, "--json")
    report = json.loads(done.stdout)
    lines = done.stderr.splitlines()
    assert len(lines) == 4 + len(report["matrices"])
    seconds = report["seconds_per_block"]
    assert lines[0] == f"block 1 of 2: {seconds[0]:.1f} s per block, 0:00:{round(seconds[0]):02} left"
    assert lines[8] == f"block 2 of 2: {seconds[1]:.1f} s per block, 0:00:00 left"
    assert re.fullmatch(r"embed_tokens: \d+\.\d s", lines[16])
    matrix = report["matrices"]["layers_0.q_proj"]
    error, share = f"{matrix['relative_error']:.2e}", f"{matrix['outlier_share']:.2%}"
    assert lines[1] == f"  layers_0.q_proj: error {error}, outliers {share}"


def test_on_a_terminal_progress_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(console, "console", Console(file=screen, force_terminal=True, width=100))
    with progress.track_blocks(22) as show:
        show(BlockReport(7, 41.25, {}))
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue())
    for part in ("quantizing blocks", "━", "7/22 41.2 s per block, 0:10:19 left"):
        assert part in shown


@pytest.mark.slow
def test_a_stopped_command_goes_on_where_it_was(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("quantize", plain, tmp_path / "out", "--sequences", 4, "--sequence-length", 64)
    with monkeypatch.context() as patch:
        patch.setattr(partial_run, "publish", mock.Mock(side_effect=OSError("No space left on device")))
        done = spqr(*arguments)
    assert done.returncode == 1
    assert "4 parts are finished: make room and repeat the command to resume" in done.stderr
    refused = spqr(*arguments, "--bits", 3)
    assert refused.returncode == 1
    assert "unfinished run with config.bits 4, not 3" in refused.stderr
    done = spqr(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert result("inspect", tmp_path / "out")["matrices"]["layers_1.v_proj.kernel"]["bits"] == 4


@pytest.mark.slow
def test_round_to_nearest_needs_no_text(plain: Path, tmp_path: Path) -> None:
    report = result("quantize", plain, tmp_path / "out", "--method", "rtn", "--stats-bits", 0)
    assert report["bits_per_weight"] == 4 + 32 / 64


@pytest.mark.slow
def test_eval_reads_plain_and_quantized_models(plain: Path, quantized: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    before, after = (result("eval", path, "--text", text, "--window", 128) for path in (plain, quantized))
    assert before["tokens"] == after["tokens"] == 896
    assert after["perplexity"] == pytest.approx(before["perplexity"], rel=0.2)
    assert "bits_per_weight" not in before
    assert 3.6 < after["bits_per_weight"] < 5


def test_windows_of_eval_may_overlap(plain: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 5)
    found = result("eval", plain, "--text", text, "--window", 128, "--stride", 64)
    assert found["tokens"] == 225


@pytest.mark.slow
def test_compare_finds_a_model_equal_to_itself(plain: Path, quantized: Path) -> None:
    sizes = ("--window", 64, "--windows", 3, "--prompts", 2, "--prompt-tokens", 16, "--new-tokens", 8)
    same, other = (result("compare", plain, path, *sizes) for path in (plain, quantized))
    assert same["kl_divergence"] == pytest.approx(0, abs=1e-6)
    assert (same["top1_agreement"], same["agreement_length"], same["tokens"], same["prompts"]) == (1, 8, 192, 2)
    assert same["perplexity_of_own_text"] == same["perplexity_of_original_text"]
    assert other["kl_divergence"] > 1e-4
    assert other["top1_agreement"] < 1
    assert other["perplexity_of_original_text"] == same["perplexity_of_original_text"]


@pytest.mark.slow
def test_generate_prints_text_as_it_says_in_json(quantized: Path) -> None:
    said = spqr("generate", quantized, "hello", "--max-new-tokens", 12)
    told = result("generate", quantized, "hello", "--max-new-tokens", 12)
    assert len(told["tokens"]) <= 12
    assert said.stdout.rstrip("\n") == told["text"].rstrip("\N{REPLACEMENT CHARACTER}").rstrip("\n")


@pytest.mark.slow
def test_analyze_writes_measures_and_pictures(plain: Path, tmp_path: Path) -> None:
    sizes = ("--sequences", 4, "--sequence-length", 64)
    told = result("analyze", plain, tmp_path / "out", *sizes, "--layers", "layers_0.q_proj, layers_1.*n_proj")
    assert told.pop("destination") == str(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "sensitivity.json").read_text()) == told
    assert [told["config"][name] for name in ("bits", "group_size", "outlier_threshold")] == [3, 16, 0.2]
    assert list(told["matrices"])[:4] == [f"layers_0.{kind}" for kind in ("q_proj", "k_proj", "v_proj", "o_proj")]
    assert len(told["matrices"]) == 14
    for name, matrix in told["matrices"].items():
        assert name == f"layers_{matrix['depth']}.{matrix['kind']}"
        assert matrix["mean"] > 0
        assert matrix["error_left"][0] == 1 > matrix["error_left"][-1]
        assert (matrix["rotary_period"] is None) == (matrix["kind"] in ("gate_proj", "up_proj", "down_proj"))
    drawn = {path.stem for path in (tmp_path / "out").glob("*.png")}
    assert drawn == {"layers_0.q_proj", "layers_1.down_proj", "patterns", "errors"}


@pytest.mark.slow
def test_analyze_shows_the_means_of_each_kind(plain: Path, tmp_path: Path) -> None:
    done = spqr("analyze", plain, tmp_path / "out", "--sequences", 4, "--sequence-length", 64, "--bits", 4)
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "out" / "sensitivity.json").read_text())
    first, second = (told["matrices"][f"layers_{depth}.down_proj"]["unstructured"] for depth in (0, 1))
    (line,) = [line.split() for line in done.stdout.splitlines() if line.split()[:1] == ["down_proj"]]
    assert line[4] == f"{(first + second) / 2:.3f}"
    # Without --layers, those of the middle block are drawn.
    drawn = {path.stem for path in (tmp_path / "out").glob("layers_*.png")}
    assert drawn == {name for name in told["matrices"] if name.startswith("layers_1.")}


@pytest.mark.slow
@pytest.mark.parametrize("form", ["hf", "hf-spqr", "spqr"])
def test_every_exported_form_is_recognised_and_as_good(form: str, quantized: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 10)
    export = result("export", quantized, tmp_path / "out", "--format", form)
    assert export["bytes_on_disk"] == sum(p.stat().st_size for p in (tmp_path / "out").rglob("*") if p.is_file())
    forms = {"hf": "safetensors", "hf-spqr": "SpQR", "spqr": "spqr-jax checkpoint"}
    assert result("inspect", tmp_path / "out")["form"].endswith(forms[form])
    before, after = (
        result("eval", path, "--text", tmp_path / "text.txt", "--window", 128) for path in (quantized, tmp_path / "out")
    )
    assert after["perplexity"] == pytest.approx(before["perplexity"], rel=5e-3)
    assert ("bits_per_weight" in after) == (form != "hf")


@pytest.mark.slow
def test_inspect_lists_every_matrix(quantized: Path) -> None:
    done = spqr("inspect", quantized)
    assert done.returncode == 0
    for name in ("layers_0.q_proj", "layers_1.down_proj", "embed_tokens"):
        assert name in done.stdout
    assert "form: spqr-jax checkpoint" in done.stdout.splitlines()
    assert result("inspect", quantized)["form"] == "spqr-jax checkpoint"


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One tiny model in the forms of other projects."""
    root = tmp_path_factory.mktemp("foreign")
    config = tiny_config(vocab_size=257)
    tensors = random_tensors(config)
    write_checkpoint(root / "safetensors", config, tensors)
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(root / "safetensors")
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokenizer.convert_ids_to_tokens(range(257)),
        "tokenizer.ggml.token_type": [1] * 256 + [3],
        "tokenizer.ggml.merges": ["Ġ t"],
        "tokenizer.ggml.eos_token_id": 256,
    }
    metadata["tokenizer.ggml.tokens"][255] = "Ġt"  # in place of a byte that no text here has
    return {
        "safetensors": root / "safetensors",
        "gguf": write_gguf(root / "model.gguf", config, tensors, metadata=metadata),
    }


@pytest.mark.parametrize(
    ("form", "name", "tensor"),
    [
        ("Hugging Face directory, safetensors", "safetensors", "model.norm.weight"),
        ("GGUF file", "gguf", "output_norm.weight"),
    ],
)
def test_inspect_names_form_and_tensors_of_other_projects(
    foreign: dict[str, Path], form: str, name: str, tensor: str
) -> None:
    told = result("inspect", foreign[name])
    assert (told["form"], told["family"], told["path"]) == (form, "llama", str(foreign[name]))
    assert told["tensors"][tensor] == {"shape": [64], "kind": "F32"}
    assert len(told["tensors"]) == 21
    lines = [line.split() for line in spqr("inspect", foreign[name]).stdout.splitlines()]
    assert ["form:", *form.split()] in lines
    assert ["family:", "llama"] in lines
    assert [tensor, "64", "F32"] in lines


def test_inspect_takes_a_hub_id(foreign: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    shutil.copytree(foreign["safetensors"], repository / "snapshots" / "abc")
    assert result("inspect", "someone/tiny")["path"] == str(repository / "snapshots" / "abc")
    assert spqr("inspect", "someone/other").returncode == 1


@pytest.mark.slow
def test_commands_take_other_forms(foreign: dict[str, Path], tmp_path: Path) -> None:
    told = {name: result("generate", path, "hello", "--max-new-tokens", 3)["tokens"] for name, path in foreign.items()}
    assert told["safetensors"] == told["gguf"]
    for name, path in foreign.items():
        result("quantize", path, tmp_path / name, "--preset", "paper", "--method", "rtn")
    quantized = {name: result("inspect", tmp_path / name)["matrices"] for name in foreign}
    assert quantized["safetensors"] == quantized["gguf"]
    assert len(quantized["gguf"]) == 14 + 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("eval", "no/such/path/anywhere"), ["no/such/path/anywhere"]),
        (("inspect", "no/such/path"), ["no/such/path", "neither a file nor a directory"]),
        (("quantize", "PLAIN", "QUANTIZED"), ["exists", "overwrite"]),
        (("quantize", "PLAIN", "NEW", "--bits", 6), ["bits is 6", "layers_0"]),
        (("quantize", "PLAIN", "NEW", "--group-size", 128), ["64 input features", "128"]),
        (("quantize", "PLAIN", "NEW", "--calibration", "TEXT"), ["too few", "512"]),
        (("quantize", "QUANTIZED", "NEW", "--sequence-length", 64), ["quantized already"]),
        (("eval", "PLAIN", "--text", "TEXT"), ["fewer than one window", "1024"]),
        (("eval", "PLAIN", "--text", "missing.txt"), ["missing.txt"]),
        (("eval", "PLAIN", "--text", "TEXT", "--protocol", "ptb"), ["ptb", "not both"]),
        (("compare", "PLAIN", "OTHER"), ["are not the same model"]),
        (("analyze", "PLAIN", "QUANTIZED"), ["exists"]),
        (("analyze", "PLAIN", "NEW", "--layers", "layers_7.*"), ["layers_7.*", "layers_0.q_proj"]),
        (("analyze", "PLAIN", "NEW", "--bits", 6, "--sequence-length", 64), ["bits is 6", "layers_0"]),
        (("analyze", "QUANTIZED", "NEW", "--sequence-length", 64), ["quantized already"]),
        (("generate", "PLAIN", "hi", "--max-new-tokens", 0), ["--max-new-tokens is 0"]),
        (("export", "PLAIN", "NEW", "--format", "hf-spqr"), ["no packed matrix"]),
        (("export", "QUANTIZED", "PLAIN", "--format", "hf"), ["exists"]),
        (("export", "QUANTIZED", "NEW", "--format", "hf-spqr", "--dtype", "bfloat16"), ["--dtype", "hf-spqr"]),
    ],
)
def test_errors_are_one_line_and_exit_status_1(
    arguments: tuple, words: list[str], plain: Path, quantized: Path, tmp_path: Path
) -> None:
    (tmp_path / "short.txt").write_text("too short")
    other = write_checkpoint(tmp_path / "other", tiny_config(), random_tensors(tiny_config()))
    places = {
        "PLAIN": plain,
        "QUANTIZED": quantized,
        "OTHER": other,
        "NEW": tmp_path / "new",
        "TEXT": tmp_path / "short.txt",
    }
    done = spqr(*(places.get(argument, argument) for argument in arguments))
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()[-1:]
    assert line.startswith("error: ")
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in line
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_a_process_of_its_own_says_the_same(quantized: Path) -> None:
    command = [sys.executable, "-m", "spqr_jax.cli", "inspect", str(quantized), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == result("inspect", quantized)
    failed = subprocess.run([*command[:3], "inspect", "no/such/path"], capture_output=True, text=True, check=False)
    assert failed.returncode == 1
    assert failed.stderr == spqr("inspect", "no/such/path").stderr


def test_wrong_usage_is_exit_status_2() -> None:
    assert spqr("quantize").returncode == 2
    assert spqr("eval", "somewhere", "--no-such-option").returncode == 2


@pytest.mark.slow
def test_sweep_writes_a_table_and_a_figure(plain: Path, tmp_path: Path) -> None:
    grid = tmp_path / "grid.json"
    grid.write_text('[{"method": "spqr", "bits": [3, 4]}, {"method": "rtn"}]')
    options = "--grid", grid, "--sequences", 4, "--sequence-length", 64, "--window", 64, "--windows", 3
    found = result("sweep", plain, tmp_path / "results", *options)
    assert [cell["name"] for cell in found["results"]][:3] == ["original", "spqr_3bit", "spqr_4bit"]
    sizes = [cell["bits_per_weight"] for cell in found["results"]]
    assert sizes[1] < sizes[2] < sizes[0] == 16
    assert "SpQR, 4 bits" in (tmp_path / "results" / "table.md").read_text()
    assert "| nothing |" in (tmp_path / "results" / "ablation.md").read_text()
    assert "<svg" in (tmp_path / "results" / "perplexity.svg").read_text()
    assert result("sweep", plain, tmp_path / "results", *options) == found


@pytest.mark.slow
def test_token_ids_of_a_file_are_calibrated_on(plain: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "tokens.npy", np.arange(256, dtype=np.uint16).reshape(4, 64))
    done = spqr("quantize", plain, tmp_path / "out", "--calibration", tmp_path / "tokens.npy")
    assert done.returncode == 0
    assert read_record(tmp_path / "out").calibration == (4, 64)  # type: ignore[union-attr]


@pytest.mark.slow
def test_size_is_met(plain: Path, tmp_path: Path) -> None:
    options = "--sequences", 4, "--sequence-length", 64
    found = result("quantize", plain, tmp_path / "out", "--target-bits", 4.4, *options)
    assert abs(found["bits_per_weight"] - 4.4) <= 0.02
    assert read_record(tmp_path / "out").config.bits == 3  # type: ignore[union-attr]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert "exists already" in spqr("quantize", plain, tmp_path / "out", "--target-bits", 4.4, *options).stderr
    assert "only 3.80 to" in spqr("quantize", plain, tmp_path / "small", "--target-bits", 3, *options).stderr


@pytest.mark.slow
def test_smallest_near_lossless_settings_are_found_or_told_missing(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spqr_jax.search import near_lossless

    # Two of them, so that fewer are tried.
    search = partial(near_lossless.smallest_near_lossless, settings=(SMALL, COMPACT))
    monkeypatch.setattr(near_lossless, "smallest_near_lossless", search)
    options = "--near-lossless", "--sequences", 4, "--sequence-length", 64
    monkeypatch.setattr(near_lossless, "LARGEST_RISE", 1)
    found = result("quantize", plain, tmp_path / "out", *options)
    # The smallest settings have statistics groups of 64, but the model 32 rows.
    assert read_record(tmp_path / "out").config == COMPACT  # type: ignore[union-attr]
    assert found["bits_per_weight"] < 5
    monkeypatch.setattr(near_lossless, "LARGEST_RISE", -1)
    done = spqr("quantize", plain, tmp_path / "none", *options)
    assert done.returncode == 1
    assert "no settings under 5 bits are near-lossless here" in done.stderr
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--target-bits", 4, "--method", "gptq"), "leave out --method, --outlier-threshold"),
        (("--target-bits", 4, "--outlier-threshold", 0.3), "leave out --method, --outlier-threshold"),
        (("--target-size", "1MB", "--method", "rtn"), "leave out --method, --outlier-threshold"),
        (("--target-size", "1MB", "--target-bits", 4), "--target-size that of the checkpoint: give one"),
        (("--target-size", "1MB", "--bits", 4), "leave out --preset, --bits"),
        (("--target-size", "1MB", "--skip", "*.down_proj"), "leave out --skip, --rule and --rules"),
        (("--mixed",), "give --target-bits too"),
        (("--near-lossless", "--bits", 4), "--near-lossless chooses all settings"),
        (("--near-lossless", "--target-bits", 4), "--near-lossless chooses all settings"),
        (("--near-lossless", "--calibration", "ids.npy"), "ids.npy has token ids: give text"),
    ],
)
def test_options_that_contradict_each_other_are_told(
    options: tuple[object, ...], message: str, plain: Path, tmp_path: Path
) -> None:
    done = spqr("quantize", plain, tmp_path / "out", *options)
    assert done.returncode == 1
    assert message in done.stderr
