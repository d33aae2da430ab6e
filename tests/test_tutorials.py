"""The tutorials: each page is one program that runs from top to bottom and prints what the page shows."""

import json
import math
import os
import re
import subprocess
import sys
import threading
from http.client import HTTPConnection
from http.server import HTTPServer
from pathlib import Path

import pytest

import equilibria
from slow_cases import all_but

FOLDER = Path(__file__).parent.parent / "docs" / "tutorials"
TOLERANCE = {"see": 0.05, "vision": 0.35, "graph": 0.2, "force_field": 0.4}
"""By how much a number may differ from the page's, relative to it: what a training ends with depends on the CPU."""
NUMBER = r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]\d+)?"


END_OF_BLOCK = "\f"


def program(text):
    """The Python blocks of a page, each on the lines where the page has it, so that a traceback says where to look."""
    lines, inside = [], False
    for line in text.splitlines():
        ends = inside and line == "```"
        lines.append(f"print({END_OF_BLOCK!r})" if ends else line if inside else "")
        inside = line == "```python" or (inside and not ends)
    return "\n".join(lines)


def outputs(text):
    """The output that the page shows under each of its Python blocks; empty where none follows."""
    blocks = re.compile(
        r'^```python\n.*?^```\n(?:\n```text title="output"\n(.*?)^```\n)?', flags=re.DOTALL | re.MULTILINE
    )
    return [found[1] or "" for found in blocks.finditer(text)]


def differences(printed, shown, tolerance):
    """The differences between two outputs: other words, or the pairs of numbers that are too far from each other.

    Line breaks do not count, since the page folds long lines; seconds may be any. A number in scientific notation is an
    error or a residual, of which the size is what matters: it may be five times as large, or as small.
    """
    words = [re.sub(NUMBER, "#", " ".join(text.split())) for text in (printed, shown)]
    if words[0] != words[1]:
        return words
    pairs = zip(re.findall(NUMBER, printed), re.findall(NUMBER, shown), strict=True)
    return [pair for pair in pairs if not alike(*pair, tolerance=tolerance)]


def alike(printed, shown, *, tolerance):
    a, b = (float(number.replace(",", "")) for number in (printed, shown))
    if "e" in shown:
        return a == b or (a * b > 0 and abs(math.log(a / b)) <= math.log(5))
    last_digit = 10.0 ** -len(shown.partition(".")[2])
    return abs(a - b) <= tolerance * abs(b) + 1.01 * last_digit


def seconds_left_out(text):
    return re.sub(rf"{NUMBER} (ms|s)\b", r"some \1", text)


def test_what_counts_as_the_same_output():
    assert differences("loss 0.51\n  after 3 steps", "loss 0.50 after 3 steps", 0.1) == []
    assert differences("loss 0.61 after 3 steps", "loss 0.50 after 3 steps", 0.1) == [("0.61", "0.50")]
    assert differences("error 1e-06", "error 3e-06", 0.1) == []
    assert differences("error 1e-06", "error 6e-06", 0.1) == [("1e-06", "6e-06")]
    assert differences("1,000 bytes", "1,050 bytes", 0.1) == []
    assert differences("3 of 4 converged", "3 of 4 are done", 0.1) == ["# of # converged", "# of # are done"]
    assert seconds_left_out("12 ms, 0.3 s, 4 steps") == "some ms, some s, 4 steps"


def printed_by(text, tmp_path):
    """What each block prints, as a reader runs the page: one file, a process of its own. A warning is an error."""
    file = tmp_path / "page.py"
    file.write_text(program(text), encoding="utf-8")
    own = "ignore:`torch.jit.script`"  # PyTorch's, at the first tensor of forward mode
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", "-W", own, str(file)]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    *printed, rest = run.stdout.split(END_OF_BLOCK)
    assert rest == "\n"
    return printed


