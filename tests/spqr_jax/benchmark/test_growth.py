"""The fit of growth exponents. Measured times depend on the machine and are not tested."""

from dataclasses import replace

import pytest
from helpers.tiny_llama import CONFIG

from spqr_jax.benchmark import growth
from spqr_jax.benchmark.growth import fitted, growths, solver_operations, token_operations
from spqr_jax.benchmark.quantization import growth_table
from spqr_jax.models import Llama


def test_exponents_are_those_of_the_data():
    found = fitted("rows", [1, 2, 4, 8], seconds=lambda n: 3e-3 * n**1.5, operations=lambda n: 7.0 * n**2)
    assert (found.sizes, found.seconds[0]) == ((1, 2, 4, 8), 3e-3)
    assert found.exponent == pytest.approx(1.5)
    assert found.operations_exponent == pytest.approx(2)
    assert not found.is_worse
    assert fitted("rows", [1, 2, 4, 8], seconds=lambda n: n**2.5, operations=lambda n: n**2.0).is_worse


@pytest.mark.slow
def test_every_growth_has_four_sizes_and_each_is_measured(monkeypatch):
    calls = []
    monkeypatch.setattr(growth, "_model", lambda blocks: Llama(replace(CONFIG, num_layers=blocks)))

    def timed(function):
        calls.append(function)
        return 1.0

    grown = growths(lambda shape: float(solver_operations(*shape)), timed)
    assert [one.of for one in grown] == ["rows", "columns", "sequences", "blocks"]
    assert all(len(one.sizes) >= 4 for one in grown)
    for one in grown[:2]:
        assert one.exponent == pytest.approx(one.operations_exponent)
    # `timed` calls nothing here, and constant times have exponent 0.
    assert calls
    assert [one.exponent for one in grown[2:]] == pytest.approx([0, 0])
    assert growth_table(grown).row_count == len(grown)


def test_operations_of_a_square_matrix():
    assert solver_operations(10, 10) == 18e3
    assert solver_operations(20, 10) == 28e3
    assert token_operations(10, 10) == 725
