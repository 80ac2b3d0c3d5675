import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import SpqrTensor, spqr_dequantize, spqr_matmul
from pallas_kernels.aot import Format
from pallas_kernels.benchmark import Timing, bandwidth, random_matrix, seconds_per_call
from pallas_kernels.benchmark.timing import repeated

COLUMNS = {"3b-g16-s3-o1%": 336, "2b-g8": 1000, "8b-g128-s2-o40%": 128}


def read(w: SpqrTensor) -> np.ndarray:
    """ŵ in quantization order in float64, bit by bit, without the library."""
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
    if w.row_offsets is not None:
        for row, (start, stop) in enumerate(itertools.pairwise(np.asarray(w.row_offsets))):
            weight[row, np.asarray(w.outlier_columns[start:stop])] += np.asarray(w.outlier_values[start:stop])
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
def test_random_matrix_is_one_of_its_format(spelling):
    form, shape = Format.parse(spelling), (64, COLUMNS[spelling])
    w = random_matrix(form, shape, 0)
    like = form.tensor(shape)
    assert jax.tree.structure(w) == jax.tree.structure(like)
    assert [(a.shape, a.dtype) for a in jax.tree.leaves(w)] == [(a.shape, a.dtype) for a in jax.tree.leaves(like)]
    weight = read(w)
    np.testing.assert_array_equal(np.sort(w.permutation), np.arange(shape[1]))
    np.testing.assert_allclose(spqr_dequantize(w)[:, w.permutation], weight, rtol=1e-5, atol=1e-6)
    assert 0.02 < np.median(np.abs(weight)) / 0.6745 < 0.07
    other = random_matrix(form, shape, 1)
    assert all((a != b).any() for a, b in zip(jax.tree.leaves(w), jax.tree.leaves(other), strict=True))


@pytest.mark.parametrize("spelling", [spelling for spelling in COLUMNS if "o" in spelling])
def test_outliers_of_random_matrices(spelling):
    form, shape = Format.parse(spelling), (64, COLUMNS[spelling])
    w = random_matrix(form, shape, 0)
    offsets, columns = np.asarray(w.row_offsets), np.asarray(w.outlier_columns).astype(int)
    assert offsets[0] == 0
    assert offsets[-1] == round(form.outlier_percent / 100 * shape[0] * shape[1])
    counts = np.diff(offsets)
    # A binomial distribution has about the square root of its mean around it.
    assert 0.5 < counts.std() / counts.mean() ** 0.5 < 1.5
    for start, stop in itertools.pairwise(offsets):
        assert (np.diff(columns[start:stop]) > 0).all()
    assert (columns < shape[1]).all()
    # They are anywhere in a row.
    assert np.histogram(columns, 4, (0, shape[1]))[0].min() > 0.15 * len(columns)


def test_more_outliers_than_a_row_has_columns_are_cut_off():
    w = random_matrix(Format.parse("3b-g16-o90%"), (16, 16), 0)
    counts = np.diff(w.row_offsets)
    assert counts.max() == 16
    assert (np.asarray(w.outlier_values)[w.row_offsets[-1] :] == 0).all()
    np.testing.assert_allclose(spqr_dequantize(w)[:, w.permutation], read(w), rtol=1e-5, atol=1e-6)


def test_a_matrix_that_does_not_fit_its_format():
    with pytest.raises(ValueError, match="24 input features do not divide into groups of 16"):
        random_matrix(Format.parse("3b-g16"), (16, 24), 0)


def test_all_calls_are_in_the_loop():
    x, matrices = jnp.ones((64, 256)), [jnp.full((256, 256), float(i)) for i in range(5)]
    compiled = jax.jit(repeated(jnp.dot, steps=3)).lower(x, matrices).compile()
    text = compiled.as_text()
    computations = dict(re.findall(r"^(?:ENTRY )?%?([\w.-]+) \([^\n]*\{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL))
    called = {name: re.findall(r"(?:calls|to_apply)=%?([\w.-]+)", body) for name, body in computations.items()}

    def dots(name: str) -> int:
        return len(re.findall(r" dot\(", computations[name])) + sum(map(dots, called[name]))

    (body,) = re.findall(r"while\(.*body=%?([\w.-]+)", text)
    assert dots(body) == 5
    assert text.count(" dot(") == 5
    for i, y in enumerate(compiled(x, matrices)):
        np.testing.assert_array_equal(y, np.full((64, 256), 256.0 * i))


def test_timing_of_a_product():
    w = random_matrix(Format.parse("3b-g16-s3-o1%"), (64, 256), 0)
    timing = seconds_per_call(spqr_matmul, jnp.ones((2, 256)), w, copies=2)
    lower, upper = timing.quartiles
    assert isinstance(timing, Timing)
    assert 0 < lower <= timing.seconds <= upper


def test_every_copy_of_a_matrix_is_one_of_its_own(monkeypatch):
    seen: list[Any] = []
    monkeypatch.setattr("pallas_kernels.benchmark.timing.repeated", lambda call, steps: lambda x, ws: seen.append(ws))
    seconds_per_call(jnp.dot, jnp.ones((2, 16)), jnp.ones((16, 16)), copies=3)
    assert len(seen[0]) == 3


def test_bandwidth_is_a_number():
    assert bandwidth() > 1e6
