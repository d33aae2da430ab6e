"""What the documentation names exists, and its programs run."""

import importlib
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import equilibria

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = ("README.md", "docs/extending.md", "docs/migrating.md")
"""Pages whose Python blocks are one program; those with the title 0.1 show older code and are not part of it."""


def test_the_readme_names_every_solver_and_rule():
    from equilibria import gradients, solvers

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for member in (*solvers.CATALOGUE, *gradients.CATALOGUE):
        assert f"`{member.__name__}`" in text
        assert member.__name__ in equilibria.__all__


def program(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    return "\n\n".join(re.findall(r'^```python(?: title="0.2")?\n(.*?)^```', text, flags=re.DOTALL | re.MULTILINE))


@pytest.mark.parametrize("page", PROGRAMS)
@pytest.mark.filterwarnings("error::RuntimeWarning")  # a snippet whose solve warns would be a bad example
def test_the_python_blocks_of_a_page_run(page, tmp_path):
    """From top to bottom, as one file."""
    file = tmp_path / "page.py"
    file.write_text(program(page), encoding="utf-8")
    runpy.run_path(str(file))


@pytest.mark.slow
def test_the_suites_of_extending_pass(tmp_path):
    file = tmp_path / "test_page.py"
    file.write_text(program("docs/extending.md"), encoding="utf-8")
    arguments = ["-q", "-p", "no:cacheprovider", f"--rootdir={tmp_path}", str(file)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:]


def test_extending_shows_a_suite_for_each_kind():
    from equilibria import testing

    assert all(f"({suite}):" in program("docs/extending.md") for suite in testing.__all__)


def exists(name):
    """True if ``name`` is a module of the library, or can be read from one attribute by attribute."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ImportError:
            continue
        for part in parts[count:]:
            fields = getattr(found, "__dataclass_fields__", {})
            if not (hasattr(found, part) or part in fields):
                return False
            found = getattr(found, part, None)
        return True
    return False


PACKAGE = "|".join(sorted(path.stem for path in (ROOT / "src" / "equilibria").iterdir() if path.stem[0] != "_"))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_dotted_names_of_the_library_exist(page):
    """Those of 0.1 in docs/migrating.md stand in the first column of a table, or in blocks with that title."""
    text = re.sub(
        r'^```python title="0.1".*?^```', "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
    )
    short = []
    if page.name == "migrating.md":
        text = re.sub(r"^\| [^|]*\|", "|", text, flags=re.MULTILINE)
        short = re.findall(rf"`((?:{PACKAGE})\.[\w.]+)", text)
        assert len(short) > 80
    names = {*re.findall(r"\bequilibria(?:\.[A-Za-z_]\w*)+", text), *(f"equilibria.{name}" for name in short)}
    assert sorted(name for name in names if not exists(name)) == []
