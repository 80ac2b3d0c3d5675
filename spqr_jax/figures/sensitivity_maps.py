"""Figures of sensitivities: maps of matrices, and measures by kind of matrix and depth."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from pallas_kernels.errors import SpqrError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CELLS = 1024
"""Most cells along each side of a map."""


def largest_of_cells(values: Float[np.ndarray, "out in"], cells: int = CELLS) -> Float[np.ndarray, "rows columns"]:
    """Largest value in each cell of a grid with at most `cells` cells a side; the last cells may be smaller.

    Every value of a small matrix is a cell of its own. The largest value keeps a single sensitive weight visible.

    Example:
      >>> largest_of_cells(np.arange(12.0).reshape(2, 6), 3)
      array([[ 1.,  3.,  5.],
             [ 7.,  9., 11.]])
    """
    rows, columns = (np.arange(0, size, -(-size // cells)) for size in values.shape)
    return np.maximum.reduceat(np.maximum.reduceat(values, rows, axis=0), columns, axis=1)


def draw_map(values: Float[np.ndarray, "out in"], title: str) -> "Figure":
    """Draws a map of sensitivities as a matplotlib figure, with at most 1024 cells a side; zeros are white.

    Colors are logarithmic, from the fifth percentile of the cells to their largest value.

    Raises:
      SpqrError: matplotlib is not installed.

    Example:
      >>> draw_map(np.abs(weight), "layers_0.q_proj").savefig("map.png")
    """
    # At least a pixel for each cell: a smaller figure would omit single weights.
    figure = new_figure((11.5, 9.5))
    from matplotlib.colors import LogNorm

    cells = largest_of_cells(values)
    positive = cells[cells > 0]
    low, high = np.percentile(positive, [5, 100]) if positive.size else (1, 1)
    axes = figure.subplots()
    out, columns = values.shape
    shown = axes.imshow(
        np.ma.masked_less_equal(cells, 0),
        norm=LogNorm(low, high),
        cmap="Blues",
        aspect="auto",
        interpolation="nearest",
        extent=(0, columns, out, 0),
    )
    figure.colorbar(shown, label="sensitivity")
    axes.set(title=title, xlabel="input feature", ylabel="output feature")
    return figure


def draw_by_depth(measures: Mapping[str, Mapping[str, Mapping[int, float]]]) -> "Figure":
    """Draws measures by depth as a matplotlib figure: a panel for each measure, a line for each kind of matrix.

    Args:
      measures: measure → kind of matrix → block → value.

    Raises:
      SpqrError: matplotlib is not installed.

    Example:
      >>> draw_by_depth({"row outliers": {"q_proj": {0: 0.2, 1: 0.1}}}).savefig("patterns.png")
    """
    columns = 4
    rows = -(-len(measures) // columns)
    every = dict.fromkeys(kind for kinds in measures.values() for kind in kinds)
    colours = {kind: f"C{number}" for number, kind in enumerate(every)}
    figure = new_figure((4.0 * columns, 3.2 * rows))
    for number, (measure, kinds) in enumerate(measures.items(), 1):
        axes = figure.add_subplot(rows, columns, number, title=measure, xlabel="block")
        for kind, values in kinds.items():
            axes.plot(list(values), list(values.values()), marker=".", color=colours[kind], label=kind)
    most = max(figure.axes, key=lambda axes: len(axes.lines))
    figure.legend(handles=most.lines, loc="outside lower center", ncols=len(most.lines))
    return figure


def draw_errors(shares: Sequence[int | float], left: Mapping[str, Sequence[float]]) -> "Figure":
    """Draws the remaining error over the share of weights kept exact, as a matplotlib figure.

    Args:
      shares: of weights kept exact, rising.
      left: kind of matrix → remaining error at each share, relative to none kept.

    Raises:
      SpqrError: matplotlib is not installed.

    Example:
      >>> draw_errors([0.0, 0.01, 0.1], {"q_proj": [1.0, 0.8, 0.4]}).savefig("errors.png")
    """
    figure = new_figure((6.0, 4.0))
    axes = figure.add_subplot(xlabel="weights kept exact", ylabel="error left")
    for kind, values in left.items():
        axes.plot(shares, values, marker=".", label=kind)
    smallest = min((share for share in shares if share > 0), default=1)
    axes.set_xscale("symlog", linthresh=smallest)
    axes.set_xticks(shares, [f"{share:.1%}" for share in shares])
    axes.set_ylim(0, None)
    axes.legend(fontsize=8)
    return figure


def new_figure(size: tuple[int | float, int | float]) -> "Figure":
    """Creates an empty matplotlib figure without a window, width and height in inches.

    Raises:
      SpqrError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise SpqrError("figures are drawn by matplotlib, which is not installed: pip install matplotlib") from None
    return Figure(figsize=size, dpi=150, layout="constrained")
