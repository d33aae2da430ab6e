"""The notebooks run from top to bottom without Jupyter, draw their pictures, and are stored without results."""

from __future__ import annotations

import json
import re
from pathlib import Path

import matplotlib as mpl
import pytest
import torch

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "examples" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
PICTURES = {"layer_in_five_minutes": 1, "convergence": 4}
ALL = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path, kind):
    """The source of each cell of that kind."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


@pytest.fixture
def drawing():
    """matplotlib without a window, and the settings of torch as they were."""
    mpl.use("agg")
    import matplotlib.pyplot as plt

    yield plt
    plt.close("all")
    torch.set_default_dtype(torch.float32)


def test_every_notebook_is_tested():
    assert {path.stem for path in NOTEBOOKS} == set(PICTURES)


@ALL
def test_runs(path, drawing, unhooked):
    """All cells in one namespace; a solve that warns, or an assertion that fails, ends it."""
    names = {"__name__": "__main__"}
    for number, source in enumerate(cells(path, "code")):
        exec(compile(source, f"{path.name}, code cell {number}", "exec"), names)
    figures = [drawing.figure(number) for number in drawing.get_fignums()]
    assert len(figures) == PICTURES[path.stem]
    assert all(axes.lines and axes.get_xlabel() and axes.get_ylabel() for figure in figures for axes in figure.axes)


@ALL
def test_is_stored_as_a_notebook_without_results(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert path.stat().st_size < 20_000
    identities = [cell["id"] for cell in notebook["cells"]]
    assert len(set(identities)) == len(identities)
    for cell in notebook["cells"]:
        assert cell["cell_type"] in ("markdown", "code")
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
    assert notebook["cells"][0]["cell_type"] == "markdown"


@ALL
def test_its_links_lead_somewhere(path):
    links = re.findall(r"\]\(([^)#]+)\)", "\n".join(cells(path, "markdown")))
    assert links
    assert [link for link in links if not (path.parent / link).resolve().is_relative_to(ROOT)] == []
    assert [link for link in links if not (path.parent / link).exists()] == []
