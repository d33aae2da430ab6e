"""The version of the library; ``pyproject.toml`` is its only source."""

from __future__ import annotations

import importlib.metadata
import tomllib
from pathlib import Path


def version(project: Path = Path(__file__).parents[2] / "pyproject.toml") -> str:
    """The version of this copy of the library.

    A source tree, installed in editable mode or not at all, answers from its own pyproject.toml, since the metadata of
    an installation may be older than the tree. An installed wheel has metadata and no such file. A copy with neither,
    such as the bare package in a folder of its own, is "0+unknown".

    Args:
        project: where pyproject.toml lies in a source tree.
    """
    if project.is_file():
        described = tomllib.loads(project.read_text(encoding="utf-8")).get("project", {})
        if described.get("name") == "equilibria":
            return described["version"]
    try:
        return importlib.metadata.version("equilibria")
    except importlib.metadata.PackageNotFoundError:
        return "0+unknown"
