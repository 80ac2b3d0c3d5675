"""Allocation: the cost is close to the least of all choices that fit, found by trying them all."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from spqr_jax.search.allocation import Option, allocate, lower_hull

OPTIONS = st.lists(st.builds(Option, st.integers(1, 20), st.integers(0, 50)), min_size=1, max_size=4)


def totals(options: list[list[Option]], chosen: tuple[int, ...]) -> tuple[float, float]:
    picked = [item[index] for item, index in zip(options, chosen, strict=True)]
    return sum(option.size for option in picked), sum(option.cost for option in picked)


@given(st.lists(OPTIONS, min_size=1, max_size=4), st.integers(0, 80))
def test_cost_is_at_most_one_step_above_the_least(options: list[list[Option]], size: int) -> None:
    chosen = tuple(allocate(options, size))
    found = totals(options, chosen)
    every = [totals(options, choice) for choice in itertools.product(*(range(len(item)) for item in options))]
    fitting = [cost for taken, cost in every if taken <= size]
    if not fitting:
        assert found[0] == min(taken for taken, _ in every)
        return
    assert found[0] <= size
    hulls = [[item[index].cost for index in lower_hull(item)] for item in options]
    steps = [before - after for costs in hulls for before, after in itertools.pairwise(costs)]
    assert found[1] <= min(fitting) + max(steps, default=0)


@given(st.lists(OPTIONS, min_size=1, max_size=4))
def test_everything_fits_a_large_size(options: list[list[Option]]) -> None:
    chosen = tuple(allocate(options, 1000))
    assert totals(options, chosen)[1] == sum(min(option.cost for option in item) for item in options)


@given(OPTIONS)
def test_a_hull_falls_and_flattens(options: list[Option]) -> None:
    hull = [options[index] for index in lower_hull(options)]
    assert hull[0] == min(options)
    slopes = [(b.cost - a.cost) / (b.size - a.size) for a, b in itertools.pairwise(hull)]
    assert all(slope < 0 for slope in slopes)
    assert slopes == sorted(set(slopes))
