"""Shared by the figures of the tutorials: the names that a page ends with, and one style."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

DOCS = Path(__file__).parent.parent
GREY = "#7f7f7f"
BLUE, ORANGE, GREEN, RED = "#2f8fd8", "#e07b16", "#2ca05a", "#dd4b4b"


def names_of(lesson: str) -> dict[str, Any]:
    """The global names at the end of a tutorial, after its Python blocks were run as one program."""
    text = (DOCS / "tutorials" / f"{lesson}.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {"__name__": "__main__"}
    exec("\n\n".join(re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)), names)
    return names


def panels(count: int = 1, width: float = 6.4, height: float = 3.2) -> tuple[Figure, list[Axes]]:
    """A figure with this many axes side by side."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = list(figure.subplots(1, count, squeeze=False)[0])
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save(figure: Figure, name: str) -> None:
    """Write docs/pictures/name.png, on white: the site shows it so in dark mode, too."""
    for axes in figure.axes:
        if (legend := axes.get_legend()) is not None:
            legend.set_frame_on(False)
    figure.savefig(DOCS / "pictures" / f"{name}.png", dpi=150)
