import functools
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.random_packed import random_packed
from typer.testing import CliRunner

from pallas_kernels import SpqrError, spqr_matmul
from pallas_kernels.aot import Format
from pallas_kernels.backends.triton.fma import fma_matmul
from pallas_kernels.backends.triton.matmul import MATMULS
from pallas_kernels.tuning import command, measurements
from pallas_kernels.tuning.directories import cache_directory, tiles_directory
from pallas_kernels.tuning.measurements import (
    Setting,
    Trial,
    Trials,
    best_tile,
    file_of,
    most_tokens,
    read,
    trials_of,
    write,
)
from pallas_kernels.tuning.regimes import MOST_TOKENS, regime
from pallas_kernels.tuning.tiles import DEFAULT, Tile, candidates

H100 = "NVIDIA H100 80GB HBM3"
SHAPE = (4096, 11008)
OTHER = Tile(sets=2, rows=8, columns=64)


@pytest.fixture
def packaged(tmp_path, monkeypatch):
    """The package's trials, none at first."""
    monkeypatch.setattr(measurements, "PACKAGED", tmp_path / "package")
    (tmp_path / "package").mkdir()
    return tmp_path / "package"


@pytest.fixture
def directory(packaged, tmp_path, monkeypatch):
    """The user's trials, none at first."""
    monkeypatch.setenv("SPQR_JAX_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "cache" / "tiles").mkdir(parents=True)
    measurements.known.cache_clear()
    yield tmp_path / "cache" / "tiles"
    measurements.known.cache_clear()


def trial(name="fma", tile=OTHER, *, bits=3, shape=SHAPE, tokens=1, **known) -> Trial:
    return Trial(Setting(name, bits, shape, tokens), tile, **known)


def matrix(shape=SHAPE, bits=3):
    return Format(bits, 16, 3).tensor(shape)


def test_a_kind_of_gpu_has_one_file(directory):
    assert file_of(H100) == directory / "nvidiah10080gbhbm3.json"
    write(directory / "h100.json", Trials({}, ()))
    write(directory / "rtx4090.json", Trials({}, ()))
    assert file_of(H100) == file_of("h100") == directory / "h100.json"
    assert file_of("NVIDIA GeForce RTX 4090") == directory / "rtx4090.json"
    assert file_of("NVIDIA GeForce RTX 4090 D") == directory / "rtx4090.json"
    assert file_of("NVIDIA H200") == directory / "nvidiah200.json"


def test_trials_are_read_as_they_were_written(directory):
    trials = Trials(
        {"jax": "0.11.2"}, (trial(predicted_us=6.5), trial("mma", measured_us=8.25), trial(error='does "not" run'))
    )
    write(directory / "h100.json", trials)
    assert read(directory / "h100.json") == trials
    assert read(directory / "a100.json") == Trials({}, ())
    assert sorted(path.name for path in directory.iterdir()) == ["h100.json"]


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {"SPQR_JAX_CACHE_DIR": "/here", "XDG_CACHE_HOME": "/xdg"}, "/here"),
        ("linux", {"SPQR_JAX_CACHE_DIR": "~/here"}, "/home/me/here"),
        ("linux", {"XDG_CACHE_HOME": "/xdg"}, "/xdg/spqr-jax"),
        ("linux", {"XDG_CACHE_HOME": "relative"}, "/home/me/.cache/spqr-jax"),
        ("linux", {"SPQR_JAX_CACHE_DIR": "", "XDG_CACHE_HOME": ""}, "/home/me/.cache/spqr-jax"),
        ("darwin", {"XDG_CACHE_HOME": "/xdg"}, "/home/me/Library/Caches/spqr-jax"),
        ("darwin", {"SPQR_JAX_CACHE_DIR": "/here"}, "/here"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/spqr-jax/Cache"),
        ("win32", {}, "/home/me/AppData/Local/spqr-jax/Cache"),
    ],
)
def test_the_cache_directory_is_the_platforms_unless_set(platform, variables, expected, monkeypatch):
    monkeypatch.setattr("sys.platform", platform)
    monkeypatch.setenv("HOME", "/home/me")
    for name in ("SPQR_JAX_CACHE_DIR", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_directory() == Path(expected)
    assert tiles_directory() == Path(expected, "tiles")


def test_a_users_file_has_the_name_of_the_packages(directory, packaged):
    (packaged / "h100.json").touch()
    assert file_of(H100) == directory / "h100.json"
    assert file_of("NVIDIA H200") == directory / "nvidiah200.json"
    (directory / "nvidiah100.json").touch()
    assert file_of(H100) == directory / "nvidiah100.json"


def test_a_users_trials_replace_those_of_the_package(directory, packaged):
    own, default, slow = OTHER, DEFAULT["fma"], Tile(1, 4, 32)
    shipped = (
        trial(tile=default, measured_us=5.0, predicted_us=4.0),
        trial(tile=own, measured_us=6.0, predicted_us=4.5),
        trial(tile=slow, error="does not run"),
        trial(tile=slow, shape=(512, 512), measured_us=1.0),
    )
    write(packaged / "h100.json", Trials({}, shipped))
    assert trials_of(H100) == shipped
    assert best_tile("fma", matrix(), 1, H100) == default
    write(directory / "h100.json", Trials({}, (trial(tile=own, measured_us=3.0), trial(tile=slow, measured_us=7.0))))
    assert trials_of(H100) == (
        trial(tile=own, measured_us=3.0, predicted_us=4.5),
        trial(tile=slow, measured_us=7.0),
        shipped[0],
        shipped[3],
    )
    assert best_tile("fma", matrix(), 1, H100) == own
    assert best_tile("fma", matrix((512, 512)), 1, H100) == slow
    write(directory / "h100.json", Trials({}, (trial(tile=default, error="out of registers"),)))
    assert best_tile("fma", matrix(), 1, H100) == own


def test_crossovers_are_of_both_files(directory, packaged):
    write(packaged / "h100.json", Trials({}, (trial("fma", tokens=2, measured_us=5.0),)))
    assert most_tokens("fma", "mma", H100) is None
    write(directory / "h100.json", Trials({}, (trial("mma", tokens=2, measured_us=6.0),)))
    assert most_tokens("fma", "mma", H100) == 2


@pytest.mark.slow
def test_tuning_writes_to_the_cache_directory_and_says_where(directory, packaged, monkeypatch):
    kind = jax.devices()[0].device_kind
    known = trial("fma", DEFAULT["fma"], shape=(32, 256), measured_us=1e-3)
    write(packaged / "cpu.json", Trials({"jax": "0.1"}, (known,)))
    before = (packaged / "cpu.json").read_bytes()
    packaged.chmod(0o555)
    monkeypatch.setattr(command, "MATMULS", dict.fromkeys(MATMULS, by_xla))
    monkeypatch.setattr(command, "TOKENS", {"fma": 1})
    monkeypatch.setattr(command, "candidates", lambda name: (DEFAULT[name], OTHER))
    monkeypatch.setattr(command, "CROSSOVERS", {})
    result = run("--shape", "32x256", "--seconds", "600")
    assert result.exit_code == 0
    assert f"results: {directory / 'cpu.json'}" in result.output
    (measured,) = read(file_of(kind)).trials
    assert (measured.setting, measured.tile) == (known.setting, OTHER)
    assert [path.name for path in packaged.iterdir()] == ["cpu.json"]
    assert (packaged / "cpu.json").read_bytes() == before


def test_a_cache_directory_that_cannot_be_written_is_one_error(directory, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SPQR_JAX_CACHE_DIR", str(tmp_path / "file"))
    result = run("--shape", "32x256")
    assert result.exit_code == 1
    assert "tiles/cpu.json cannot be written (Not a directory); set SPQR_JAX_CACHE_DIR to a dir" in result.output


@pytest.mark.parametrize("content", ["", "{}", '{"device": {}, "trials": [{"setting": {}}]}', "[1]"])
def test_a_damaged_file_is_named(content, directory):
    (directory / "h100.json").write_text(content)
    with pytest.raises(
        SpqrError, match=rf"^{directory}/h100\.json is not a file of trials \(.*\); delete it, or"
    ) as error:
        best_tile("fma", matrix(), 1, H100)
    assert "\n" not in str(error.value)


def test_the_default_serves_what_is_not_measured(directory):
    write(directory / "h100.json", Trials({}, (trial(predicted_us=1.0), trial(error="does not run"))))
    for name, tile in DEFAULT.items():
        assert best_tile(name, matrix(), 1, H100) == best_tile(name, matrix(), 1, "") == tile


def test_the_fastest_measured_tile_of_the_nearest_setting_is_used(directory):
    near, fast, far, four_bits = (Tile(sets, 8, 32) for sets in (1, 2, 8, 16))
    write(
        directory / "h100.json",
        Trials(
            {},
            (
                trial(tile=near, measured_us=7.5, predicted_us=9.0),
                trial(tile=fast, measured_us=7.0, predicted_us=10.0),
                trial(tile=OTHER, predicted_us=1.0),
                trial(tile=far, shape=(512, 512), measured_us=1.0),
                trial(tile=four_bits, bits=4, measured_us=8.0),
                trial("mma", tokens=16, measured_us=0.5),
            ),
        ),
    )
    assert best_tile("fma", matrix(), 1, H100) == fast
    assert best_tile("fma", matrix((8192, 8192)), 1, H100) == fast
    assert best_tile("fma", matrix((512, 1024)), 1, H100) == far
    assert best_tile("fma", matrix(bits=4), 1, H100) == four_bits
    assert best_tile("mma", matrix(), 64, H100) == OTHER
    assert best_tile("fma", matrix(), 1, "NVIDIA A100-SXM4-80GB") == DEFAULT["fma"]


def test_measured_crossovers_are_used_for_what_they_were_measured_with(directory):
    assert most_tokens("fma", "mma", H100) is None
    assert [regime(tokens, jnp.bfloat16, H100) for tokens in (1, 2, 128, 129)] == ["fma", "mma", "mma", "dequantize"]
    rows = {2: (5.0, 6.0), 4: (7.0, 6.0), 8: (5.0, 6.0)}
    trials = [trial("fma", tokens=tokens, measured_us=fma) for tokens, (fma, _) in rows.items()]
    trials += [trial("mma", tokens=tokens, measured_us=mma) for tokens, (_, mma) in rows.items()]
    # What is slower with another tile, or measured on one side only, says nothing.
    trials += [trial("fma", tile=Tile(1, 8, 32), tokens=2, measured_us=50.0), trial("fma", tokens=64, measured_us=1.0)]
    trials += [trial("mma", tokens=256, measured_us=9.0), trial("dequantize", tokens=256, measured_us=8.0)]
    write(directory / "h100.json", Trials({}, tuple(trials)))
    assert most_tokens("fma", "mma", H100) == 2
    assert most_tokens("mma", "dequantize", H100) == 255
    names = [regime(tokens, jnp.bfloat16, H100) for tokens in (1, 2, 3, 255, 256)]
    assert names == ["fma", "fma", "mma", "mma", "dequantize"]
    assert regime(MOST_TOKENS["float32"]["fma"], jnp.float32, H100) == "fma"


def test_products_use_the_measured_tile(directory):
    packed = random_packed(np.random.default_rng(0), 32, 256, outliers="none")
    kind = jax.devices()[0].device_kind
    write(file_of(kind), Trials({}, (trial(shape=(32, 256), measured_us=1.0),)))

    def grids(function):
        return re.findall(r"grid=\(.*?\)", str(jax.make_jaxpr(function)(jnp.ones((1, 256)), packed)))

    used = grids(functools.partial(spqr_matmul, implementation="interpret"))
    assert used == grids(functools.partial(fma_matmul, tile=OTHER, interpret=True))
    assert used != grids(functools.partial(fma_matmul, interpret=True))


def test_the_default_is_the_first_candidate():
    for name, tile in DEFAULT.items():
        assert candidates(name)[0] == tile
        assert len(set(candidates(name))) == len(candidates(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", DEFAULT)
def test_candidates_give_the_product(name):
    """Some of them; tuning checks each that it measures."""
    packed = random_packed(np.random.default_rng(0), 64, 272)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((3, 272)), jnp.float16)
    expected = spqr_matmul(x.astype(jnp.float32), packed, implementation="xla")
    for tile in candidates(name)[5::11]:
        y = jax.jit(functools.partial(MATMULS[name], tile=tile, interpret=True))(x, packed)
        assert np.linalg.norm(y - expected) < 2e-3 * np.linalg.norm(expected), tile


def run(*args: str):
    return CliRunner().invoke(command.app, args)


def by_xla(x, w, *, tile, interpret):
    return spqr_matmul(x, w, implementation="xla")


@pytest.mark.slow
def test_tuning_is_resumed(directory, monkeypatch):
    monkeypatch.setattr(command, "MATMULS", dict.fromkeys(MATMULS, by_xla))
    few = {"fma": (DEFAULT["fma"], OTHER), "mma": (DEFAULT["mma"],), "dequantize": (DEFAULT["dequantize"],)}
    monkeypatch.setattr(command, "candidates", few.__getitem__)
    monkeypatch.setattr(command, "CROSSOVERS", {2: ("fma", "mma")})
    kind = jax.devices()[0].device_kind
    assert run("--shape", "32x256", "--seconds", "0").exit_code == 0
    assert read(file_of(kind)).trials == ()
    write(file_of(kind), Trials({}, (trial(shape=(32, 256), measured_us=1e-3),)))
    assert run("--shape", "32x256", "--seconds", "600").exit_code == 0
    after = read(file_of(kind))
    assert after.device["device_kind"] == kind
    assert after.device["jax"] == jax.__version__
    assert after.trials[0].measured_us == 1e-3
    assert all(done.measured_us for done in after.trials)
    # Every candidate once; at the crossover the tile that was the fastest.
    assert {(done.setting.regime, done.setting.tokens, done.tile) for done in after.trials} == {
        ("fma", 1, DEFAULT["fma"]),
        ("fma", 1, OTHER),
        ("mma", 16, DEFAULT["mma"]),
        ("dequantize", 512, DEFAULT["dequantize"]),
        ("fma", 2, OTHER),
        ("mma", 2, DEFAULT["mma"]),
    }
    assert run("--shape", "32x256", "--seconds", "600").exit_code == 0
    assert read(file_of(kind)).trials == after.trials


def test_wrong_and_failing_tiles_are_reported_and_not_used(directory, monkeypatch):
    def wrong(x, w, *, tile, interpret):
        if tile == OTHER:
            raise RuntimeError("out of shared memory\nand more")
        return jnp.zeros((x.shape[0], w.shape[0]), x.dtype)

    monkeypatch.setattr(command, "candidates", lambda name: (DEFAULT[name], OTHER))
    monkeypatch.setattr(command, "MATMULS", {**MATMULS, "fma": wrong})
    monkeypatch.setattr(command, "TOKENS", {"fma": 1})
    monkeypatch.setattr(command, "CROSSOVERS", {})
    assert run("--shape", "32x256").exit_code == 0
    zero, failed = read(file_of(jax.devices()[0].device_kind)).trials
    assert zero.error == "result is wrong by 1.0e+00 of its size"
    assert failed.error == "out of shared memory"
    assert zero.measured_us is failed.measured_us is None


def test_predictions_give_the_order(directory):
    h100 = [trial(tile=tile, predicted_us=float(i)) for i, tile in enumerate((OTHER, DEFAULT["fma"], Tile(1, 8, 128)))]
    write(directory / "h100.json", Trials({}, tuple(h100)))
    expected = [DEFAULT["fma"], OTHER, Tile(1, 8, 128)]
    assert command._ordered("fma", H100) == command._ordered("fma", "NVIDIA H200") == expected
    assert command._ordered("mma", H100) == list(candidates("mma"))


def test_usage_errors(directory):
    assert run("--shape", "32").exit_code == 2
    assert run("--predict", "h1000").exit_code == 2
    if jax.default_backend() == "cpu":
        large = run()
        assert large.exit_code == 1
        assert "no supported GPU here, and interpreted kernels would take hours for 22016x4096" in large.output


def test_the_files_in_the_package_are_whole():
    for path in measurements.PACKAGED.glob("*.json"):
        assert json.loads(path.read_text())["trials"]
        for known in read(path).trials:
            assert known.predicted_us or known.measured_us or known.error
            assert known.tile in candidates(known.setting.regime)
