"""The figures of a report, drawn without a display: each function draws one thing on one pair of axes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from equilibria.lm.report import formats
from equilibria.lm.report.axes import (
    BLUE,
    COLOURS,
    GREY,
    ORANGE,
    Axes,
    draw_curve,
    draw_dots,
    drawings_of,
    label_of,
    number_steps,
    show_shares,
    zoom,
)
from equilibria.lm.report.page import Drawing
from equilibria.lm.report.record import DIRECTIONS, Record
from equilibria.lm.runs.files import replace
from equilibria.lm.score import measure


def draw(record: Record) -> list[Drawing]:
    """Every figure for which the run has data, in the order of the page."""
    return drawings_of(FIGURES, record)


def draw_together(records: Sequence[Record]) -> list[Drawing]:
    """The losses of several runs on the same axes: those of the validations, and those of the training."""
    return drawings_of(COMPARISONS, records)


def save(drawings: Sequence[Drawing], folder: Path) -> None:
    """Each figure as a PNG in ``folder``."""
    for drawing in drawings:
        replace(folder / f"{drawing.name}.png", drawing.png)


def _loss(axes: Axes, record: Record) -> bool:
    steps, valid = record.log.curves["loss"], record.log.dots["valid"]
    if not steps.count and not valid:
        return False
    draw_curve(axes, steps, BLUE, "training")
    draw_dots(axes, valid, ORANGE, "validation")
    _baselines(axes, record)
    if measure(record.unit)[0] != "bits":
        axes.set_yscale("log")
    zoom(axes, steps, [score for points in valid.values() for score in points[1::2]])
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
        label = label_of(name) if row is rows[0] else None
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
                draw_curve(axes, curve, colour, name)
                drawn = True
        if not drawn:
            return False
        axes.set_ylabel(label)
        if log:
            axes.set_yscale("log")
        elif key == "converged":
            show_shares(axes)
        else:
            axes.set_ylim(bottom=0)
        axes.legend(loc="best", ncols=2)
        return _per_step(axes, record)

    return paint


def _radius(axes: Axes, record: Record) -> bool:
    dots = record.log.dots
    if not dots["mean"]:
        return False
    draw_dots(axes, dots["mean"], BLUE, "mean of the samples")
    draw_dots(axes, dots["max"], ORANGE, "largest")
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
        label = label_of(f"{row['label']}  {formats.size(row['peak_bytes'])}")
        axes.axhline(row["peak_bytes"] / scale, color=BLUE, linewidth=2.2, label=label)
    axes.set_xticks(list(places), [str(depth) for depth, _ in layers], parse_math=False)
    axes.set_xlabel("layers of the unrolled network")
    axes.set_ylabel(f"peak memory of a training step ({unit})")
    axes.grid(visible=False, axis="x")
    axes.margins(y=0.12)
    axes.legend(loc="upper left")
    return True


def _per_step(axes: Axes, record: Record) -> bool:
    """Label the step axis and mark where a stage begins."""
    number_steps(axes, record.step)
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
    return _side_by_side(axes, records, lambda axes, record, colour: draw_dots(axes, record.log.dots[name], *colour))


def _trainings(axes: Axes, records: Sequence[Record]) -> bool:
    """The training losses of several runs, which are per token; none if their units differ."""
    if not _of_one_unit(records):
        return False
    return _side_by_side(
        axes, records, lambda axes, record, colour: draw_curve(axes, record.log.curves["loss"], *colour)
    )


def _of_one_unit(records: Sequence[Record]) -> bool:
    return len({record.unit for record in records}) == 1


def _side_by_side(
    axes: Axes, records: Sequence[Record], paint: Callable[[Axes, Record, tuple[str, str]], None]
) -> bool:
    for place, record in enumerate(records):
        paint(axes, record, (COLOURS[place % len(COLOURS)], label_of(str(record.path))))
    if not axes.lines:
        return False
    key, name = measure(records[0].unit) if _of_one_unit(records) else ("bits", "bits per byte")
    if key != "bits":
        axes.set_yscale("log")
    number_steps(axes, max(record.step for record in records))
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
