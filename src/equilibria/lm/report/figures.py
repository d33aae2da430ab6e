"""The figures of a report, drawn without a display: each function draws one thing on one pair of axes."""

from __future__ import annotations

import contextlib
import io
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from equilibria.lm.report import formats
from equilibria.lm.report.curve import Curve
from equilibria.lm.report.page import Drawing
from equilibria.lm.report.record import DIRECTIONS, Dots, Record
from equilibria.lm.report.visible import visible
from equilibria.lm.runs.files import replace
from equilibria.lm.score import measure


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


with _without_backend():
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


def draw(record: Record) -> list[Drawing]:
    """Every figure for which the run has data, in the order of the page."""
    return _drawn(FIGURES, record)


def draw_together(records: Sequence[Record]) -> list[Drawing]:
    """The losses of several runs on the same axes: those of the validations, and those of the training."""
    return _drawn(COMPARISONS, records)


def save(drawings: Sequence[Drawing], folder: Path) -> None:
    """Each figure as a PNG in ``folder``."""
    for drawing in drawings:
        replace(folder / f"{drawing.name}.png", drawing.png)


def _drawn(entries: Sequence[tuple[str, str, Callable[[Axes, Any], bool]]], data: Any) -> list[Drawing]:
    """The figures for which ``data`` suffices, one after the other on the same canvas, which holds many pixels."""
    drawings = []
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.4, 3.4), dpi=200, layout="constrained")
        FigureCanvasAgg(figure)
        for name, caption, paint in entries:
            figure.clear()
            axes = figure.add_subplot()
            if paint(axes, data):
                _spell(axes)
                file = io.BytesIO()
                figure.savefig(file, format="png")
                drawings.append(Drawing(name=name, caption=caption, png=file.getvalue()))
    return drawings


def _spell(axes: Axes) -> None:
    """Show every text but the numbers on the axes as it is: the names in a run may hold a $, and be long."""
    legend = axes.get_legend()
    for text in [*axes.texts, axes.xaxis.label, axes.yaxis.label, *(legend.get_texts() if legend else [])]:
        text.set_parse_math(False)
        words = visible(text.get_text())
        text.set_text(words if len(words) <= LONGEST else f"{words[:LONGEST]}…")


def _label(name: str) -> str:
    """``name`` for the legend, which leaves out what begins with an underscore."""
    return f" {name}" if name.startswith("_") else name


def _loss(axes: Axes, record: Record) -> bool:
    steps, valid = record.log.curves["loss"], record.log.dots["valid"]
    if not steps.count and not valid:
        return False
    _curve(axes, steps, BLUE, "training")
    _dots(axes, valid, ORANGE, "validation")
    _baselines(axes, record)
    if measure(record.unit)[0] != "bits":
        axes.set_yscale("log")
    _zoom(axes, steps, [score for points in valid.values() for score in points[1::2]])
    axes.set_ylabel(measure(record.unit)[1])
    axes.legend(loc="upper right")
    return _per_step(axes, record)


def _baselines(axes: Axes, record: Record) -> None:
    """Dashed lines, named at the right; the lowest has its name below, so that two close ones can be read."""
    rows = (record.last("baseline") or {}).get("rows", [])
    if not rows:
        return
    name, shorts = formats.common(row["label"] for row in rows)
    heights = [formats.quantity(row, record.unit) for row in rows]
    for row, short, height in zip(rows, shorts, heights, strict=True):
        label = _label(name) if row is rows[0] else None
        axes.axhline(height, color=GREY, linewidth=0.9, linestyle=(0, (4, 3)), label=label)
        text = f" {short or name} {formats.number(row, record.unit)}"
        side = "top" if height == min(heights) else "bottom"
        axes.annotate(text, (1.0, height), xycoords=("axes fraction", "data"), ha="left", va=side, fontsize=7.5)


