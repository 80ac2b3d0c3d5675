"""The fit of growth exponents. Measured times depend on the machine and are not tested."""

import pytest

from spqr_jax.benchmark.growth import fitted, growths, solver_operations, token_operations
from spqr_jax.benchmark.quantization import growth_table


def test_exponents_are_those_of_the_data():
    growth = fitted("rows", [1, 2, 4, 8], seconds=lambda n: 3e-3 * n**1.5, operations=lambda n: 7.0 * n**2)
    assert (growth.sizes, growth.seconds[0]) == ((1, 2, 4, 8), 3e-3)
    assert growth.exponent == pytest.approx(1.5)
    assert growth.operations_exponent == pytest.approx(2)
    assert not growth.is_worse
    assert fitted("rows", [1, 2, 4, 8], seconds=lambda n: n**2.5, operations=lambda n: n**2.0).is_worse


def test_every_growth_has_four_sizes_and_each_is_measured():
    calls = []

    def timed(function):
        calls.append(function)
        return 1.0

    grown = growths(lambda shape: float(solver_operations(*shape)), timed)
    assert [growth.of for growth in grown] == ["rows", "columns", "sequences", "blocks"]
    assert all(len(growth.sizes) >= 4 for growth in grown)
    for growth in grown[:2]:
        assert growth.exponent == pytest.approx(growth.operations_exponent)
    # `timed` calls nothing here, and constant times have exponent 0.
    assert calls
    assert [growth.exponent for growth in grown[2:]] == pytest.approx([0, 0])
    assert growth_table(grown).row_count == len(grown)


def test_operations_of_a_square_matrix():
    assert solver_operations(10, 10) == 18e3
    assert solver_operations(20, 10) == 28e3
    assert token_operations(10, 10) == 725
