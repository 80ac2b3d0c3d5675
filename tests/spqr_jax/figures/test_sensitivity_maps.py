"""What is drawn is all there, and says what it is."""

import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spqr_jax.figures.sensitivity_maps import CELLS, draw_by_depth, draw_errors, draw_map, largest_of_cells, new_figure

sizes = st.integers(1, 60)


@given(sizes, sizes, st.integers(1, 20), st.integers(0, 2**32 - 1))
def test_cells_hold_the_largest_of_their_values(out, columns, cells, seed):
    values = np.random.default_rng(seed).random((out, columns))
    found = largest_of_cells(values, cells)
    assert max(found.shape) <= cells
    assert found.max() == values.max()
    rows, width = -(-out // cells), -(-columns // cells)
    for i, row in enumerate(found):
        for j, cell in enumerate(row):
            assert cell == values[i * rows : (i + 1) * rows, j * width : (j + 1) * width].max()


def test_a_small_matrix_stays_as_it_is():
    values = np.random.default_rng(0).random((7, 5))
    np.testing.assert_array_equal(largest_of_cells(values, 7), values)


def test_each_cell_of_a_map_has_a_pixel_and_its_value():
    values = np.random.default_rng(0).lognormal(size=(2 * CELLS, CELLS))
    values[3, 4] = 1e6
    values[:, 9] = 0
    figure = draw_map(values, "layers_0.q_proj")
    figure.canvas.draw()
    axes, _ = figure.axes
    extent = axes.get_window_extent()
    assert min(extent.width, extent.height) >= CELLS
    (image,) = axes.images
    shown = image.get_array()
    assert shown.shape == (CELLS, CELLS)
    assert shown[1, 4] == image.norm.vmax == 1e6
    assert shown.mask[:, 9].all()
    assert axes.get_title() == "layers_0.q_proj"


def test_a_matrix_without_errors_is_a_white_map():
    figure = draw_map(np.zeros((16, 16)), "nothing")
    figure.canvas.draw()
    assert figure.axes[0].images[0].get_array().mask.all()


def test_a_kind_has_one_colour_in_all_panels():
    figure = draw_by_depth({"a": {"q": {0: 1.0, 1: 2.0}, "k": {0: 3.0}}, "b": {"k": {0: 1.0, 1: 4.0}}})
    first, second = figure.axes
    assert [axes.get_title() for axes in figure.axes] == ["a", "b"]
    (line,) = second.lines
    np.testing.assert_array_equal(line.get_xydata(), [[0, 1], [1, 4]])
    assert line.get_color() == {line.get_label(): line.get_color() for line in first.lines}["k"]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["q", "k"]


def test_errors_are_drawn_against_shares():
    figure = draw_errors([0, 0.01, 0.1], {"q": [1, 0.5, 0.2]})
    figure.canvas.draw()
    (axes,) = figure.axes
    np.testing.assert_array_equal(axes.lines[0].get_xydata(), [[0, 1], [0.01, 0.5], [0.1, 0.2]])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.0%", "1.0%", "10.0%"]


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match="pip install matplotlib"):
        new_figure((1, 1))
