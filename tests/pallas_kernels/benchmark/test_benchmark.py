import functools
import itertools
import re
import sys
import time
from concurrent.futures import Future
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.ahead_of_time import needs_compiler
from rich.console import Console
from typer.testing import CliRunner

from pallas_kernels import SpqrTensor, spqr_dequantize, spqr_matmul
from pallas_kernels.aot import GPUS, Format
from pallas_kernels.aot.compiler import compile_program, run_apart
from pallas_kernels.backends.table import BACKENDS
from pallas_kernels.benchmark import Timing, bandwidth, random_matrix, seconds_per_call
from pallas_kernels.benchmark.__main__ import app, run
from pallas_kernels.benchmark.contestants import Prepared, jax_contestants
from pallas_kernels.benchmark.measured import checked_error, measured_row, measured_rows
from pallas_kernels.benchmark.rows import Results, Row, read, write
from pallas_kernels.benchmark.shapes import MODELS, TOKENS, names, plan
from pallas_kernels.benchmark.timing import Calls, measure, repeated
from pallas_kernels.benchmark.torch_contestants import missing, torch_contestants

FORM = Format.parse("3b-g16-s3-o1%")
COLUMNS = {"3b-g16-s3-o1%": 336, "2b-g8": 1000, "8b-g128-s2-o40%": 128}


