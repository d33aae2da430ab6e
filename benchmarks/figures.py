"""The pictures of the documentation that explain rather than compare: all curves are runs of the library.

python benchmarks/figures.py         a minute; writes results/figures.json and four pictures in docs/pictures: idea.png,
                                     convergence.png, implicit.png and samples.png
"""

from __future__ import annotations

import json
from typing import Any

import torch
from block import block
from machine import PICTURES, RESULTS, keep
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from equilibria import Anderson, Broyden, Picard, Solver, Stop, fixed_point, solve
from equilibria.layers.cell import CellMap

RADIUS, EVALS = 0.92, 60
SOLVERS: dict[str, tuple[Solver, str]] = {
    "plain iteration (layers)": (Picard(), "C1"),
    "Anderson": (Anderson(), "C0"),
    "Broyden": (Broyden(), "C2"),
}
KEPT, PLAIN = "#f2b880", "#eef2f7"
"""Colours of an evaluation whose activations are kept for the backward pass, and of one that leaves nothing."""


def traces() -> dict[str, list[float]]:
    """The worst relative residual of the batch after each evaluation, for the block of ``block.py``."""
    cell, x = block(RADIUS)
    with torch.no_grad():
        f = CellMap(cell, cell.prepare(x))
        stop = Stop(rtol=0, atol=0, max_evals=EVALS)
        return {
            name: solve(f, torch.zeros_like(x), solver, stop).trace.amax(dim=1).tolist()
            for name, (solver, _) in SOLVERS.items()
        }


def memory() -> dict[str, list[tuple[int, float]]]:
    """MiB of a training step by depth, as ``memory.py`` has measured them."""
    rows = json.loads((RESULTS / "memory.json").read_text(encoding="utf-8"))["rows"]
    networks = ("unrolled", "unrolled, checkpointed", "equilibrium")
    return {name: [(row["depth"], row["bytes"] / 2**20) for row in rows if row["network"] == name] for name in networks}


def plot_traces(axes: Axes, found: dict[str, list[float]]) -> None:
    """Residual against evaluations."""
    for name, (_, colour) in SOLVERS.items():
        axes.plot(range(1, len(found[name]) + 1), found[name], colour, lw=2, label=name)
    axes.axhline(1e-3, color="0.6", lw=1, ls=":")
    axes.set(xlabel="evaluations of f", ylabel="relative residual", yscale="log", xlim=(1, EVALS))
    axes.set_title("how fast it arrives", loc="left")
    finish(axes)


def plot_memory(axes: Axes, found: dict[str, list[tuple[int, float]]]) -> None:
    """Memory against depth."""
    for (name, points), style in zip(found.items(), ("C1o-", "C7s--", "C0o-"), strict=True):
        axes.plot(*zip(*points, strict=True), style, lw=2, ms=5, label=name)
    depths = [depth for depth, _ in found["equilibrium"]]
    axes.set(xlabel="evaluations of f", ylabel="MiB of a training step", xscale="log", ylim=(0, None))
    axes.set_xticks(depths, [str(depth) for depth in depths])
    axes.minorticks_off()
    axes.set_title("what it costs in memory", loc="left")
    finish(axes)


def finish(axes: Axes) -> None:
    """A quiet frame and a legend."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def box(axes: Axes, x: float, y: float, text: str, colour: str, width: float = 0.9) -> None:
    """One evaluation of f."""
    shape = FancyBboxPatch(
        (x - width / 2, y - 0.4), width, 0.8, boxstyle="round,pad=0.06", fc=colour, ec="0.25", lw=1.2
    )
    axes.add_patch(shape)
    axes.text(x, y, text, ha="center", va="center", fontsize=11)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], bend: float = 0.0) -> None:
    """From one thing to the next."""
    style: Any = {"arrowstyle": "-|>", "mutation_scale": 9, "color": "0.25", "lw": 1.3}
    axes.add_patch(FancyArrowPatch(start, end, connectionstyle=f"arc3,rad={bend}", shrinkA=0, shrinkB=0, **style))


def draw_explicit(axes: Axes) -> None:
    """A network of L layers, each of which keeps its activations."""
    axes.set_title("explicit depth: all layers kept", loc="left")
    for position, text in ((1.2, "$f$"), (2.7, "$f$"), (4.2, "$f$"), (6.4, "$f$")):
        box(axes, position, 1.2, text, KEPT)
        arrow(axes, (position, 0.1), (position, 0.72))
    for start, end in ((0.1, 0.68), (1.72, 2.18), (3.22, 3.68), (4.72, 5.05), (5.5, 5.88), (6.92, 7.4)):
        arrow(axes, (start, 1.2), (end, 1.2))
    axes.text(5.27, 1.2, "…", ha="center", va="center", fontsize=12)
    axes.text(3.8, -0.2, "the input $x$, at every layer", ha="center", va="center", fontsize=9.5)
    axes.text(-0.15, 1.2, "$0$", ha="center", va="center", fontsize=11)
    axes.text(7.7, 1.2, "$z_L$", ha="center", va="center", fontsize=11)


def draw_equilibrium(axes: Axes) -> None:
    """A solve that leaves nothing behind, and one evaluation that is kept."""
    axes.set_title("an equilibrium: one f kept", loc="left")
    box(axes, 1.9, 1.2, "$f$", PLAIN)
    arrow(axes, (2.25, 1.68), (1.55, 1.68), bend=2.2)
    axes.text(1.9, 2.6, "solver", ha="center", va="center", fontsize=9.5)
    box(axes, 5.2, 1.2, "$f$", KEPT)
    for start, end in ((0.1, 1.38), (2.42, 4.68), (5.72, 6.3)):
        arrow(axes, (start, 1.2), (end, 1.2))
    for position in (1.9, 5.2):
        arrow(axes, (position, 0.1), (position, 0.72))
    axes.text(3.55, 1.55, "until the", ha="center", va="center", fontsize=9)
    axes.text(3.55, 0.8, "residual\nis small", ha="center", va="center", fontsize=9)
    axes.text(3.5, -0.2, "the input $x$", ha="center", va="center", fontsize=9.5)
    axes.text(-0.15, 1.2, "$0$", ha="center", va="center", fontsize=11)
    axes.text(6.35, 1.2, r"$z^\star = f(z^\star, x)$", ha="left", va="center", fontsize=11)


def idea(found: dict[str, list[float]]) -> None:
    """Explicit depth beside an equilibrium; residuals and memory below."""
    figure = Figure(figsize=(7.2, 5.4), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=(1.6, 3))
    for column, draw in enumerate((draw_explicit, draw_equilibrium)):
        axes = figure.add_subplot(grid[0, column])
        axes.set(xlim=(-0.4, 8.9), ylim=(-0.5, 2.9))
        axes.axis("off")
        draw(axes)
    plot_traces(figure.add_subplot(grid[1, 0]), found)
    plot_memory(figure.add_subplot(grid[1, 1]), memory())
    figure.savefig(PICTURES / "idea.png", dpi=200)


def convergence(found: dict[str, list[float]]) -> None:
    """Residuals and memory alone, for the README."""
    figure = Figure(figsize=(7.2, 3.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    plot_traces(left, found)
    plot_memory(right, memory())
    figure.savefig(PICTURES / "convergence.png", dpi=200)


def scalar(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The fixed points of z = tanh(0.8·z + x), one per entry of x, and their derivatives by the implicit rule."""
    x = x.clone().requires_grad_()
    z = fixed_point(lambda z, x: torch.tanh(0.8 * z + x), torch.zeros_like(x), x, stop=Stop(rtol=1e-10)).z
    (slope,) = torch.autograd.grad(z.sum(), x)
    return z.detach(), slope


