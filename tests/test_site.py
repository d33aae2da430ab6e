"""The documentation, as a site and in the repository: links, pictures, tables, formulas, and the files it needs."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
ALL = pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda path: path.relative_to(ROOT).as_posix())
SITE = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
SETTINGS = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")


def prose(page: Path) -> str:
    """The page without its code."""
    return re.sub(r"^```.*?^```|`[^`\n]+`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def targets(page: Path, mark: str = "") -> list[Path]:
    """The files to which the page's links lead, those that begin with ``mark`` alone."""
    links = re.findall(re.escape(mark) + r"\[[^\]]*\]\(([^)\s#]+)", prose(page))
    return [(page.parent / link).resolve() for link in links if "://" not in link]


def named(ending: str) -> list[str]:
    """The files with this ending that the settings of the site name."""
    return re.findall(rf"^\s*- (?:[^:#\n]+: )?(\S+\.{ending})\b", SETTINGS, flags=re.MULTILINE)


@ALL
def test_relative_links_lead_to_a_file_of_the_repository(page):
    assert [path for path in targets(page) if not (path.exists() and path.is_relative_to(ROOT))] == []


def anchors(page: Path) -> set[str]:
    """The anchors of the page's headings, as the site makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


@ALL
def test_links_to_a_section_lead_to_a_heading(page):
    links = re.findall(r"\[[^\]]*\]\(([^)\s#:]*)#([^)\s]+)\)", prose(page))
    wrong = [(path, name) for path, name in links if name not in anchors((page.parent / path) if path else page)]
    assert wrong == []


@SITE
def test_links_and_pictures_of_the_site_lie_inside_it(page):
    assert [path for path in targets(page) if not path.is_relative_to(DOCS)] == []


def test_every_picture_is_shown():
    shown = {path for page in (ROOT / "README.md", *PAGES) for path in targets(page, "!")}
    assert shown == set((DOCS / "pictures").iterdir())


def test_the_navigation_names_every_page_once():
    assert sorted(named("md")) == [page.relative_to(DOCS).as_posix() for page in PAGES]


def test_the_files_that_every_page_loads_are_in_the_repository():
    files = named("css") + named("js")
    assert {"assets/katex/katex.min.css", "assets/katex/katex.min.js", "assets/katex/auto-render.min.js"} < set(files)
    assert [name for name in files if not (DOCS / name).is_file()] == []
    assert "://" not in SETTINGS
    assert "font: false" in SETTINGS  # otherwise the theme's come from another host


def test_the_fonts_of_formulas_are_those_that_the_style_names():
    katex = DOCS / "assets" / "katex"
    urls = re.findall(r"url\(([^)]+)\)", (katex / "katex.min.css").read_text(encoding="utf-8"))
    assert sorted(urls) == sorted(path.relative_to(katex).as_posix() for path in (katex / "fonts").iterdir())


@ALL
def test_the_rows_of_a_table_have_as_many_cells_as_its_head(page):
    ragged, cells = [], None
    for line in page.read_text(encoding="utf-8").splitlines():
        count = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else None
        if cells is not None and count not in (None, cells):
            ragged.append(line)
        cells = count if cells is None or count is None else cells
    assert ragged == []


@ALL
def test_latex_stands_between_dollars(page):
    rest = re.sub(r"\$\$.+?\$\$|\$[^$]+\$", "", prose(page), flags=re.DOTALL)
    assert re.findall(r"\$|\\[A-Za-z]+", rest) == []


@SITE
def test_code_says_its_language(page):
    fences = re.findall(r"^```(.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert all(fences[::2])


@ALL
def test_lines_of_code_are_seen_as_a_whole(page):
    """On a window of 1300 pixels a block of code shows 100 characters per line, and the rest after scrolling."""
    blocks = re.findall(r"^```.*?^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    assert [line for block in blocks for line in block.splitlines() if len(line) > 100] == []


def test_a_question_of_choice_has_at_most_five_answers():
    tables = re.findall(r"(?:^\|.*\n)+", (DOCS / "howto" / "choose.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(tables) == 5
    assert all(len(table.splitlines()) - 2 <= 5 for table in tables)