def weight_of(w: SpqrTensor) -> np.ndarray:
    """ŵ in quantization order in float64, decoded bit by bit without the library."""
    out, columns = w.shape
    bits, per_word = w.bits, 16 // w.bits
    halves = np.concatenate([np.asarray(w.codes) & 0xFFFF, np.asarray(w.codes) >> 16], axis=2)
    codes = np.zeros((out, halves.shape[2], 16))
    for j, k in itertools.product(range(16), range(bits)):
        word, place = (j // per_word, bits * (j % per_word) + k) if j < bits * per_word else (k, 15)
        codes[..., j] += (halves[word] >> place & 1) * 2**k
    codes = codes.reshape(out, -1)
    assert (codes[:, columns:] == 0).all()
    scale, zero = (np.repeat(statistic(w, name), w.group_size, axis=1) for name in ("scale", "zero"))
    weight = scale * (codes[:, :columns] - zero)
    if w.outliers is not None:
        for row, (start, stop) in enumerate(itertools.pairwise(np.asarray(w.outliers.offsets))):
            weight[row, np.asarray(w.outliers.columns[start:stop])] += np.asarray(w.outliers.values[start:stop])
    return weight


def statistic(w: SpqrTensor, name: str) -> np.ndarray:
    if (plain := getattr(w, name)) is not None:
        return np.asarray(plain, np.float64)
    planes = np.asarray(getattr(w, f"{name}_codes"))
    scale, zero = (np.repeat(np.asarray(getattr(w, f"{name}_{part}")), 16, axis=0) for part in ("scale", "zero"))
    rows = np.arange(16 * planes.shape[1])
    codes = sum((planes[k, rows // 16] >> (rows % 16)[:, None] & 1) * 2**k for k in range(len(planes)))
    return scale.astype(np.float64) * (codes - zero.astype(np.float64))


@pytest.mark.parametrize("spelling", COLUMNS)
@pytest.mark.slow
def test_random_matrix_is_one_of_its_format(spelling):
    form, shape = Format.parse(spelling), (64, COLUMNS[spelling])
    w = random_matrix(form, shape, 0)
    like = form.tensor(shape)
    assert jax.tree.structure(w) == jax.tree.structure(like)
    assert [(a.shape, a.dtype) for a in jax.tree.leaves(w)] == [(a.shape, a.dtype) for a in jax.tree.leaves(like)]
    weight = weight_of(w)
    np.testing.assert_array_equal(np.sort(w.permutation), np.arange(shape[1]))
    np.testing.assert_allclose(spqr_dequantize(w)[:, w.permutation], weight, rtol=1e-5, atol=1e-6)
    assert 0.02 < np.median(np.abs(weight)) / 0.6745 < 0.07
    other = random_matrix(form, shape, 1)
    assert all((a != b).any() for a, b in zip(jax.tree.leaves(w), jax.tree.leaves(other), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("spelling", [spelling for spelling in COLUMNS if "o" in spelling])
def test_outliers_of_random_matrices(spelling):
    form, shape = Format.parse(spelling), (64, COLUMNS[spelling])
    w = random_matrix(form, shape, 0)
    offsets, columns = np.asarray(w.outliers.offsets), np.asarray(w.outliers.columns).astype(int)
    assert offsets[0] == 0
    assert offsets[-1] == round(form.outlier_percent / 100 * shape[0] * shape[1])
    counts = np.diff(offsets)
    # The standard deviation of a binomial distribution is about the square root of its mean.
    assert 0.5 < counts.std() / counts.mean() ** 0.5 < 1.5
    for start, stop in itertools.pairwise(offsets):
        assert (np.diff(columns[start:stop]) > 0).all()
    assert (columns < shape[1]).all()
    # They are spread over the whole row.
    assert np.histogram(columns, 4, (0, shape[1]))[0].min() > 0.15 * len(columns)


@pytest.mark.slow
def test_more_outliers_than_a_row_has_columns_are_cut_off():
    w = random_matrix(Format.parse("3b-g16-o90%"), (16, 16), 0)
    counts = np.diff(w.outliers.offsets)
    assert counts.max() == 16
    assert (np.asarray(w.outliers.values)[w.outliers.offsets[-1] :] == 0).all()
    np.testing.assert_allclose(spqr_dequantize(w)[:, w.permutation], weight_of(w), rtol=1e-5, atol=1e-6)


def test_a_matrix_that_does_not_fit_its_format():
    with pytest.raises(ValueError, match="24 input features do not divide into groups of 16"):
        random_matrix(Format.parse("3b-g16"), (16, 24), 0)


def test_all_calls_are_in_the_loop():
    x, matrices = jnp.ones((64, 256)), [jnp.full((256, 256), float(i)) for i in range(5)]
    # The cosine does not depend on x, but must stay in the loop too.
    compiled = jax.jit(repeated(lambda x, w: x @ jnp.cos(w), steps=3)).lower(x, matrices).compile()
    text = compiled.as_text()
    computations = dict(re.findall(r"^(?:ENTRY )?%?([\w.-]+) \([^\n]*\{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL))
    called = {name: re.findall(r"(?:calls|to_apply)=%?([\w.-]+)", body) for name, body in computations.items()}

    def count(operation: str, name: str) -> int:
        return computations[name].count(f" {operation}(") + sum(count(operation, one) for one in called[name])

    (body,) = re.findall(r"while\(.*body=%?([\w.-]+)", text)
    for operation in ("dot", "cosine"):
        assert count(operation, body) == text.count(f" {operation}(") == 5
    for i, y in enumerate(compiled(x, matrices)):
        np.testing.assert_allclose(y, np.full((64, 256), 256 * np.cos(i)), rtol=1e-5)


def test_timing_of_a_product():
    w = random_matrix(Format.parse("3b-g16-s3-o1%"), (64, 256), 0)
    timing = seconds_per_call(spqr_matmul, jnp.ones((2, 256)), w, copies=2)
    lower, upper = timing.quartiles
    assert isinstance(timing, Timing)
    assert 0 < lower <= timing.seconds <= upper


def test_each_copy_of_a_matrix_is_one_of_its_own():
    seen: list[list[int]] = []
    w = jnp.ones((16, 16))

    def program(x, matrices):
        seen.append([matrix.unsafe_buffer_pointer() for matrix in matrices])
        return matrices

    measure(Calls(program, copies=3, steps=1), jnp.ones((2, 16)), w)
    assert len({*seen[0], w.unsafe_buffer_pointer()}) == 4
    assert all(places == seen[0] for places in seen)


def test_bandwidth_is_a_number():
    assert bandwidth() > 1e6


def skip_all() -> dict[str, str]:
    return {"torch.matmul": "not asked for", "official kernel": "not asked for"}


@pytest.fixture
def short(monkeypatch):
    """Shortens measurements, so that programs compile fast."""
    monkeypatch.setattr("pallas_kernels.benchmark.timing.MOST_COPIES", 2)
    monkeypatch.setattr("pallas_kernels.benchmark.timing.SAMPLE_SECONDS", 1e-4)


@pytest.mark.slow
def test_rows_of_all_contestants(short):
    found = list(measured_rows(FORM, (64, 256), [1, 3], matrix="a", bandwidth=1e9, skipped=skip_all()))
    assert [[row.tokens for row in rows] for rows in found] == [[1] * 4, [3] * 4]
    assert [row.contestant for row in found[0]] == ["spqr_matmul", "jnp.dot", "dense part", "sparse part"]
    packed_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(random_matrix(FORM, (64, 256), 0)))
    assert [row.read_bytes for row in found[0]][:2] == [packed_bytes + 512, 2 * 64 * 256 + 512]
    for row in (row for rows in found for row in rows):
        assert row.error is None
        assert row.seconds > 0
        assert row.bandwidth_fraction == pytest.approx(row.read_bytes / row.seconds / 1e9)
        assert 0 <= row.relative_error < 2.0**-8
        assert (row.matrix, row.shape, row.source) == ("a", (64, 256), "measured")


def test_the_parts_make_up_the_whole():
    whole, bfloat16, dense, sparse = jax_contestants(FORM, (64, 256), None)
    np.testing.assert_allclose(dense.weight + sparse.weight, whole.weight, atol=1e-6)
    assert 0 < np.count_nonzero(np.abs(sparse.weight) > 1e-6) <= round(0.01 * 64 * 256)
    np.testing.assert_array_equal(bfloat16.weight, whole.weight.astype(jnp.bfloat16))
    assert (dense.format, sparse.nbytes) == ("3b-g16-s3", 8 * 164 + 4 * 65)


@pytest.mark.parametrize("spoil", [lambda y: 1.01 * y, lambda y: y * jnp.nan, lambda y: y[:, :1]])
def test_a_wrong_product_has_no_time(spoil):
    contestant = next(jax_contestants(FORM, (64, 256), None))
    x, timed = jnp.ones((2, 256)), []
    prepared: Future[Prepared] = Future()
    prepared.set_result(Prepared(spoil(x @ contestant.weight.T), lambda: timed.append(1)))
    row = measured_row(contestant, x, prepared, matrix="", bandwidth=1e9)
    assert row.error.startswith("the product is wrong")
    assert (row.seconds, row.quartiles, row.bandwidth_fraction, timed) == (None, None, None, [])


def test_relative_error_of_a_wrong_product():
    with pytest.raises(ValueError, match=r"the product is wrong: its relative error is 0\.01, above 0\.0039"):
        checked_error(1.01 * jnp.ones((1, 64)), jnp.ones((1, 1)), jnp.ones((64, 1)))


def test_a_contestant_that_fails_leaves_the_others_their_rows(short, monkeypatch):
    def fail(*_):
        raise MemoryError("no room")

    monkeypatch.setattr("pallas_kernels.benchmark.contestants.sparse.BCSR.__matmul__", fail)
    (rows,) = measured_rows(FORM, (64, 256), [1], matrix="", bandwidth=1e9, skipped=skip_all())
    assert [row.error for row in rows] == [None, None, None, "no room"]


def test_products_in_torch(monkeypatch):
    """A reader of the official format replaces the official kernel and has its signature."""
    torch = pytest.importorskip("torch")
    tiles = pytest.importorskip("converters.formats.official.tiles")

    def call(m, n, bits, beta1, beta2, in_perm, dense, row_offsets, col_vals, nnz, x, flags, _, out):
        arrays = {"dense_weights": dense, "row_offsets": row_offsets, "col_vals": col_vals, "in_perm": in_perm}
        matrix = tiles.decode_arrays({name: tensor.numpy() for name, tensor in arrays.items()}, (m, n), "it")
        weight = tiles.reader_weight(matrix).astype(np.float32)
        weight[matrix.outliers.rows, matrix.outliers.columns] += matrix.outliers.values
        assert (bits, beta1, beta2, nnz, flags) == (3, 16, 16, len(col_vals), 17)
        out[:] = torch.from_numpy(weight @ x.float().numpy()[matrix.permutation]).half()

    names = ("spqr_quant", "spqr_quant.inference", "spqr_quant.inference_kernels.cuda_kernel")
    for name in (*names, "spqr_quant.inference_kernels"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules[names[1]].FeatureFlags = SimpleNamespace(SPARSE_FUSED_FP32_ASYNC=17)
    sys.modules[names[2]].call_spqr_mul_fused = call
    monkeypatch.setattr("pallas_kernels.benchmark.torch_contestants.DEVICE", "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert missing(FORM) == {}
    x = jax.random.normal(jax.random.key(0), (3, 256))
    for contestant in torch_contestants(FORM, (64, 256), missing(FORM)):
        typed = x.astype(contestant.dtype)
        product = contestant.prepare(typed, 1.0).product
        assert checked_error(product, typed, contestant.weight) < 2.0**-8
    assert [one.name for one in torch_contestants(FORM, (64, 256), {"official kernel": ""})] == ["torch.matmul"]
    assert list(missing(Format.parse("4b-g16-s3"))) == ["official kernel"]


def test_missing_contestants_are_reported(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert list(missing(FORM)) == ["torch.matmul", "official kernel"]


@pytest.mark.gpu
@pytest.mark.slow
def test_every_contestant_on_a_gpu():
    if jax.default_backend() != "gpu":
        pytest.skip("no GPU")
    reached, skipped = bandwidth(), missing(FORM)
    for rows in measured_rows(FORM, (4096, 11008), [1, 16, 200], matrix="", bandwidth=reached, skipped=skipped):
        assert [row.error for row in rows] == [None] * len(rows)


ROWS = (
    Row("a", (64, 256), 1, "jnp.dot", "bfloat16", 10, "measured", 1e-5, (0.9e-5, 1.1e-5), 0.5, 1e-3),
    Row("a", (64, 256), 2, "jnp.dot", "bfloat16", 10, "measured", error="it failed"),
)
RESULTS = Results(True, "a GPU", 1e12, None, {1: 1e-3}, "2026-01-01", {"jax": "0.10.2"}, ROWS)


@pytest.mark.parametrize("results", [RESULTS, replace(RESULTS, rows=())])
def test_results_are_read_as_they_were_written(results, tmp_path):
    path = tmp_path / "results.json"
    path.write_text("what was there before")
    write(results, path)
    assert read(path) == results
    assert list(tmp_path.iterdir()) == [path]


def test_measured_and_predicted_rows_do_not_mix():
    with pytest.raises(ValueError, match="measured and predicted rows cannot be in the same results"):
        replace(RESULTS, measured=False)


def test_plan_has_everything_once_and_first_what_says_most():
    shapes = names(MODELS)
    work = [(shape, number) for shape, numbers in plan(shapes, TOKENS) for number in numbers]
    assert sorted(work) == sorted(itertools.product(shapes, TOKENS))
    assert work[:6] == list(itertools.product([(4096, 11008), (11008, 4096)], [1, 16, 2048]))
    assert shapes[8192, 8192] == "llama-65b q, k, v, o; falcon-40b dense"
    for shape in shapes:
        FORM.tensor(shape)


def test_measuring_ends_at_the_time_limit(short, tmp_path, capsys):
    """The loop of the command, on a CPU with XLA's products."""
    produce = functools.partial(measured_rows, FORM, bandwidth=1e9, skipped=skip_all())
    console = Console(width=200)
    shapes = {(64, 256): "a matrix"}
    rows = list(itertools.chain(*run([((64, 256), [1, 2, 3])], shapes, produce, time.monotonic(), console)))
    assert rows == []
    assert "3 of 3 settings are left out" in capsys.readouterr().out
    rows = list(itertools.chain(*run([((64, 256), [1])], shapes, produce, float("inf"), console)))
    shown = capsys.readouterr().out
    assert "left out" not in shown
    for row in rows:
        assert f"{1e6 * row.seconds:.2f}" in shown


@pytest.mark.slow
def test_command_measures_what_is_there(short, monkeypatch, tmp_path):
    """A CPU stands for a GPU whose backend is XLA."""
    monkeypatch.setattr("pallas_kernels.benchmark.__main__.choose", lambda _: BACKENDS["pallas"])
    monkeypatch.setattr("pallas_kernels.benchmark.__main__.missing", lambda form: skip_all())
    path = tmp_path / "results.json"
    done = CliRunner().invoke(app, ["--shape", "64x256", "--tokens", "1", "--tokens", "3", "--output", str(path)])
    assert (done.exit_code, done.stderr) == (0, "")
    device = jax.devices()[0].device_kind
    assert f"measured on {device}" in done.stdout
    assert "torch.matmul: rows are skipped because not asked for" in done.stdout
    results = read(path)
    assert (results.measured, results.device, results.versions["jax"]) == (True, device, jax.__version__)
    assert [row.tokens for row in results.rows] == [1] * 4 + [3] * 4
    assert all(f"{1e6 * row.seconds:.2f}" in done.stdout for row in results.rows)


@pytest.mark.slow
def test_a_wrong_product_of_this_library_is_a_failure(short, monkeypatch, tmp_path):
    monkeypatch.setattr("pallas_kernels.benchmark.__main__.choose", lambda _: BACKENDS["pallas"])
    monkeypatch.setattr("pallas_kernels.benchmark.__main__.missing", lambda form: skip_all())
    monkeypatch.setattr("pallas_kernels.benchmark.contestants.spqr_matmul", lambda x, w, implementation: x[:, :64])
    done = CliRunner().invoke(app, ["--shape", "64x256", "--tokens", "1"])
    assert (done.exit_code, done.stderr) == (1, "")
    assert done.stdout.count("the product is wrong") == 2


@pytest.mark.parametrize(
    "arguments",
    [["--model", "gpt"], ["--format", "3b"], ["--shape", "4"], ["--target", "v100"], ["--output", "nowhere/a.json"]],
)
def test_wrong_usage(arguments):
    assert CliRunner().invoke(app, arguments).exit_code == 2


def test_without_compilers_nothing_is_predicted(monkeypatch):
    monkeypatch.setattr("pallas_kernels.benchmark.__main__.checked", lambda form: {})
    monkeypatch.setattr("pallas_kernels.aot.compiler._plugin_version", lambda: "0.1")
    done = CliRunner().invoke(app, ["--target", "h100", "--shape", "64x256", "--tokens", "1"])
    assert done.exit_code == 1
    assert "error: to compile ahead for a GPU, run `make aot-env` first" in done.stderr


@needs_compiler
@pytest.mark.slow
def test_prediction(tmp_path):
    path = tmp_path / "results.json"
    arguments = ["--target", "h100", "--shape", "4096x11008", "--output", str(path)]
    done = CliRunner().invoke(app, [*arguments, *(f"--tokens={tokens}" for tokens in (1, 512, 2048))])
    assert (done.exit_code, done.stderr) == (0, "")
    results = read(path)
    assert (results.measured, results.device) == (False, "h100")
    assert all(error < 2.0**-8 for error in results.checked.values())
    seconds = {(row.contestant, row.tokens): row.seconds for row in results.rows}
    # 90 MB at 3.0 TB/s, and 2 · 4096 · 11008 · 2048 operations at 989 · 10¹² a second.
    assert seconds["jnp.dot", 1] == pytest.approx(30e-6, rel=0.01)
    assert seconds["jnp.dot", 2048] == pytest.approx(186.7e-6, rel=0.01)
    assert 2.5 < seconds["jnp.dot", 1] / seconds["spqr_matmul", 1] < 90.2 / 20.5
    # The weight is dequantized once for any number of tokens.
    beside = [seconds["spqr_matmul", n] - seconds["jnp.dot", n] for n in (512, 2048)]
    assert beside[0] == pytest.approx(beside[1])
    assert {row.source for row in results.rows} == {"compile-ahead", "roofline"}


def kernels(tokens: int, copies: int) -> tuple[list[str], list[str]]:
    """The kernels of a product, and those of the loop that times it. Runs in a process of `run_apart`."""
    x, w = jax.ShapeDtypeStruct((tokens, 11008), jnp.bfloat16), FORM.tensor((4096, 11008))
    alone = compile_program(jax.jit(spqr_matmul), x, w, gpu=GPUS["h100"])
    timed = compile_program(jax.jit(repeated(spqr_matmul, 10)), x, [w] * copies, gpu=GPUS["h100"])
    return [kernel.name for kernel in alone.kernels], [kernel.name for kernel in timed.kernels if kernel.in_loop]


@needs_compiler
@pytest.mark.slow
def test_on_a_gpu_each_call_is_made_and_nothing_beside():
    of_spqr = {
        1: ["spqr_arrange", "spqr_fma"],
        16: ["spqr_arrange", "spqr_mma"],
        512: ["spqr_dequantize", "spqr_add_outliers"],
    }
    found = run_apart(kernels, list(of_spqr), [2] * len(of_spqr))
    for (tokens, expected), (alone, timed) in zip(of_spqr.items(), found, strict=True):
        assert [name for name in timed if name.startswith("spqr_")] == 2 * expected, tokens
        # The loop itself increments and compares its counter.
        assert len(timed) <= 2 * len(alone) + 2, tokens