SHORTENED = {
    "vision": ("in train[torch.randperm(len(train))].split(32)", "in train[:96].split(32)"),
    "force_field": ("steps=80", "steps=10"),
}
"""Pages that train for many seconds, and the change that makes their trainings short."""


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=[pytest.mark.slow] if page in SHORTENED else []) for page in TOLERANCE]
)
def test_the_blocks_print_what_the_page_shows(page, tmp_path):
    text = (FOLDER / f"{page}.md").read_text(encoding="utf-8")
    pairs = [map(seconds_left_out, pair) for pair in zip(printed_by(text, tmp_path), outputs(text), strict=True)]
    assert [wrong for pair in pairs if (wrong := differences(*pair, TOLERANCE[page]))] == []


@pytest.mark.parametrize("page", all_but(["force_field"], list(SHORTENED)))
def test_after_short_trainings_the_blocks_print_the_words_that_the_page_shows(page, tmp_path):
    text = (FOLDER / f"{page}.md").read_text(encoding="utf-8")
    assert text.count(SHORTENED[page][0]) == 1
    found = printed_by(text.replace(*SHORTENED[page]), tmp_path)
    words = [[re.sub(NUMBER, "#", " ".join(block.split())) for block in blocks] for blocks in (found, outputs(text))]
    assert words[0] == words[1]


def test_every_page_is_run():
    assert {path.stem for path in FOLDER.glob("*.md")} - {"index"} == {*TOLERANCE, "language"}


LANGUAGE = FOLDER / "language.md"
SHORTER = (r"--steps \d+", "--steps 40")
"""The change that the test makes in the commands of that page, so that they take seconds."""


def blocks(text, kind):
    return re.findall(rf"^```{kind}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(equilibria, "load"), reason="equilibria.load and the recipe `text` do not exist yet")
def test_the_commands_of_the_language_lesson_run(tmp_path):
    """From top to bottom: the commands by a shell, the Python blocks as one program per block; all but the service."""
    command = tmp_path / "equilibria"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m equilibria "$@"\n')
    command.chmod(0o755)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    for kind, code in re.findall(
        r"^```(bash|python)\n(.*?)^```", LANGUAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    ):
        words = ["bash", "-ec", re.sub(*SHORTER, code)] if kind == "bash" else [sys.executable, "-c", code]
        if "serve_forever" not in code:
            run = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
            assert run.returncode == 0, f"{code}\n{run.stderr}"


class Parrot:
    """Stands for a trained model."""

    def generate(self, prompt, *, length):
        if "Ω" in prompt:
            raise ValueError("The character 'Ω' is not among the characters of the vocabulary.")
        return (prompt * length)[:length]


@pytest.fixture
def ask(monkeypatch):
    """A function that sends bytes to the service of the language lesson and returns status and answer."""
    monkeypatch.setattr(equilibria, "load", lambda path: Parrot(), raising=False)
    (code,) = [code for code in blocks(LANGUAGE.read_text(encoding="utf-8"), "python") if "serve_forever" in code]
    names = {"__name__": "serve"}
    exec(code, names)
    names["Handler"].log_message = lambda *words: None
    with HTTPServer(("127.0.0.1", 0), names["Handler"]) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()

        def post(body):
            connection = HTTPConnection(*server.server_address)
            connection.request("POST", "/", body)
            response = connection.getresponse()
            found = response.status, json.loads(response.read())
            connection.close()
            return found

        yield post
        server.shutdown()
        thread.join()


WRONG = "prompt is a text, and length a whole number from 1 to 1000"


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ('{"prompt": "ab", "length": 3}', 200, {"text": "aba"}),
        ('{"prompt": "Ω"}', 400, {"error": "The character 'Ω' is not among the characters of the vocabulary."}),
        ('{"prompt": "ab", "length": 0}', 400, {"error": WRONG}),
        ('{"prompt": "ab", "length": true}', 400, {"error": WRONG}),
        ("[]", 400, {"error": "send a JSON object"}),
        ("{", 400, {"error": "send a JSON object"}),
        ("", 400, {"error": "send a JSON object"}),
    ],
)
def test_the_service_of_the_language_lesson_answers(ask, body, status, said):
    assert ask(body.encode()) == (status, said)
