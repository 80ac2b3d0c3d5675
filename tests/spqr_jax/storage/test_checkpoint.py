import asyncio
import dataclasses
import errno
import json
import logging
import os
import signal
import subprocess
import sys
from functools import cache, partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers.same import assert_identical
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from pallas_kernels import Outliers, QuantizedStatistics, pack, trim
from spqr_jax.models import Decoder, Llama, LlamaConfig, RotaryConfig
from spqr_jax.models.optional import as_dict
from spqr_jax.models.stacked_blocks import stack_blocks
from spqr_jax.storage import checkpoint
from spqr_jax.storage.checkpoint import CheckpointError, check_destination, describe, is_checkpoint, load, save
from spqr_jax.storage.manifest import fingerprint

CONFIG = LlamaConfig(
    vocab_size=61,
    hidden_size=32,
    mlp_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rotary=RotaryConfig(theta=5e5, scaling="llama3", factor=32.0),
    norm_epsilon=1e-5,
    attention_bias=True,
)
MODEL = Llama(CONFIG)
PACK = jax.jit(partial(pack, bits=3, group_size=16, scale_bits=3, zero_bits=3))
TOKENS = np.arange(24, dtype=np.int32).reshape(2, 12)


@pytest.fixture(scope="module")
def dense():
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), TOKENS)["params"]
    return jax.tree.map(lambda leaf: 0.3 * rng.standard_normal(leaf.shape, np.float32), shapes)


