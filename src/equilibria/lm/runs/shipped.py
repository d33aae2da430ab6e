"""The trained models that ship with the library: run directories inside the package, read by name, never written."""

from __future__ import annotations

from pathlib import Path

from equilibria.errors import UsageError

FOLDER = Path(__file__).parents[1] / "pretrained"
"""The folder with one run directory per model."""
TEXTS = "texts"
"""The folder, inside a run directory, with the held-out text of the run: valid.txt and test.txt."""


def names() -> list[str]:
    """The names of the models that ship with the library."""
    return sorted(file.parent.name for file in FOLDER.glob("*/experiment.json"))


def located(path: Path) -> Path:
    """The run directory for a path, or for the name of a model that ships with the library.

    A file or folder ``path`` comes first, then a run of that name in the folder ``runs``, then the library's own; any
    other path comes back as it is.
    """
    if path.exists() or str(path) not in names():
        return path
    trained = Path("runs") / path
    return trained if (trained / "experiment.json").is_file() else FOLDER / path


def is_shipped(path: Path) -> bool:
    """True if the run directory is part of the library."""
    return path.resolve().is_relative_to(FOLDER.resolve())


def check_writable(path: Path, *, advice: str) -> None:
    """Raise a UsageError if the run directory is part of the library; ``advice`` ends its sentence."""
    if is_shipped(path):
        raise UsageError(f"{path.name} is a model inside the library, and nothing is written there; {advice}")
