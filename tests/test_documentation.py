"""Links in the documentation lead somewhere, and what it names exists."""

import re
from pathlib import Path

import pytest

import equilibria

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_relative_links_exist(page):
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert missing == []


def test_pages_are_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert all(page.name in text for page in PAGES[1:])


def test_the_readme_names_every_solver_and_rule():
    from equilibria import gradients, solvers

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for member in (*solvers.CATALOGUE, *gradients.CATALOGUE):
        assert f"`{member.__name__}`" in text
        assert member.__name__ in equilibria.__all__
