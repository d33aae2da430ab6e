"""The figures of a report, drawn without a display: each function draws one thing on one pair of axes."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

from equilibria.commands import formats
from equilibria.commands.record import Event, Record

BLUE, ORANGE, GREEN, GREY = "#0b62a4", "#d1580b", "#12805c", "#8a8f98"
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


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A finished figure."""

    name: str
    """The file's name without .png."""
    caption: str
    """What it shows, in a sentence or two."""
    png: bytes
    """The picture."""


def draw(record: Record) -> list[Drawing]:
    """Every figure for which the run has data, in the order of the page."""
    return [drawing for drawing in (_draw(record, *entry) for entry in FIGURES) if drawing is not None]


def save(drawings: Sequence[Drawing], folder: Path) -> None:
    """Each figure as a PNG in ``folder``."""
    for drawing in drawings:
        (folder / f"{drawing.name}.png").write_bytes(drawing.png)


def _draw(record: Record, name: str, caption: str, paint: Callable[[Axes, Record], bool]) -> Drawing | None:
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.4, 3.4), dpi=200, layout="constrained")
        FigureCanvasAgg(figure)
        if not paint(figure.add_subplot(), record):
            return None
        file = io.BytesIO()
        figure.savefig(file, format="png")
    return Drawing(name=name, caption=caption, png=file.getvalue())


def _loss(axes: Axes, record: Record) -> bool:
    steps, valid = record.of("step"), record.of("valid")
    if not steps and not valid:
        return False
    values = [formats.quantity(event, record.unit) for event in steps]
    _curve(axes, steps, values, BLUE, "training")
    scores = [formats.quantity(event, record.unit) for event in valid]
    _dots(axes, valid, scores, ORANGE, "validation")
    _yardsticks(axes, record)
    if formats.measure(record.unit)[0] != "bits":
        axes.set_yscale("log")
    _zoom(axes, [*values, *scores])
    axes.set_ylabel(formats.measure(record.unit)[1])
    axes.legend(loc="upper right")
    return _per_step(axes, record)


def _yardsticks(axes: Axes, record: Record) -> None:
    """Dashed lines, named at the right; the lowest has its name below, so that two close ones can be read."""
    rows = (record.last("yardstick") or {}).get("rows", [])
    if not rows:
        return
    name, shorts = formats.common(row["label"] for row in rows)
    heights = [formats.quantity(row, record.unit) for row in rows]
    for row, short, height in zip(rows, shorts, heights, strict=True):
        label = name if row is rows[0] else None
        axes.axhline(height, color=GREY, linewidth=0.9, linestyle=(0, (4, 3)), label=label)
        text = f" {short or name} {formats.number(row, record.unit)}"
        side = "top" if height == min(heights) else "bottom"
        axes.annotate(text, (1.0, height), xycoords=("axes fraction", "data"), ha="left", va=side, fontsize=7.5)


def _solver_figure(key: str, label: str, *, log: bool = False) -> Callable[[Axes, Record], bool]:
    """A figure of one number of the solves, forward and backward, over the steps."""

    def paint(axes: Axes, record: Record) -> bool:
        drawn = False
        for name, colour in (("forward", BLUE), ("backward", ORANGE)):
            events = [event for event in record.of("step") if event.get(name)]
            if key == "converged":
                events = [event for event in events if record.has_tolerance(event["stage"])]
            if events:
                _curve(axes, events, [formats.plain(event[name][key]) for event in events], colour, name)
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
    events = record.of("spectral_radius")
    if not events:
        return False
    _dots(axes, events, [formats.plain(event["mean"]) for event in events], BLUE, "mean of the samples")
    _dots(axes, events, [formats.plain(event["max"]) for event in events], ORANGE, "largest")
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
        label = f"{row['label']}  {formats.size(row['peak_bytes'])}"
        axes.axhline(row["peak_bytes"] / scale, color=BLUE, linewidth=2.2, label=label)
    axes.set_xticks(list(places), [str(depth) for depth, _ in layers])
    axes.set_xlabel("layers of the unrolled network")
    axes.set_ylabel(f"peak memory of a training step ({unit})")
    axes.grid(visible=False, axis="x")
    axes.margins(y=0.12)
    axes.legend(loc="upper left")
    return True


def _curve(axes: Axes, events: Sequence[Event], values: Sequence[float], colour: str, label: str) -> None:
    """A line over the steps of ``events``; of many points the running mean, with the points themselves behind it."""
    steps = [event["step"] for event in events]
    width = len(values) // 40
    if width < 2:
        axes.plot(steps, values, "o-" if len(values) < 15 else "-", color=colour, markersize=3, label=label)
        return
    axes.plot(steps, values, color=colour, alpha=0.22, linewidth=0.9)
    borders = [i for i in range(len(events)) if i == 0 or events[i]["stage"] != events[i - 1]["stage"]]
    for start, end in zip(borders, [*borders[1:], len(events)], strict=True):
        means = list(_running_mean(values[start:end], width))
        axes.plot(steps[start:end], means, color=colour, label=label if start == 0 else None)


def _dots(axes: Axes, events: Sequence[Event], values: Sequence[float], colour: str, label: str) -> None:
    """Points, joined within each stage: where one begins there are two at the same step."""
    stages = [event.get("stage") for event in events]
    for stage in dict.fromkeys(stages):
        points = [
            (event["step"], value) for event, value in zip(events, values, strict=True) if event.get("stage") == stage
        ]
        name = label if stage == stages[0] else None
        axes.plot(*zip(*points, strict=True), "o-", color=colour, markersize=3.5, label=name)


def _running_mean(values: Sequence[float], width: int) -> Iterator[float]:
    for index in range(len(values)):
        yield formats.mean(values[max(0, index - width + 1) : index + 1])


def _zoom(axes: Axes, values: Sequence[float]) -> None:
    """Show the values after the first steep fall as well as possible: the top is the 99th percentile."""
    ordered = sorted(filter(math.isfinite, values))
    if len(ordered) >= 20:
        axes.set_ylim(top=max(ordered[int(0.97 * len(ordered))] * 1.05, ordered[len(ordered) // 2] * 1.3))


def _per_step(axes: Axes, record: Record) -> bool:
    """Label the step axis and mark where a stage begins."""
    axes.set_xlabel("training step")
    axes.set_xlim(-0.02 * max(record.step, 1), 1.02 * max(record.step, 1))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: formats.count(value)))
    for event in record.of("stage"):
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
