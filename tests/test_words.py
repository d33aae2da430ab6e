"""The words of the project: retired words stay out of names, comments, docstrings and error sentences."""

from __future__ import annotations

import ast
import dataclasses
import functools
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCOPE = ("src", "examples", "docs", "README.md")
"""Python and Markdown files that are checked, and folders of them. Add a part of the tree once its prose is revised."""

ALLOWED: dict[tuple[str, str], str] = {
    ("src/equilibria/lm/training/log.py", "nats"): "the field of an event, which readers of metrics.jsonl know",
    **{
        ("docs/howto/migrate.md", rule): "the names of version 0.1"
        for rule in ("gap", "Broyden.memory", "half", "twin")
    },
    ("docs/reference/cheat_sheet.md", "Watch"): "a comment that begins with the verb",
    ("docs/concepts/generation.md", "twin"): "the folder that a benchmark wrote",
}
"""Exceptions on purpose, {(file, name of the rule): reason}. The test fails if one of them is not needed."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """A retired word: patterns for the kinds of text in which it must not occur.

    A space in a pattern stands for any white space. Letters match in both cases, except in names.
    """

    name: str
    reason: str
    """What to write instead."""
    names: str = ""
    """For identifiers, in full."""
    arguments: str = ""
    """For parameters, keywords and fields of classes alone, in full."""
    prose: str = ""
    """For comments, docstrings and strings."""
    docstrings: str = ""
    """For the beginning of docstrings."""

    def pattern(self, kind: str) -> re.Pattern[str]:
        """The pattern for a kind of text, compiled."""
        return re.compile(getattr(self, kind).replace(" ", r"\s+"), re.IGNORECASE if kind == "prose" else 0)


UNIT = "(step|token|sample|stream|layer|position|second|batch|epoch|iteration|evaluation|row|leaf|head|file|time step)"
OTHER = r"(?:of|in|to|for|with|without|as|on|at|by|from|per|than|is|and|or|if|that|when|after|before|\w+s)\b"
"""Words between two nouns that "a" does not join as "per" would: prepositions, conjunctions and verbs."""
RULES = (
    # the table "Words" of the design
    Rule("Shape", "a configuration is a …Config; a shape is the shape of a tensor", names=r"_*[A-Z]\w*Shape"),
    Rule("half", "bfloat16 storage is history_dtype=torch.bfloat16", arguments="half", prose=r"\bhalf=(True|False)\b"),
    Rule("Judge", "Progress and Outcome", names=r"\w*(Judge|judge|Verdict|verdict)\w*", prose=r"``(Judge|Verdict)``"),
    Rule("nats", "the field is nll; nats are its unit", names=r"(\w*_)?nats(_\w*)?", prose=r"``nats``|\.nats\b"),
    Rule("gap", "residual r, or relative residual", names=r"(\w*_)?gaps?(_\w*)?", prose=r"\bgaps?\b"),
    Rule("product", "VJP", prose=r"\bproducts? (with|by|of) Jᵀ"),
    Rule(
        "twin",
        "baseline, explicit baseline",
        names=r"(\w*_)?(yardsticks?|twins?)(_\w*)?",
        prose=r"\b(yardstick|twin)s?\b",
    ),
    Rule("Watch", "ConvergencePolicy; accumulation", names="Watch|Passes"),
    Rule("Broyden.memory", "Broyden(rank=…)", prose=r"Broyden\(memory="),
    Rule("fresh", "resets, for streams that begin again", names=r"(\w*_)?fresh"),
    Rule("hidden", "key_padding_mask", names=r"(\w*_)?hidden_(keys|mask)", prose=r"\bhidden keys\b"),
    Rule("present", "valid, or new", arguments="present"),
    Rule(
        "rows of text",
        "streams, or texts",
        prose=r"\brows of (text|different lengths|one length)\b|\btext of (a|each) row\b",
    ),
    Rule(
        "a for per",
        "per step, per sample",
        prose=rf"\b(ms|µs|bytes|[KMG]iB|(one|an?) (\w+ )?(?!{OTHER})\w+) an? {UNIT}\b",
    ),
    Rule(
        "many for per",
        "per step, per sample",
        prose=rf"\b(seconds|evaluations|steps|iterations|tokens|numbers|nodes|lines|slots|states|times) an? {UNIT}\b",
    ),
    # constructions that must be read twice
    Rule("relative clause", "begin with a noun", docstrings=r"(What|Those|That|Of|And|Or|Nor)\b"),
    Rule("that is none", "say what it is", prose=r"\bthat (is|are) none\b"),
    Rule("anew", "again", prose=r"\banew\b"),
    Rule("nobody", "say who, or use the passive", prose=r"\bnobody\b"),
    Rule("go on", "continue, pass on", prose=r"\b(go|goes|going) on (without|with|as)\b"),
    Rule("let go", "release", names="let_go", prose=r"\blet go\b"),
    Rule("in the place of", "instead of, replaces", prose=r"\bin the place of\b"),
    Rule("to be had", "available", prose=r"\bto be had\b"),
    Rule("courtesy", "call, pass, request", prose=r"\b(is|are|was|were|be)( not)? (asked|handed)\b"),
    Rule("which is which", "name both", prose=r"\bwhich is which\b"),
    Rule("as one likes", "any, to any depth", prose=r"\bas (one|it|he) likes\b"),
    Rule("one's own", "your own", prose=r"\b(one|somebody)'s own\b"),
    Rule("without a word", "silently", prose=r"\bwithout a word\b"),
    Rule("left out", "dropped, omitted", prose=r"\bsamples? (\w+ )*left out\b|\bleav(e|ing) samples out\b"),
    Rule("told", "which is reported, or: a warning says so", prose=r"\bthat (is|was) told\b"),
)


def texts(file: Path) -> Iterator[tuple[int, str, str]]:
    """(line, kind, text) of everything in a file that somebody reads."""
    source = file.read_text(encoding="utf-8")
    yield from markdown(source) if file.suffix == ".md" else python(source)


def markdown(source: str) -> Iterator[tuple[int, str, str]]:
    """Text outside of code blocks as prose, and the words of the blocks as names."""
    line = 1
    for place, part in enumerate(re.split(r"^```", source, flags=re.MULTILINE)):
        if place % 2:
            yield from ((line, "names", word) for word in re.findall(r"\b[^\W\d]\w*", part))
        else:
            yield line, "prose", part
        line += part.count("\n")


def python(source: str) -> Iterator[tuple[int, str, str]]:
    """Names, arguments, docstrings, other strings, and comments, of which consecutive lines are one."""
    for node in ast.walk(ast.parse(source)):
        line = getattr(node, "lineno", 0)
        for field in ("id", "attr", "arg", "name", "asname"):
            name = getattr(node, field, None)
            if isinstance(name, str):
                yield line, "names", name
        if isinstance(node, ast.arg | ast.keyword) and node.arg:
            yield line, "arguments", node.arg
        if isinstance(node, ast.ClassDef):
            fields = (part.target for part in node.body if isinstance(part, ast.AnnAssign))
            yield from ((field.lineno, "arguments", field.id) for field in fields if isinstance(field, ast.Name))
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield line, "prose", node.value
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield line, "docstrings", node.value.value
    yield from ((line, "prose", text) for line, text in comments(source))


def comments(source: str) -> Iterator[tuple[int, str]]:
    block, first, last = [], 0, -1
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            line = token.start[0]
            if line != last + 1 and block:
                yield first, " ".join(block)
                block = []
            first = first if block else line
            block.append(token.string.lstrip("# "))
            last = line
    if block:
        yield first, " ".join(block)


def files() -> list[Path]:
    found = []
    for entry in SCOPE:
        path = ROOT / entry
        assert path.exists(), f"{entry} does not exist; correct SCOPE"
        found += sorted(path.rglob("*.py")) + sorted(path.rglob("*.md")) if path.is_dir() else [path]
    return found


PATTERNS = {
    kind: [(rule, rule.pattern(kind)) for rule in RULES if getattr(rule, kind)]
    for kind in ("names", "arguments", "prose", "docstrings")
}


@functools.cache
def matches(kind: str, text: str) -> tuple[tuple[int, Rule, str], ...]:
    """(line breaks before it, rule, words) of each match in a text."""
    if kind == "prose":
        every = ((rule, match) for rule, pattern in PATTERNS[kind] for match in pattern.finditer(text))
        return tuple((text.count("\n", 0, match.start()), rule, match[0]) for rule, match in every)
    way = re.Pattern.match if kind == "docstrings" else re.Pattern.fullmatch
    tried = ((rule, way(pattern, text.lstrip())) for rule, pattern in PATTERNS[kind])
    return tuple((0, rule, match[0]) for rule, match in tried if match)


def findings(file: Path) -> Iterator[tuple[int, Rule, str]]:
    """(line, rule, words) of each match in a file."""
    for line, kind, text in texts(file):
        yield from ((line + lines, rule, words) for lines, rule, words in matches(kind, text))


def test_retired_words_do_not_come_back():
    sentences, used = [], set()
    for file in files():
        name = file.relative_to(ROOT).as_posix()
        for line, rule, match in findings(file):
            if (name, rule.name) in ALLOWED:
                used.add((name, rule.name))
            else:
                sentences.append(
                    f"{name}:{line}: {' '.join(match.split())!r} (rule {rule.name!r}); write: {rule.reason}"
                )
    assert not sentences, "\n".join(["", *sorted(set(sentences))])
    assert used == set(ALLOWED), f"exceptions without a use: {sorted(set(ALLOWED) - used)}"


@pytest.mark.parametrize(
    ("source", "rule"),
    [
        ("class TransformerShape: ...", "Shape"),
        ("nats_per_token = 1", "nats"),
        ("solver = Anderson(half=True)", "half"),
        ('"""What a solve gives back."""', "relative clause"),
        ("# the products\n# with Jᵀ of f", "product"),
        ("x = f'{y} ms a token'", "a for per"),
        ('"""One cache slot a position."""', "a for per"),
        ("def f():\n    raise ValueError('the user is\\n asked')", "courtesy"),
    ],
)
def test_each_kind_of_text_is_read(source, rule, tmp_path):
    """Names, arguments, docstrings, comments over two lines, f-strings and error sentences."""
    file = tmp_path / "a.py"
    file.write_text(source, encoding="utf-8")
    assert rule in {found.name for _, found, _ in findings(file)}


def test_markdown_is_read_inside_and_outside_of_code(tmp_path):
    file = tmp_path / "a.md"
    file.write_text("Now\nnobody reads this.\n\n```python\nout.nats\n```\n", encoding="utf-8")
    assert {(line, rule.name) for line, rule, _ in findings(file)} == {(2, "nobody"), (4, "nats")}