def implicit() -> dict[str, Any]:
    """A cobweb of the iteration, and the solution as a function of the input with its derivative."""
    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    line = torch.linspace(-0.2, 1.1, 200, dtype=torch.float64)
    x0 = 0.25
    left.plot(line, line, "0.5", lw=1.2, label="$z$")
    left.plot(line, torch.tanh(0.8 * line + x0), "C0", lw=2, label="$f(z, x)$")
    z, web = 0.0, [(0.0, 0.0)]
    for _ in range(12):
        value = float(torch.tanh(torch.tensor(0.8 * z + x0, dtype=torch.float64)))
        web += [(z, value), (value, value)]
        z = value
    left.plot(*zip(*web, strict=True), "C1", lw=1.2, label="plain iteration")
    found, slope = scalar(torch.tensor([[x0]], dtype=torch.float64))
    left.plot(float(found), float(found), "ko", ms=6)
    left.annotate(
        r"$z^\star$", (float(found), float(found)), (-6, 10), textcoords="offset points", ha="right", fontsize=11
    )
    left.set(xlabel="$z$", xlim=(-0.05, 1.05), ylim=(-0.05, 1.05))
    left.set_title("z* is where the curve meets the line", loc="left")
    finish(left)
    xs = torch.linspace(-0.6, 0.6, 121, dtype=torch.float64)[:, None]
    right.plot(xs[:, 0], scalar(xs)[0][:, 0], "C0", lw=2, label=r"$z^\star(x)$")
    near = torch.tensor([x0 - 0.22, x0 + 0.22])
    right.plot(
        near,
        float(found) + float(slope) * (near - x0),
        "C3",
        lw=2,
        label=r"slope $(1 - J)^{-1}\,\partial f/\partial x$",
    )
    right.plot(x0, float(found), "ko", ms=6)
    right.set(xlabel="$x$", ylim=(-1.05, 1.2))
    right.set_title("z* moves smoothly with the input", loc="left")
    finish(right)
    figure.savefig(PICTURES / "implicit.png", dpi=200)
    return {"x": x0, "z": float(found), "slope": float(slope)}


def samples() -> list[list[float]]:
    """The residuals of eight samples of one batch, some of which are easier than others."""
    cell, x = block(RADIUS)
    gains = torch.tensor([1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0])[:, None, None]
    with torch.no_grad():
        f = CellMap(cell, cell.prepare(gains * x))
        found = solve(f, torch.zeros_like(x), Anderson(), Stop(rtol=1e-3, max_evals=120))
    figure = Figure(figsize=(7.2, 3.0), layout="constrained")
    axes = figure.subplots()
    for number, steps in enumerate(found.steps.tolist()):
        curve = found.trace[: steps + 1, number]
        axes.plot(range(1, len(curve) + 1), curve, lw=1.6)
        axes.plot(len(curve), curve[-1], "ko", ms=4)
    axes.axhline(1e-3, color="0.6", lw=1, ls=":")
    axes.set(xlabel="evaluations of f", ylabel="relative residual", yscale="log")
    axes.set_title("eight samples of one batch: each stops when it is done", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(PICTURES / "samples.png", dpi=200)
    return found.steps.tolist()


if __name__ == "__main__":
    residuals = traces()
    idea(residuals)
    convergence(residuals)
    print(keep("figures", {"residuals": residuals, "implicit": implicit(), "steps": samples()}))
