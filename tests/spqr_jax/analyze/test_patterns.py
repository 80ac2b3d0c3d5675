"""Measures of patterns: what is planted is found, what is not there is not, and what has no meaning does not count."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spqr_jax.analyze.patterns import (
    OUTLIERS,
    Patterns,
    crowded,
    error_left,
    find_patterns,
    head_contrast,
    head_stripes,
    line_levels,
    most_sensitive,
    rotary_period,
)
from spqr_jax.analyze.sensitivity import Heads

seeds = st.integers(0, 2**32 - 1)
ROWS, COLUMNS, HEADS, WIDTH = 192, 256, 6, 32


def noise(rng: np.random.Generator) -> np.ndarray:
    """Sensitivities as independent weights have them: the squares of uniform errors."""
    return np.square(rng.uniform(-1, 1, (ROWS, COLUMNS))) + 1e-9


def planted(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise, and rows of it that are made thirty times as sensitive."""
    rows = rng.choice(ROWS, count, replace=False)
    values = noise(rng)
    values[rows] *= 30
    return values, rows


# Rows and columns


@pytest.mark.slow
@given(seeds, st.integers(1, 4))
def test_planted_rows_are_found_and_no_others(seed, count):
    values, rows = planted(np.random.default_rng(seed), count)
    mask = most_sensitive(values, OUTLIERS)
    np.testing.assert_array_equal(np.flatnonzero(crowded(mask)), np.sort(rows))
    found = find_patterns(values, None)
    assert found.row_outliers == pytest.approx(mask[rows].sum() / mask.sum())
    assert found.row_outliers > 0.3
    turned = find_patterns(values.T, None)
    assert turned == Patterns(found.column_outliers, found.row_outliers, found.unstructured, None, None, None)


def test_without_structure_a_crowded_line_is_as_rare_as_is_said():
    rng = np.random.default_rng(0)
    false = sum(crowded(rng.random((64, 128)) < 0.01).any() for _ in range(2000))
    assert 0 < false <= 30  # at most 1 % in the mean; counts are whole numbers, so rather less
    found = [find_patterns(noise(rng), None) for _ in range(100)]
    # Of a hundred matrices that one or two have a line too many is as it should be.
    assert sum(patterns == (0, 0, 1, None, None, None) for patterns in found) >= 95


@given(seeds, st.integers(0, 4))
def test_the_order_of_rows_and_columns_means_nothing_to_outliers(seed, count):
    rng = np.random.default_rng(seed)
    values, _ = planted(rng, count)
    values[:, rng.integers(COLUMNS)] *= 20
    shuffled = values[rng.permutation(ROWS)][:, rng.permutation(COLUMNS)]
    assert find_patterns(shuffled, None) == find_patterns(values, None)


@given(seeds, st.integers(0, 4), st.integers(0, 4))
def test_shares_of_outliers_add_up(seed, rows, columns):
    rng = np.random.default_rng(seed)
    values, _ = planted(rng, rows)
    values[:, rng.choice(COLUMNS, columns, replace=False)] *= 30
    found = find_patterns(values, None)
    mask = most_sensitive(values, OUTLIERS)
    both = mask[crowded(mask)][:, crowded(mask.T)].sum() / mask.sum()
    assert found.row_outliers + found.column_outliers - both + found.unstructured == pytest.approx(1)


def test_crowded_is_the_stated_rule():
    counts = np.zeros((1000, 1000), bool)
    counts[:, :10] = True
    counts[0, :27] = True
    counts[1, :26] = True
    np.testing.assert_array_equal(np.flatnonzero(crowded(counts)), [0])


@given(seeds, st.floats(0, 1))
def test_the_most_sensitive_are_so_many_and_none_is_less_so(seed, share):
    values = noise(np.random.default_rng(seed))
    mask = most_sensitive(values, share)
    assert mask.sum() == round(share * values.size)
    assert values[mask].min(initial=np.inf) >= values[~mask].max(initial=0)


def test_weights_without_error_are_no_outliers():
    values = np.zeros((ROWS, COLUMNS))
    heads = Heads(0, WIDTH)
    assert find_patterns(values, heads) == (0, 0, 0, 0, 1, 0)
    values[5, 7] = 1
    assert most_sensitive(values, OUTLIERS).sum() == 1