def _solver_figure(key: str, label: str, *, log: bool = False) -> Callable[[Axes, Record], bool]:
    """A figure of one number of the solves, forward and backward, over the steps."""

    def paint(axes: Axes, record: Record) -> bool:
        drawn = False
        for name, colour in zip(DIRECTIONS, (BLUE, ORANGE), strict=True):
            curve = record.log.curves[f"{name} {key}"]
            if curve.count:
                _curve(axes, curve, colour, name)
                drawn = True
        if not drawn:
            return False
        axes.set_ylabel(label)
        if log:
            axes.set_yscale("log")
        elif key == "converged":
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            axes.set_ylim(-0.03, 1.05)
        else:
            axes.set_ylim(bottom=0)
        axes.legend(loc="best", ncols=2)
        return _per_step(axes, record)

    return paint


def _radius(axes: Axes, record: Record) -> bool:
    dots = record.log.dots
    if not dots["mean"]:
        return False
    _dots(axes, dots["mean"], BLUE, "mean of the samples")
    _dots(axes, dots["max"], ORANGE, "largest")
    axes.axhline(1.0, color=GREY, linewidth=0.9, linestyle=(0, (4, 3)))
    axes.set_ylabel("spectral radius of ∂f/∂z")
    axes.set_ylim(bottom=0)
    axes.legend(loc="best")
    return _per_step(axes, record)


def _memory(axes: Axes, record: Record) -> bool:
    event = record.last("memory")
    layers = sorted((row["depth"], row["peak_bytes"]) for row in (event or {}).get("rows", []) if row.get("depth"))
    ours = [row for row in (event or {}).get("rows", []) if row.get("depth") is None]
    if not layers:
        return False  # nothing to compare with: the table has the number
    places = range(len(layers))
    unit, scale = formats.size_unit(max([size for _, size in layers] + [row["peak_bytes"] for row in ours]))
    bars = axes.bar(places, [size / scale for _, size in layers], width=0.62, color="#b9c4d0", label="unrolled")
    axes.bar_label(bars, [formats.size(size) for _, size in layers], fontsize=8.5, padding=2, color="#555b64")
    for row in ours:
        label = _label(f"{row['label']}  {formats.size(row['peak_bytes'])}")
        axes.axhline(row["peak_bytes"] / scale, color=BLUE, linewidth=2.2, label=label)
    axes.set_xticks(list(places), [str(depth) for depth, _ in layers], parse_math=False)
    axes.set_xlabel("layers of the unrolled network")
    axes.set_ylabel(f"peak memory of a training step ({unit})")
    axes.grid(visible=False, axis="x")
    axes.margins(y=0.12)
    axes.legend(loc="upper left")
    return True


def _curve(axes: Axes, curve: Curve, colour: str, label: str) -> None:
    """Draw a curve over the steps. Many points are drawn pale, and their running mean as a line over them."""
    points, width = curve.line(), curve.count // 40
    if width < 2:
        axes.plot(*points, "o-" if curve.count < 15 else "-", color=colour, markersize=3, label=label)
        return
    axes.plot(*points, color=colour, alpha=0.22, linewidth=0.9)
    for number, means in enumerate(curve.means(width)):
        axes.plot(*means, color=colour, label=None if number else label)


def _dots(axes: Axes, dots: Dots, colour: str, label: str) -> None:
    """Points, joined within each stage: where one begins there are two at the same step."""
    for number, points in enumerate(dots.values()):
        curve = Curve()  # which is thinned only where there are thousands
        curve.extend(np.array(points[::2]), np.array(points[1::2]), None)
        axes.plot(*curve.line(), "o-", color=colour, markersize=3.5, label=None if number else label)


def _zoom(axes: Axes, curve: Curve, scores: Sequence[float]) -> None:
    """Show the values after the first steep fall as well as possible: the top is the 97th percentile."""
    values, weights = curve.sample()
    values, weights = np.append(values, scores), np.append(weights, np.ones(len(scores)))
    order = np.argsort(np.where(np.isfinite(values), values, math.inf))[: np.isfinite(values).sum()]
    if len(order) >= 20:
        reached = weights[order].cumsum()
        high, middle = (values[order][reached > share * reached[-1]][0] for share in (0.97, 0.5))
        axes.set_ylim(top=max(high * 1.05, middle * 1.3))


