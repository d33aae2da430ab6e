"""The figures of docs/tutorials/vision.md, from the numbers of the page itself.

python docs/figures/vision.py    writes docs/pictures/vision_memory.png and vision_trace.png
"""

from __future__ import annotations

import re

from lesson import BLUE, GREEN, GREY, ORANGE, names_of, panels, save


def main() -> None:
    """Draw both."""
    names = names_of("vision")
    peaks = names["peaks"]

    figure, (axes,) = panels(height=2.9)
    tied = {int(found[1]): peak for name, peak in peaks.items() if (found := re.search(r"(\d+) times", name))}
    axes.plot(tied.keys(), tied.values(), color=ORANGE, marker="o", label="same block, repeated")
    axes.plot(6, peaks["six blocks"], color=GREEN, marker="s", markersize=9, linestyle="", label="six blocks")
    axes.axhline(peaks["equilibrium"], color=BLUE, linewidth=2, label="equilibrium")
    axes.set(xlabel="blocks between stem and head", ylabel="peak of a step (MiB)", ylim=(0, None), xticks=[*tied])
    axes.legend(fontsize=9)
    save(figure, "vision_memory")

    figure, (axes,) = panels(height=2.6)
    trace = names["trace"]
    axes.semilogy(range(1, len(trace) + 1), trace, color=BLUE, linewidth=0.6, alpha=0.5)
    axes.axhline(names["stop"].rtol, color=GREY, linestyle="--", linewidth=1, label="tolerance")
    axes.set(xlabel="evaluations of the block", ylabel="relative residual", xlim=(1, len(trace)))
    axes.legend(fontsize=9)
    save(figure, "vision_trace")


if __name__ == "__main__":
    main()
