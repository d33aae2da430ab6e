"""What the documentation names exists, and its programs run and print what it shows."""

import contextlib
import importlib
import io
import itertools
import json
import math
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import equilibria
from slow_cases import all_but

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
FENCE = re.compile(r'^```python(?: title="([^"]*)")?\n(.*?)^```', flags=re.DOTALL | re.MULTILINE)
OUTPUT = re.compile(r'^```text title="output"\n(.*?)^```', flags=re.DOTALL | re.MULTILINE)
RUN = {"", "0.2"}
"""Titles of the Python blocks of a page that are, together and from top to bottom, one program."""
SHOWN = {"0.1", "torchdeq", "jaxopt", "optimistix", "a trained run"}
"""Titles of those that need another library, an older version, or a trained model."""
PUBLIC = (
    "cells",
    "stability",
    "testing",
    *(
        f"lm.{part}"
        for part in ("model", "corpora", "experiments", "evaluation", "score", "runs", "training", "recipes", "testing")
    ),
)
"""Packages whose names the reference shows as a whole."""


def text_of(page):
    return (ROOT / page).read_text(encoding="utf-8")


def program(page):
    return "\n\n".join(code for title, code in FENCE.findall(text_of(page)) if title in RUN)


PROGRAMS = [page.relative_to(ROOT).as_posix() for page in PAGES if program(page) and page.parent.name != "tutorials"]
"""Pages with code that runs; tests/test_tutorials.py runs the tutorials."""


def test_the_readme_names_every_solver_and_rule():
    from equilibria import gradients, solvers

    text = text_of("README.md")
    for member in (*solvers.CATALOGUE, *gradients.CATALOGUE):
        assert f"`{member.__name__}`" in text
        assert member.__name__ in equilibria.__all__


def test_the_readme_can_be_read_in_one_go():
    assert len(text_of("README.md").splitlines()) <= 120


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_block_that_does_not_run_says_why(page):
    assert {title for title, _ in FENCE.findall(text_of(page))} <= RUN | SHOWN


def alike(shown, printed):
    """True if both say the same with numbers that agree within a half: other processors round otherwise."""
    number = re.compile(r"(?<![A-Za-z_])\d+(?:\.\d+)?(?:e[-+]?\d+)?")
    pairs = itertools.zip_longest(number.findall(shown), number.findall(printed), fillvalue="nan")
    return [*map(str.split, number.split(shown))] == [*map(str.split, number.split(printed))] and all(
        math.isclose(float(ours), float(theirs), rel_tol=0.5, abs_tol=1) for ours, theirs in pairs
    )


@pytest.mark.parametrize("page", all_but({*PROGRAMS} - {"docs/howto/converge.md"}, PROGRAMS))  # it trains seven layers
@pytest.mark.filterwarnings("error::RuntimeWarning")  # a snippet whose solve warns would be a bad example
def test_the_python_blocks_of_a_page_run(page, tmp_path, monkeypatch):
    """From top to bottom, as one file; what they print stands in the page's blocks with the title "output"."""
    monkeypatch.chdir(tmp_path)  # pages write folders
    file = tmp_path / "page.py"
    file.write_text(program(page), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        runpy.run_path(str(file))
    shown = "".join(OUTPUT.findall(text_of(page)))
    if shown:
        assert alike(shown, printed.getvalue()), printed.getvalue()


@pytest.mark.slow
def test_the_suites_of_extend_pass(tmp_path):
    file = tmp_path / "test_page.py"
    file.write_text(program("docs/howto/extend.md"), encoding="utf-8")
    arguments = ["-q", "-p", "no:cacheprovider", f"--rootdir={tmp_path}", str(file)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:]


def test_extend_shows_a_suite_for_each_kind():
    from equilibria import testing
    from equilibria.lm import testing as of_corpora

    suites = (*testing.__all__, *of_corpora.__all__)
    assert all(f"({suite}):" in program("docs/howto/extend.md") for suite in suites)


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


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_dotted_names_of_the_library_exist(page):
    """Those of 0.1 in docs/howto/migrate.md stand in the first column of a table, or in blocks with that title."""
    text = re.sub(r'^```python title="0.1".*?^```', "", text_of(page), flags=re.DOTALL | re.MULTILINE)
    short = []
    if page.name == "migrate.md":
        text = re.sub(r"^\| [^|]*\|", "|", text, flags=re.MULTILINE)
        short = re.findall(rf"`((?:{PACKAGE})\.[\w.]+)", text)
        assert len(short) > 80
    names = {*re.findall(r"\bequilibria(?:\.[A-Za-z_]\w*)+", text), *(f"equilibria.{name}" for name in short)}
    assert sorted(name for name in names if not exists(name)) == []


def test_the_reference_has_every_public_name():
    """A name of the root has a directive of its own; other packages are shown as a whole."""
    shown = {
        name
        for page in (DOCS / "reference" / "api").glob("*.md")
        for name in re.findall(r"^::: (\S+)", text_of(page), flags=re.MULTILINE)
    }
    assert sorted(name for name in shown if not exists(name)) == []
    assert {f"equilibria.{name}" for name in PUBLIC} <= shown
    described = {name.rpartition(".")[2] for name in shown} | {"State"}  # a type, which its page writes out
    assert sorted(set(equilibria.__all__) - described) == []
    listed = re.findall(r"`(\w+)`", text_of(DOCS / "reference" / "api" / "root.md"))
    assert sorted(set(equilibria.__all__) - set(listed)) == []


def test_the_page_of_recipes_has_every_recipe():
    from equilibria.lm.recipes import RECIPES

    named = set(re.findall(r"`([a-z][a-z0-9-]+)`", text_of("docs/reference/recipes.md")))
    assert sorted(set(RECIPES) - named) == []


@pytest.mark.parametrize("command", ["train", "evaluate", "generate", "report", "export", "convert", "prepare"])
def test_the_reference_has_every_flag_of_a_command(command):
    import typing

    import tyro

    options = importlib.import_module(f"equilibria.commands.{command}").Options
    hints = typing.get_type_hints(options, include_extras=True)
    positional = {name for name, hint in hints.items() if tyro.conf.Positional in getattr(hint, "__metadata__", ())}
    flags = {f"--{name.replace('_', '-')}" for name in hints if name not in positional | {"experiment"}}
    named = set(re.findall(r"--[a-z-]+", text_of("docs/reference/command_line.md")))
    assert len(flags) >= 2
    assert sorted(flags - named) == []


TABLES = {
    **dict.fromkeys(("attention", "copying", "faults", "kepler", "mixed", "precision", "product"), "table"),
    **dict.fromkeys(("solver_memory", "tuning"), "table"),
    **dict.fromkeys(("compile", "compiled_cell"), "text"),
}
"""Scripts of benchmarks/ that need no other library, and their function that makes a table of the committed rows."""


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_that_of_the_committed_result(name, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    rows = json.loads(text_of(f"benchmarks/results/{name}.json"))["rows"]
    table = getattr(importlib.import_module(name), TABLES[name])(rows)
    pages = [page for page in PAGES if f"<!-- {name} -->\n" in text_of(page)]
    assert [f"<!-- {name} -->\n{table}\n<!-- /{name} -->" in text_of(page) for page in pages] == [True]
