"""The figure of docs/tutorials/graph.md, from the numbers of the page itself.

python docs/figures/graph.py    writes docs/pictures/graph.png
"""

from __future__ import annotations

import torch
from lesson import BLUE, GREEN, GREY, ORANGE, names_of, panels, save


def main() -> None:
    """Accuracy against distance, a line per network and tolerance."""
    names = names_of("graph")
    torch.manual_seed(0)
    layers, _ = names["accuracies"](names["three"], names["head_of_three"], 12)
    rough, _, tight = names["far"].values()

    figure, (axes,) = panels(height=3)
    axes.axvspan(-0.3, 5.3, color=GREY, alpha=0.15, linewidth=0, label="distances in training")
    axes.plot(layers, color=GREEN, marker="s", markersize=5, label="three layers")
    axes.plot(rough, color=ORANGE, marker="o", markersize=5, label="equilibrium, tolerance 1e-2")
    axes.plot(tight, color=BLUE, marker="o", markersize=5, label="equilibrium, tolerance 1e-5")
    axes.set(xlabel="edges to the marked end, on chains of twelve nodes", ylabel="accuracy", ylim=(0.4, 1.03))
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(0.3, 0.55))
    save(figure, "graph")


if __name__ == "__main__":
    main()
