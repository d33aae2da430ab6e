"""The examples run to their end, and the README's five lines are the first of them."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
WORDS = {"multiscale": ["--epochs", "1"], "graph": ["--steps", "60"]}
"""What is said to an example beside its name, to have it done sooner."""


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_runs(path, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # pictures are drawn there
    monkeypatch.setattr("sys.argv", [str(path), *WORDS.get(path.stem, [])])
    runpy.run_path(str(path), run_name="__main__")
    printed = capsys.readouterr().out
    assert "converged" in printed
    if path.stem == "generation":
        assert "\na map is where the map leaves it.\n" in printed
    if path.stem == "cell":
        assert float(printed.rsplit("right answers: ")[1].rstrip("%\n")) > 95
    if path.stem == "multiscale":
        assert float(re.search(r"epoch 1: test accuracy ([\d.]+)%", printed)[1]) > 60
        assert (tmp_path / "multiscale.png").is_file()
    if path.stem == "graph":
        far, near = (
            float(re.search(rf"{name}: test accuracy ([\d.]+)%", printed)[1])
            for name in ("equilibrium", "three layers")
        )
        assert far > near + 10
        assert (tmp_path / "graph.png").is_file()


def test_the_readme_shows_the_first_example():
    lines = (ROOT / "examples" / "layer.py").read_text().splitlines()
    shown = "\n".join(lines[lines.index("import torch") :])
    assert shown in (ROOT / "README.md").read_text()
