"""The figure of docs/tutorials/force_field.md, from the numbers of the page itself.

python docs/figures/force_field.py    writes docs/pictures/force_field.png
"""

from __future__ import annotations

from lesson import BLUE, GREY, ORANGE, names_of, panels, save


def main() -> None:
    """Predicted against true components of the force, a panel per training."""
    names = names_of("force_field")
    x, _, force = names["testing"]

    figure, both = panels(2, height=3.2)
    for axes, colour, (name, field) in zip(both, (ORANGE, BLUE), names["fields"].items(), strict=True):
        found = names["forces"](field(x), x)
        axes.axline((0, 0), slope=1, color=GREY, linewidth=1)
        axes.plot(force[:60].flatten(), found[:60].flatten(), ".", color=colour, markersize=3)
        axes.set(title=f"trained on {name}", xlabel="true force", xlim=(-2.3, 2.3), ylim=(-2.3, 2.3), aspect="equal")
    both[0].set(ylabel="force of the network")
    save(figure, "force_field")


if __name__ == "__main__":
    main()