@pytest.fixture(scope="module")
def quantized(dense):
    """A mixture: two matrices of each block are packed, the others dense."""
    rng = np.random.default_rng(2)

    def packed(kernel):
        out, columns = kernel.shape[::-1]
        shape = (out, columns // 16)

        def statistics(low, high):
            second = rng.uniform(low, high, (2, out // 16, columns // 16)).astype(np.float32)
            return QuantizedStatistics(rng.integers(0, 8, shape).astype(np.uint8), *second)

        codes = rng.integers(0, 8, (out, columns)).astype(np.uint8)
        outliers = rng.random((out, columns)) < 0.02, rng.standard_normal((out, columns), np.float32)
        order = rng.permutation(columns)
        return trim(PACK(codes, statistics(-0.1, 0.1), statistics(-1, 1), outliers=outliers, permutation=order))

    def block(params):
        return params | {m: params[m] | {"kernel": packed(params[m]["kernel"])} for m in ("q_proj", "gate_proj")}

    return dense | {name: block(dense[name]) for name in ("layers_0", "layers_1")}


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = {"<unk>": 0, "sky": 1, "blue": 2}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="blue", chat_template="{{ 1 }}")


@pytest.fixture
def saved(tmp_path, quantized, tokenizer):
    save(tmp_path / "saved", MODEL, quantized, tokenizer=tokenizer)
    return tmp_path / "saved"


@cache
def packed_shapes(out, columns, bits, stats_bits, outliers, permuted, stats_dtype):
    """What `pack` makes of a matrix of these sizes, without values."""
    codes, values, groups = jnp.zeros((out, columns), jnp.uint8), jnp.zeros((out, columns)), columns // 16
    statistics = jnp.zeros((out, groups))
    if stats_bits is not None:
        second = jnp.zeros((out // 16, groups))
        statistics = QuantizedStatistics(jnp.zeros((out, groups), jnp.uint8), second, second)
    sizes = {"bits": bits, "group_size": 16, "scale_bits": stats_bits, "zero_bits": stats_bits}
    optional = {
        "outliers": (values > 0, values) if outliers else None,
        "permutation": jnp.arange(columns) if permuted else None,
    }
    return jax.eval_shape(partial(pack, **sizes, stats_dtype=stats_dtype), codes, statistics, statistics, **optional)


def packed_of_random_bytes(
    rng, out, columns, *, bits=3, stats_bits=3, share=0.018, permuted=True, stats_dtype=jnp.float16
):
    """A packed matrix of random bytes, which cannot be compressed, with `share` of its weights as outliers."""
    shapes = packed_shapes(out, columns, bits, stats_bits, share is not None, permuted, stats_dtype)
    if share is not None:
        offsets = np.concatenate([[0], np.cumsum(rng.binomial(columns, share, out))]).astype(np.int32)
        count = (int(offsets[-1]),)
        sparse = shapes.outliers
        sparse = Outliers(sparse.offsets, sparse.columns.update(shape=count), sparse.values.update(shape=count))
        shapes = dataclasses.replace(shapes, outliers=sparse)
    packed = jax.tree.map(lambda a: np.ndarray(a.shape, a.dtype, rng.bytes(a.size * a.dtype.itemsize)), shapes)
    if share is None:
        return packed
    return dataclasses.replace(packed, outliers=dataclasses.replace(packed.outliers, offsets=offsets))


FORMATS = {
    "full": {},
    "5 bits": {"bits": 5},
    "no outliers": {"share": None},
    "zero outliers": {"share": 0.0},
    "16-bit statistics": {"stats_bits": None},
    "float32 statistics": {"stats_dtype": jnp.float32},
    "no permutation": {"permuted": False},
    "least": {"share": None, "stats_bits": None, "permuted": False},
}


def test_every_format_and_type_comes_back_bit_for_bit(tmp_path, dense):
    rng = np.random.default_rng(0)
    params = {
        **dense,
        "layers_0": {
            name: {"kernel": packed_of_random_bytes(rng, 32, 48, **o), "bias": rng.random(3)}
            for name, o in FORMATS.items()
        },
        "norm": {"scale": rng.standard_normal(32).astype(ml_dtypes.bfloat16)},
        "others": {
            "half": rng.standard_normal((4, 3)).astype(np.float16).T,
            "minus zero": np.full(5, -0.0, np.float32),
            "not a number": np.array([0x7FC00001, 0xFFFFFFFF], np.uint32).view(np.float32),
            "scalar": jnp.float32(3),
        },
    }
    save(tmp_path / "saved", MODEL, params)
    loaded = load(tmp_path / "saved")
    assert loaded.model == MODEL
    assert loaded.tokenizer is None
    assert_identical(loaded.params, params)


def test_the_activations_type_and_the_tokenizer_are_kept(tmp_path, dense, tokenizer):
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), dense)
    save(tmp_path / "saved", Llama(CONFIG, dtype=jnp.bfloat16), half, tokenizer=tokenizer)
    model, params, loaded = load(tmp_path / "saved")
    assert model == Llama(CONFIG, dtype=jnp.dtype("bfloat16"))
    assert_identical(params, half)
    assert loaded.encode("sky") == [1]
    assert (loaded.eos_token_id, loaded.chat_template) == (2, "{{ 1 }}")


@pytest.mark.slow
def test_a_fresh_process_computes_the_same_logits(tmp_path, saved, quantized):
    script = """
import sys, jax, numpy as np
from spqr_jax.storage.checkpoint import load
model, params, tokenizer = load(sys.argv[1])
tokens = np.arange(24, dtype=np.int32).reshape(2, 12)
np.save(sys.argv[2], jax.jit(model.apply)({"params": params}, tokens))
"""
    ran = run(script, saved, tmp_path / "logits.npy")
    assert (ran.stdout, ran.stderr) == ("", "")
    expected = jax.jit(MODEL.apply)({"params": quantized}, TOKENS)
    np.testing.assert_array_equal(np.load(tmp_path / "logits.npy"), expected, strict=True)


def test_padding_is_not_saved(tmp_path, quantized):
    trimmed = packed_of_random_bytes(np.random.default_rng(0), 32, 48)
    padded = dataclasses.replace(trimmed, outliers=trimmed.outliers.pad(trimmed.outliers.capacity + 500))
    save(tmp_path / "untrimmed", MODEL, {"matrix": {"kernel": padded}})
    assert_identical(load(tmp_path / "untrimmed").params, {"matrix": {"kernel": trimmed}})
    save(tmp_path / "stacked", MODEL, stack_blocks(quantized))
    assert_identical(load(tmp_path / "stacked").params, quantized)


@pytest.mark.slow
def test_the_disk_use_of_a_small_language_model_is_that_of_its_arrays(tmp_path):
    rng = np.random.default_rng(0)
    shapes = {"q": (576, 576), "k": (192, 576), "v": (192, 576), "o": (576, 576)}
    shapes |= {"gate": (1536, 576), "up": (1536, 576), "down": (576, 1536)}
    params = {
        f"layers_{i}": {name: {"kernel": packed_of_random_bytes(rng, *shape)} for name, shape in shapes.items()}
        for i in range(30)
    }
    save(tmp_path / "saved", MODEL, params)
    files = [path for path in (tmp_path / "saved").rglob("*") if path.is_file()]
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert held == sum(entry["bytes"] for entry in describe(tmp_path / "saved")["matrices"].values())
    assert sum(path.stat().st_size for path in files) < 1.03 * held
    # A file system rounds each up to its blocks. How many data files a part has depends on timing.
    assert len(files) < 20 * len(params)


def test_describe_reads_no_arrays(saved, quantized):
    for path in (saved / "params").rglob("*"):
        if path.is_file():
            path.unlink()
    header = describe(saved)
    kernel = quantized["layers_1"]["gate_proj"]["kernel"]
    assert header["matrices"]["layers_1.gate_proj.kernel"] == {
        "shape": [48, 32],
        "bits": 3,
        "group_size": 16,
        "scale_bits": 3,
        "zero_bits": 3,
        "outliers": int(kernel.outliers.offsets[-1]),
        "bytes": kernel.nbytes,
    }
    assert header["dense"]["layers_0.q_proj.bias"] == {"shape": [32], "dtype": "float32", "bytes": 128}
    assert header["config"] == as_dict(CONFIG)
    assert not header["config"].keys() & {"window", "windowed"}
    assert (header["family"], header["dtype"], header["tokenizer"]) == ("llama", "float32", True)


def test_a_checkpoint_is_told_from_other_directories(tmp_path, saved):
    assert is_checkpoint(saved)
    assert not is_checkpoint(tmp_path)
    assert not is_checkpoint(tmp_path / "absent")


def test_the_event_loop_of_a_notebook_is_left_alone(tmp_path, dense):
    async def running():
        save(tmp_path / "running", MODEL, dense)
        return load(tmp_path / "running").params

    loop = asyncio.new_event_loop()
    try:
        asyncio.set_event_loop(loop)
        assert_identical(loop.run_until_complete(running()), dense)
        save(tmp_path / "idle", MODEL, dense)
        load(tmp_path / "idle")
        assert asyncio.get_event_loop() is loop
    finally:
        asyncio.set_event_loop(None)
        loop.close()


def test_nothing_is_overwritten_unasked(saved, dense, quantized, monkeypatch):
    monkeypatch.setattr(checkpoint, "write_part", lambda *args: pytest.fail("worked before it looked"))
    with pytest.raises(CheckpointError, match="exists already: choose another path or set overwrite"):
        save(saved, MODEL, dense)
    assert_identical(load(saved).params, quantized)


def test_overwrite_replaces_a_checkpoint_or_an_empty_directory(tmp_path, saved, dense):
    save(saved, MODEL, dense, overwrite=True)
    assert_identical(load(saved).params, dense)
    assert load(saved).tokenizer is None
    (tmp_path / "empty").mkdir()
    save(tmp_path / "empty", MODEL, dense, overwrite=True)
    (tmp_path / "absent").symlink_to(tmp_path / "deep" / "er")
    save(tmp_path / "absent", MODEL, dense, overwrite=True)
    assert_identical(load(tmp_path / "deep" / "er").params, dense)
    assert {path.name for path in tmp_path.iterdir()} == {"saved", "empty", "absent", "deep"}


def test_overwrite_deletes_nothing_else(tmp_path, saved):
    (saved / "notes.txt").touch()
    foreign = tmp_path / "foreign"
    (foreign / "tokenizer").mkdir(parents=True)
    (tmp_path / "file").touch()
    for path, reason in ((saved, "holds notes.txt"), (foreign, "holds tokenizer"), (tmp_path / "file", "is not a dir")):
        with pytest.raises(CheckpointError, match=f"{path} {reason}.*not overwritten: choose another path"):
            check_destination(path, overwrite=True)
    with pytest.raises(CheckpointError, match=f"cannot be made, because {tmp_path / 'file'} is not a writable dir"):
        check_destination(tmp_path / "file" / "model")
    check_destination(tmp_path / "new" / "model")


@pytest.mark.parametrize(
    "step", ["os.fsync", "pathlib.Path.write_text", "pathlib.Path.mkdir", "spqr_jax.storage.directories.publish"]
)
def test_a_full_disk_leaves_the_old_checkpoint_and_nothing_else(tmp_path, saved, dense, quantized, step, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    size = sum(leaf.nbytes for leaf in jax.tree.leaves(dense))
    with monkeypatch.context() as patch:
        patch.setattr(step, full)
        message = f"could not be written: No space left on device; its parameters take {size} bytes, [0-9]+ are free"
        for path in (saved, tmp_path / "new"):
            with pytest.raises(CheckpointError, match=message):
                save(path, MODEL, dense, overwrite=True)
    assert list(tmp_path.iterdir()) == [saved]
    assert_identical(load(saved).params, quantized)


def test_a_write_that_fails_inside_orbax_is_one_quiet_error(tmp_path):
    script = """
import resource, sys, numpy as np
from spqr_jax.storage.checkpoint import CheckpointError, save
from spqr_jax.models import Llama, LlamaConfig, RotaryConfig
model = Llama(LlamaConfig(61, 32, 48, 2, 4, 2, 8, RotaryConfig()))
params = {"a": {f"a{i}": np.frombuffer(np.random.default_rng(i).bytes(20_000), np.uint8) for i in range(300)}}
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save(sys.argv[1], model, params)
except CheckpointError as error:
    print(error)
"""
    ran = run(script, tmp_path / "saved")
    assert ran.stderr == ""
    assert f"{tmp_path / 'saved'} could not be written: {os.strerror(errno.EFBIG)}; " in ran.stdout
    assert ran.stdout.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_killed_save_never_looks_complete(tmp_path, quantized):
    """Kills saves, at events spread over the whole of one, by a hook on what Python asks the operating system for."""
    script = """
import os, signal, sys
from pathlib import Path
from spqr_jax.storage import checkpoint
root = Path(sys.argv[1])
seen, stop = 0, None

def count(event, args):
    global seen
    if stop is not None and event.split(".")[0] in ("open", "os", "shutil", "pathlib"):
        seen += 1
        if seen == stop:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(count)

def save(destination, kill_at):
    # A forked process, which may use threads because this one never does.
    child = os.fork()
    if not child:
        global stop
        model, params, _ = checkpoint.load(root / "saved")
        stop = kill_at
        checkpoint.save(destination, model, params, overwrite=True)
        (root / "events").write_text(str(seen))
        os._exit(0)
    return os.waitpid(child, 0)[1]

assert save(root / "whole", 0) == 0
events = int((root / "events").read_text())
for part in range(8):
    new = root / f"new-{part}"
    old = root / f"old-{part}"
    os.system(f"cp -r {root}/saved {old}")
    print(part, save((new, old)[part % 2], 1 + part * events // 8))
"""
    save(tmp_path / "saved", MODEL, quantized)
    statuses = run(script, tmp_path).stdout.split("\n")[:-1]
    assert statuses == [f"{part} {int(signal.SIGKILL)}" for part in range(8)]
    survivors = [path for path in sorted(tmp_path.glob("*-*")) if path.suffix == ""]
    for path in survivors:
        assert_identical(load(path).params, quantized)
        save(path, MODEL, quantized, overwrite=True)
    assert {path.name for path in survivors} >= {f"old-{part}" for part in range(8)}
    assert len(survivors) < 16
    assert list(tmp_path.glob("*.incomplete-*"))


def test_damage_is_found_and_named(saved):
    victim = max((saved / "params").rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
    content = victim.read_bytes()
    damages = {
        f"is {len(content) - 1} bytes .* says {len(content)} bytes ": content[:-1],
        f"is {len(content)} bytes with BLAKE2b .* says {len(content)} bytes with BLAKE2b ": b"\0" + content[1:],
    }
    for message, damaged in damages.items():
        victim.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=f"{victim} {message}.*: copy the checkpoint again or save it anew"):
            load(saved)
    victim.unlink()
    with pytest.raises(CheckpointError, match=f"{victim} is missing, but manifest.json says {len(content)} bytes"):
        load(saved)


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("spqr.json", '"norm_epsilon": 1e-05', '"norm_epsilon": 1e-06', "spqr.json is .* bytes .*manifest.json says"),
        ("spqr.json", '"version": 3', '"version": 7', "of format version 7, but this release reads 2 and 3: use "),
        ("spqr.json", "{", "[", r"spqr.json is not JSON: Expecting ',' delimiter: line 2 column 12"),
        ("manifest.json", "{", "", "manifest.json is not JSON: Extra data"),
        ("manifest.json", '": "', '": 3, "x": "', "but manifest.json says 3"),
        ("tokenizer/tokenizer.json", "sky", "sly", "tokenizer.json is .* but manifest.json says"),
    ],
)
def test_an_altered_text_is_refused(saved, name, old, new, message):
    text = (saved / name).read_text()
    assert old in text
    (saved / name).write_text(text.replace(old, new, 1))
    with pytest.raises(CheckpointError, match=message):
        load(saved)


def test_what_is_no_checkpoint_is_refused(tmp_path, saved):
    (tmp_path / "file").touch()
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "spqr.json").write_text("[1]")
    (saved / "manifest.json").unlink()
    for path, message in (
        (tmp_path / "absent", "absent does not exist"),
        (tmp_path / "file", "file is not a directory"),
        (tmp_path, "is not a checkpoint of this library: it has no spqr.json"),
        (tmp_path / "list", "list/spqr.json is not a JSON object"),
        (saved, "manifest.json cannot be read: No such file"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"family": "gpt2"}, "is a model of family 'gpt2', but supported are llama, falcon"),
        (
            {"config": dataclasses.asdict(CONFIG) | {"unheard_of": 4}},
            "does not fit LlamaConfig: .*unexpected keyword argument 'unheard_of'",
        ),
    ],
)
def test_a_model_of_a_later_release_is_refused(saved, changes, message):
    header = json.loads((saved / "spqr.json").read_text()) | changes
    (saved / "spqr.json").write_text(json.dumps(header))
    manifest = json.loads((saved / "manifest.json").read_text())
    manifest["spqr.json"] = fingerprint(saved / "spqr.json")
    (saved / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=message):
        load(saved)


def test_an_unknown_family_is_not_saved(tmp_path, dense):
    with pytest.raises(CheckpointError, match="a Decoder cannot be saved; supported families: llama"):
        save(tmp_path / "saved", Decoder(CONFIG), dense)
    assert not list(tmp_path.iterdir())


def test_it_says_nothing(tmp_path, dense, tokenizer, caplog, capfd, recwarn):
    with caplog.at_level(logging.WARNING):
        save(tmp_path / "saved", MODEL, dense, tokenizer=tokenizer)
        save(tmp_path / "saved", MODEL, dense, tokenizer=tokenizer, overwrite=True)
        load(tmp_path / "saved")
    assert (caplog.messages, list(recwarn), tuple(capfd.readouterr())) == ([], [], ("", ""))


def run(script, *args):
    """Runs a Python script to its end, on the CPU, without transformers' advice to install PyTorch."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"}
    command = [sys.executable, "-c", script, *map(str, args)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
