"""What the documentation names exists."""

from pathlib import Path

import equilibria

ROOT = Path(__file__).parent.parent


def test_the_readme_names_every_solver_and_rule():
    from equilibria import gradients, solvers

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for member in (*solvers.CATALOGUE, *gradients.CATALOGUE):
        assert f"`{member.__name__}`" in text
        assert member.__name__ in equilibria.__all__
