"""Plots of a report, as SVG elements for an HTML page, in the color of the page's text."""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal
from xml.etree import ElementTree

import numpy as np

from pallas_kernels.errors import SpqrError

COLORS = ["#3f90da", "#f0a010", "#d9432b", "#8a9a98", "#a05fd0", "#a96b59", "#3d9a50", "#d874a8"]
"""Distinguishable on white and on black."""

STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.prop_cycle": f"cycler('color', {COLORS}) + cycler('marker', {list('osDv^PX*')})",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.sans-serif": ["DejaVu Sans"],
    "grid.alpha": 0.2,
    "grid.color": "black",
    "legend.frameon": False,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "svg.fonttype": "none",
    # Names of matrices may have dollar signs.
    "text.parse_math": False,
}


def lines(
    name: str, series: Mapping[str, Mapping[int, float]], label: str, scale: Literal["linear", "log"] = "linear"
) -> str:
    """Draws values by block.

    Args:
      name: of the plot, unique in a page.
      series: name of each line → block → value; a single line has no legend.
      label: of the axis of values.
      scale: of the axis of values; a linear one starts at 0.

    Raises:
      SpqrError: matplotlib is not installed.

    Example:
      >>> lines("errors", {"q_proj": {0: 0.02, 1: 0.01}}, "relative error", "log")
      '<svg ...</svg>...'
    """

    def draw(axes: Any) -> None:
        if scale == "log":
            # Before plotting, because some values may have no logarithm.
            ticks = _around([value for values in series.values() for value in values.values()])
            axes.set_yscale(scale)
            axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.set_ylim(ticks[0], ticks[-1])
            axes.minorticks_off()
        drawn = [axes.plot(list(values), list(values.values()))[0] for values in series.values()]
        if scale == "linear":
            axes.set_ylim(bottom=0)
        blocks = [block for values in series.values() for block in values]
        axes.set_xlim(min(blocks) - 0.5, max(blocks) + 0.5)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set(xlabel="block", ylabel=label)
        if len(drawn) > 1:
            # Pass the lines: otherwise matplotlib omits names that begin with an underscore.
            axes.legend(drawn, list(series), loc="upper left", bbox_to_anchor=(1, 1))

    return _draw(name, draw)


def bars(name: str, values: Mapping[str, float], label: str) -> str:
    """Draws a labelled bar for each named value.

    Args:
      name: of the plot, unique in a page.
      values: name of each bar → value.
      label: of the axis of values.

    Raises:
      SpqrError: matplotlib is not installed.

    Example:
      >>> bars("bits", {"q_proj": 4.2, "k_proj": 4.3}, "bits per weight")
      '<svg ...</svg>...'
    """

    def draw(axes: Any) -> None:
        drawn = axes.barh(range(len(values)), list(values.values()), color=COLORS[0], tick_label=list(values))
        axes.bar_label(drawn, fmt="{:.2f}", padding=3)
        axes.set(xlabel=label)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")

    return _draw(name, draw)


def _around(values: Sequence[float]) -> list[float]:
    """Ticks at 1, 2 and 5 times powers of ten, which enclose all positive values."""
    ticks = np.outer(10.0 ** np.arange(-12, 3), (1, 2, 5)).ravel()
    positive = [value for value in values if 0 < value < np.inf] or [1.0]
    first, last = np.searchsorted(ticks, min(positive)) - 1, np.searchsorted(ticks, max(positive), side="right")
    return ticks[max(first, 0) : last + 1].tolist()


def _draw(name: str, draw: Callable[[Any], None]) -> str:
    """Draws on the axes of a new figure, and returns it as an SVG element."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise SpqrError("the plots are drawn by matplotlib, which is not installed: pip install matplotlib") from None
    svg = io.StringIO()
    with rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        draw(figure.subplots())
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(svg, format="svg", transparent=True, metadata=nothing)
    return _in_page(svg.getvalue(), name)


def _in_page(svg: str, name: str) -> str:
    """The SVG element without namespaces, which HTML does not need, and with ids unique to this plot."""
    root = ElementTree.fromstring(svg)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        attributes = {key.rpartition("}")[2]: value for key, value in element.items()}
        element.attrib.clear()
        for key, value in attributes.items():
            if key == "id":
                value = f"{name}-{value}"
            elif key == "href":
                value = f"#{name}-{value.removeprefix('#')}"
            element.set(key, value.replace("url(#", f"url(#{name}-").replace("#000000", "currentColor"))
    return ElementTree.tostring(root, encoding="unicode")