# Heads


def levels(rng: np.random.Generator) -> np.ndarray:
    return rng.normal(size=(HEADS, WIDTH))


@given(seeds)
def test_a_sensitive_head_is_a_stripe_and_its_position_means_nothing(seed):
    rng = np.random.default_rng(seed)
    heads = 0.1 * levels(rng)
    heads[rng.integers(HEADS)] += 3
    assert head_stripes(heads) > 0.95
    assert head_contrast(heads) == pytest.approx(np.exp(3), rel=0.15)
    mixed = rng.permuted(heads[rng.permutation(HEADS)], axis=1)
    assert head_stripes(mixed) == pytest.approx(head_stripes(heads))
    assert head_contrast(mixed) == pytest.approx(head_contrast(heads))
    assert head_stripes(5 * heads - 7) == pytest.approx(head_stripes(heads))


def test_heads_without_meaning_explain_nothing_in_the_mean():
    rng = np.random.default_rng(0)
    found = [head_stripes(levels(rng)) for _ in range(2000)]
    # Of the adjusted R², the standard deviation is here about √(2 (k − 1)) / n = 0.017.
    assert abs(np.mean(found)) < 4 * 0.017 / np.sqrt(2000)
    assert head_stripes(levels(rng)[:1]) == 0


@given(seeds)
def test_a_period_of_half_a_head_is_found_under_stripes_and_noise(seed):
    rng = np.random.default_rng(seed)
    heads = np.tile(rng.normal(size=(HEADS, WIDTH // 2)), 2)
    stripes = np.repeat(rng.normal(0, 10, (HEADS, 2)), WIDTH // 2, axis=1)
    assert rotary_period(heads) == pytest.approx(1)
    assert rotary_period(heads + stripes) == pytest.approx(1)
    assert rotary_period((heads + stripes)[rng.permutation(HEADS)]) == pytest.approx(1)
    assert 0.4 < rotary_period(heads + 0.5 * levels(rng)) < 0.95
    assert rotary_period(heads * np.repeat([1, -1], WIDTH // 2)) == pytest.approx(-1)


def test_lines_without_a_period_do_not_correlate():
    rng = np.random.default_rng(0)
    found = [rotary_period(levels(rng)) for _ in range(2000)]
    assert abs(np.mean(found)) < 0.01
    assert np.std(found) == pytest.approx(np.sqrt(2 / (HEADS * WIDTH)), rel=0.1)


@pytest.mark.parametrize("axis", [0, 1])
def test_patterns_of_heads_are_found_along_their_axis(axis):
    rng = np.random.default_rng(0)
    values = noise(rng)
    values *= np.exp(np.tile(rng.normal(size=(HEADS, WIDTH // 2)), 2).reshape(-1, 1))
    values[2 * WIDTH : 3 * WIDTH] *= 50
    found = find_patterns(values if axis == 0 else values.T, Heads(axis, WIDTH))
    assert found.head_stripes > 0.5
    assert found.rotary_period > 0.9
    other = find_patterns(values.T if axis == 0 else values, Heads(axis, WIDTH))
    assert abs(other.head_stripes) < 0.1
    assert abs(other.rotary_period) < 0.3


def test_levels_are_logarithms_and_zeros_the_lowest():
    np.testing.assert_allclose(line_levels(np.array([[1.0, 3], [0, 0], [8, 0]])), np.log([2, 2, 4]))
    np.testing.assert_array_equal(line_levels(np.zeros((2, 3))), [0, 0])


# What is left


@given(seeds, st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_error_left_falls_from_all_to_nothing_and_is_a_share(seed, shares):
    values = noise(np.random.default_rng(seed))
    found = error_left(values, [0, *sorted(shares), 1])
    assert (found[0], found[-1]) == (1, 0)
    assert (np.diff(found) <= 0).all()
    np.testing.assert_allclose(error_left(3 * values, [0, *sorted(shares), 1]), found, rtol=1e-9)
    kept = most_sensitive(values, shares[0])
    assert error_left(values, shares)[0] == pytest.approx(values[~kept].sum() / values.sum(), abs=1e-12)


def test_of_no_error_none_is_left():
    np.testing.assert_array_equal(error_left(np.zeros((3, 4)), [0, 0.5]), [0, 0])