def _per_step(axes: Axes, record: Record) -> bool:
    """Label the step axis and mark where a stage begins."""
    axes.set_xlabel("training step")
    axes.set_xlim(-0.02 * max(record.step, 1), 1.02 * max(record.step, 1))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: formats.count(value)))
    for event in record.log.stages:
        if event.get("from"):
            axes.axvline(event["step"], color="#555b64", linewidth=0.9, linestyle=":")
        place = (event["step"], 1.0)
        axes.annotate(
            f" {event['stage']}", place, xycoords=("data", "axes fraction"), fontsize=8, va="bottom", color="#555b64"
        )
    return True


FIGURES: tuple[tuple[str, str, Callable[[Axes, Record], bool]], ...] = (
    ("loss", "How well the model predicts: the training loss, and the validation, measured as the table says.", _loss),
    (
        "evaluations",
        "What a solve costs: evaluations of f until the equilibrium (forward) and its gradient (backward) were found.",
        _solver_figure("evals", "evaluations of f"),
    ),
    (
        "residual",
        "How exact the solves are: the relative residual ‖f(z) − z‖ / ‖f(z)‖ at the end, mean of the samples.",
        _solver_figure("residual", "relative residual", log=True),
    ),
    (
        "converged",
        "Share of the samples that reached their tolerance within the budget.",
        _solver_figure("converged", "samples converged"),
    ),
    (
        "spectral_radius",
        "The spectral radius of the Jacobian of f at the equilibrium; below 1 (dashed) plain iteration converges.",
        _radius,
    ),
    (
        "memory",
        "What the implicit gradient saves: peak memory of one training step, measured in this run, beside the same "
        "cell unrolled to a fixed number of layers and differentiated by backpropagation.",
        _memory,
    ),
)


def _validations(axes: Axes, records: Sequence[Record]) -> bool:
    """The validation losses of several runs: bits per byte if their units differ."""
    name = "valid" if _of_one_unit(records) else "per byte"
    return _side_by_side(axes, records, lambda axes, record, colour: _dots(axes, record.log.dots[name], *colour))


def _trainings(axes: Axes, records: Sequence[Record]) -> bool:
    """The training losses of several runs, which are per token; none if their units differ."""
    if not _of_one_unit(records):
        return False
    return _side_by_side(axes, records, lambda axes, record, colour: _curve(axes, record.log.curves["loss"], *colour))


def _of_one_unit(records: Sequence[Record]) -> bool:
    return len({record.unit for record in records}) == 1


def _side_by_side(
    axes: Axes, records: Sequence[Record], paint: Callable[[Axes, Record, tuple[str, str]], None]
) -> bool:
    for place, record in enumerate(records):
        paint(axes, record, (COLOURS[place % len(COLOURS)], _label(str(record.path))))
    if not axes.lines:
        return False
    key, name = measure(records[0].unit) if _of_one_unit(records) else ("bits", "bits per byte")
    if key != "bits":
        axes.set_yscale("log")
    longest = max(record.step for record in records)
    axes.set_xlabel("training step")
    axes.set_xlim(-0.02 * max(longest, 1), 1.02 * max(longest, 1))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: formats.count(value)))
    axes.set_ylabel(name)
    axes.legend(loc="upper right", fontsize=8)
    return True


COMPARISONS: tuple[tuple[str, str, Callable[[Axes, Sequence[Record]], bool]], ...] = (
    (
        "validation",
        "The validation losses, each measured as the table says; runs of different tokens in bits per byte.",
        _validations,
    ),
    ("training", "The training losses: single steps pale, their running means as lines.", _trainings),
)
