"""How a figure is drawn: the canvas, its style, and curves, points and steps on a pair of axes, without a display."""

from __future__ import annotations

import contextlib
import io
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from equilibria.lm.report import formats
from equilibria.lm.report.curve import Curve
from equilibria.lm.report.page import Drawing
from equilibria.lm.report.record import Dots
from equilibria.lm.report.visible import visible


@contextlib.contextmanager
def _without_backend() -> Iterator[None]:
    """Within it a first import of matplotlib does not ask for the backend that MPLBACKEND names.

    A notebook names its own, which is a module that may be missing here, and then the import would fail. Afterwards it
    is the backend of others again, if it is there.
    """
    first, name = "matplotlib" not in sys.modules, os.environ.pop("MPLBACKEND", None)
    try:
        yield
    finally:
        if name is not None:
            os.environ["MPLBACKEND"] = name
    if first and name:
        with contextlib.suppress(ValueError):
            mpl.rcParams["backend"] = name


with _without_backend():  # so figures.py takes ``Axes`` from here
    import matplotlib as mpl
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, PercentFormatter

LONGEST = 40
"""Characters of a text in a figure at most."""
BLUE, ORANGE, GREEN, GREY = "#0b62a4", "#d1580b", "#12805c", "#8a8f98"
COLOURS = (BLUE, ORANGE, GREEN, "#8e44ad", "#b8860b", "#555b64")
"""The colours of runs that are compared."""
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa0a8",
    "axes.labelcolor": "#333840",
    "axes.grid": True,
    "grid.color": "#e6e8eb",
    "grid.linewidth": 0.8,
    "xtick.color": "#555b64",
    "ytick.color": "#555b64",
    "legend.frameon": False,
    "lines.linewidth": 1.6,
}


def drawings_of(entries: Sequence[tuple[str, str, Callable[[Axes, Any], bool]]], data: Any) -> list[Drawing]:
    """The figures for which ``data`` suffices, one after the other on the same canvas, which holds many pixels."""
    drawings = []
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.4, 3.4), dpi=200, layout="constrained")
        FigureCanvasAgg(figure)
        for name, caption, paint in entries:
            figure.clear()
            axes = figure.add_subplot()
            if paint(axes, data):
                spell(axes)
                file = io.BytesIO()
                figure.savefig(file, format="png")
                drawings.append(Drawing(name=name, caption=caption, png=file.getvalue()))
    return drawings


def spell(axes: Axes) -> None:
    """Show every text but the numbers on the axes as it is: the names in a run may hold a $, and be long."""
    legend = axes.get_legend()
    for text in [*axes.texts, axes.xaxis.label, axes.yaxis.label, *(legend.get_texts() if legend else [])]:
        text.set_parse_math(False)
        words = visible(text.get_text())
        text.set_text(words if len(words) <= LONGEST else f"{words[:LONGEST]}…")


def label_of(name: str) -> str:
    """``name`` for the legend, which leaves out what begins with an underscore."""
    return f" {name}" if name.startswith("_") else name


def draw_curve(axes: Axes, curve: Curve, colour: str, label: str) -> None:
    """Draw a curve over the steps. Many points are drawn pale, and their running mean as a line over them."""
    points, width = curve.line(), curve.count // 40
    if width < 2:
        axes.plot(*points, "o-" if curve.count < 15 else "-", color=colour, markersize=3, label=label)
        return
    axes.plot(*points, color=colour, alpha=0.22, linewidth=0.9)
    for number, means in enumerate(curve.means(width)):
        axes.plot(*means, color=colour, label=None if number else label)


def draw_dots(axes: Axes, dots: Dots, colour: str, label: str) -> None:
    """Points, joined within each stage: where one begins there are two at the same step."""
    for number, points in enumerate(dots.values()):
        curve = Curve()  # which is thinned only where there are thousands
        curve.extend(np.array(points[::2]), np.array(points[1::2]), None)
        axes.plot(*curve.line(), "o-", color=colour, markersize=3.5, label=None if number else label)


def zoom(axes: Axes, curve: Curve, scores: Sequence[float]) -> None:
    """Show the values after the first steep fall as well as possible: the top is the 97th percentile."""
    values, weights = curve.sample()
    values, weights = np.append(values, scores), np.append(weights, np.ones(len(scores)))
    order = np.argsort(np.where(np.isfinite(values), values, math.inf))[: np.isfinite(values).sum()]
    if len(order) >= 20:
        reached = weights[order].cumsum()
        high, middle = (values[order][reached > share * reached[-1]][0] for share in (0.97, 0.5))
        axes.set_ylim(top=max(high * 1.05, middle * 1.3))


def number_steps(axes: Axes, last: int) -> None:
    """Label the step axis, which ends at the step ``last``."""
    axes.set_xlabel("training step")
    axes.set_xlim(-0.02 * max(last, 1), 1.02 * max(last, 1))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: formats.count(value)))


def show_shares(axes: Axes) -> None:
    """Show shares between 0 and 1 as percentages, on a y-axis from 0 to 100 %."""
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_ylim(-0.03, 1.05)
