"""The trained models that ship with the library: run directories inside the package, read by name, never written."""

from __future__ import annotations

from pathlib import Path

from equilibria.errors import UsageError
from equilibria.lm.suggestions import nearest

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


def require(path: Path) -> Path:
    """The run directory for a path, or for the name of a model that ships with the library; see ``located``.

    Raises:
        UsageError: there is none; names the runs nearby.
    """
    path = located(path)
    if (path / "experiment.json").is_file():
        return path
    if str(path) in names():  # a folder in the way, such as an export of the model
        raise UsageError(
            f"The folder {path.absolute()} is not a run (it has no experiment.json), and it comes before the model "
            f"{path} of the library; rename the folder, or name the model by its path, {FOLDER / path}."
        )
    found = sorted(str(file.parent) for base in {path.parent, Path("runs")} for file in base.glob("*/experiment.json"))
    fault = "does not exist"
    if path.exists():
        fault = "holds no run (no experiment.json)" if path.is_dir() else "is a file, and a run is a folder"
    hint = nearest(str(path), [*found, *names()]) or (f"there are the runs {', '.join(found[:5])}." if found else "")
    raise UsageError(f"{path} {fault}; {hint or 'a run is a folder that `equilibria train` has written.'}")


def is_shipped(path: Path) -> bool:
    """True if the run directory is part of the library."""
    return path.resolve().is_relative_to(FOLDER.resolve())


def check_writable(path: Path, *, advice: str) -> None:
    """Raise a UsageError if the run directory is part of the library; ``advice`` ends its sentence."""
    if is_shipped(path):
        raise UsageError(f"{path.name} is a model inside the library, and nothing is written there; {advice}")
