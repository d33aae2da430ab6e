"""The figures of docs/tutorials/see.md, from the numbers of the page itself.

python docs/figures/see.py    writes docs/pictures/see_one.png and see_many.png
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from lesson import BLUE, GREEN, GREY, ORANGE, RED, names_of, panels, save
from matplotlib.axes import Axes
from torch import Tensor


def cobweb(axes: Axes, f: Callable[[Tensor], Tensor], low: float, high: float, steps: int) -> None:
    """The curve of f, the diagonal, and the iterates from 0 as steps between the two."""
    points = torch.linspace(low, high, 200)[:, None]
    axes.plot(points, points, color=GREY, linewidth=1, label="z")
    axes.plot(points, f(points), color=BLUE, linewidth=2, label="f(z)")
    z, path = torch.zeros(1, 1), [(0.0, 0.0)]
    for _ in range(steps):
        fz = f(z)
        path += [(z.item(), fz.item()), (fz.item(), fz.item())]
        z = fz
    axes.plot(*zip(*path, strict=True), color=ORANGE, linestyle=":", linewidth=1.5, label="iterates")


def main() -> None:
    """Draw both."""
    names = names_of("see")

    figure, (gentle, steep) = panels(2, height=3.4)
    cobweb(gentle, lambda z: torch.tanh(0.5 * z + 1.0), -0.05, 1.1, 8)
    gentle.plot(0.8952, 0.8952, "o", color=GREEN, label="fixed point")
    gentle.set(title="tanh(0.5 z + 1): it settles", xlabel="z")
    cobweb(steep, names["steep"], -1.1, 1.1, 12)
    fixed = names["found"].z.item()
    steep.plot(fixed, fixed, "o", color=GREEN)
    steep.set(title="tanh(-2.5 z + 0.5): it jumps", xlabel="z")
    gentle.legend(fontsize=9, loc="lower right", bbox_to_anchor=(1, 0.1))
    save(figure, "see_one")

    figure, (axes,) = panels(1)
    colours = (GREEN, BLUE, ORANGE, RED)
    for (radius, (plain, mixed)), colour in zip(names["traces"].items(), colours, strict=False):
        axes.semilogy(range(1, len(plain) + 1), plain, color=colour, linestyle=":", linewidth=1.8)
        axes.semilogy(range(1, len(mixed) + 1), mixed, color=colour, linewidth=1.5, label=f"radius {radius:.2f}")
    axes.plot([], [], color=GREY, linestyle=":", label="Picard")
    axes.plot([], [], color=GREY, label="Anderson")
    axes.set(xlabel="evaluations of f", ylabel="relative residual", xlim=(0, 205), ylim=(1e-9, 3))
    axes.legend(fontsize=8, ncols=2, loc="upper right", bbox_to_anchor=(1, 0.72))
    save(figure, "see_many")


if __name__ == "__main__":
    main()
