"""What reaches a terminal, and how the command ends: nothing steers it, and every end has its exit code."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from rich.console import Console

from equilibria.__main__ import main
from equilibria.commands import sample, terminal
from equilibria.commands.recipe import experiment_of
from equilibria.lm.report import formats
from equilibria.lm.report.display import Display, summary_table
from equilibria.lm.report.summary import Row
from small_run import fails, furnish

OWNED = "\x1b]0;owned\x07"
"""Sets the title of a terminal."""
RAW = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""What may not reach one."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with a run on a text that holds escape sequences; its name is markup for rich."""
    folder = tmp_path_factory.mktemp("trained")
    furnish(folder)
    for file in (folder / "text").iterdir():
        file.write_text(file.read_text().replace("c", OWNED))
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.chdir(folder)
        patch.setitem(sample.SAMPLE, "character", 12)
        words = ["--data", "text", "--stages.0.steps", "1", "--stages.1.steps", "1", "--quiet", "--out", "[red]run"]
        assert main(["train", "recipe.py:small", *words]) == 0
    return folder


@pytest.fixture
def place(tmp_path, trained, monkeypatch, one_figure) -> Path:
    """A copy of that folder, which is where the commands run."""
    monkeypatch.chdir(shutil.copytree(trained, tmp_path / "place"))
    monkeypatch.setenv("COLUMNS", "120")
    return Path()


class Terminal(io.StringIO):
    """A stdout that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain é ü 漢 \n\t", "plain é ü 漢 \n\t"),
        (OWNED, r"\x1b]0;owned\x07"),
        ("a\rb\x00\x7f\x9b31m", r"a\rb\x00\x7f\x9b31m"),
        ("\u202eabc\u202c\u2066\u2069\u200f", r"\u202eabc\u202c\u2066\u2069\u200f"),
        ("bad\udcff", r"bad\udcff"),
    ],
)
def test_control_characters_are_visible(text, shown):
    assert terminal.visible(text) == shown


def test_a_long_sentence_loses_its_middle():
    said = terminal.sentence("a" * 5000 + "the end")
    assert len(said) < 2100
    assert said.endswith("the end")


@pytest.mark.parametrize("verb", ["report", "evaluate"])
def test_an_error_does_not_steer_the_terminal(place, capsys, verb):
    said = fails(capsys, verb, f"none\x1b[31m\u202e{OWNED}")
    assert r"none\x1b[31m\u202e\x1b]0;owned\x07" in said
    assert not RAW.search(said)


def test_generate_keeps_the_bytes_in_a_pipe_and_shows_them_on_a_terminal(place, capsys, monkeypatch):
    words = ["generate", "[red]run", "--prompt", f"ab{OWNED}", "--length", "40", "--seed", "1"]
    assert main(words) == 0
    piped = capsys.readouterr().out
    assert piped.startswith(f"ab{OWNED}")
    assert RAW.search(piped[len(OWNED) + 2 :])
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert main(words) == 0
    assert sys.stdout.getvalue() == terminal.visible(piped)
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert main([*words[:4], "a\x1b", *words[4:]]) == 0
    assert not RAW.search(sys.stdout.getvalue())


def test_tables_are_literal(place, capsys):
    assert main(["prepare", "text-folder", "--data", "text", "--unit", "character"]) == 0
    said = capsys.readouterr().out
    assert r"\x1b" in said
    assert not RAW.search(said)
    assert main(["evaluate", "[red]run"]) == 0
    assert "[red]run, best checkpoint" in capsys.readouterr().out
    console = Console(file=io.StringIO(), width=80)
    console.print(summary_table([Row("[b]a\x1b", "[b]c", "[/d]e")], f"[i]{OWNED}"))
    said = console.file.getvalue()
    assert all(words in said for words in (r"[b]a\x1b", "[b]c", "[/d]e", r"[i]\x1b]0;owned\x07"))


@pytest.mark.parametrize("live", [False, True])
def test_the_names_of_stages_are_literal(place, live):
    console = Console(file=io.StringIO(), force_terminal=live, width=120)
    display = Display(console, experiment_of("recipe.py:small"), unit=f"[red]{OWNED}")
    with display.running():
        display.show({"event": "stage", "step": 1, "stage": f"[red]{OWNED}"})
        event = {"event": "step", "step": 2, "stage": f"[red]{OWNED}", "loss": 1.0, "seconds": 1.0}
        display.show(event)
        display.show({**event, "event": "valid", "nats": 1.0})
    said = console.file.getvalue()
    assert OWNED not in said
    assert r"[red]\x1b]0;owned\x07" in said


def test_warnings_and_logs_are_sentences():
    with terminal.readable_warnings():
        assert warnings.formatwarning(UserWarning(f"a\n {OWNED}"), UserWarning, "file.py", 3) == (
            "equilibria: warning: a \\x1b]0;owned\\x07\n"
        )
        record = logging.makeLogRecord({"msg": "%s is damaged", "args": (OWNED,)})
        assert logging.lastResort.format(record) == r"equilibria: warning: \x1b]0;owned\x07 is damaged"
    assert warnings.formatwarning(UserWarning("a"), UserWarning, "file.py", 3).startswith("file.py:3: UserWarning")
    assert logging.lastResort.format(record) == f"{OWNED} is damaged"


def strict(text: str) -> dict:
    """The one JSON object that ``text`` is."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    assert text.isascii()
    return json.loads(text, parse_constant=refuse)


def test_evaluate_speaks_json(place, capsys):
    assert main(["evaluate", "[red]run", "--json", "--max-segments", "3"]) == 0
    found = strict(capsys.readouterr().out)
    assert (found["run"], found["step"], found["split"], found["unit"]) == ("[red]run", 2, "valid", "character")
    assert found["bits"] == pytest.approx(found["nats"] * 1.442695, rel=1e-5)
    assert found["tokens"] == found["setting"]["tokens"] == 24
    assert 0 <= found["forward"]["converged"] <= 1


def test_prepare_speaks_json(place, capsys):
    assert main(["prepare", "text-folder", "--data", "text", "--unit", "character", "--json"]) == 0
    found = strict(capsys.readouterr().out)
    assert found["splits"]["train"] == {
        "tokens": 1240,
        "predicted_bytes": 1239,  # ASCII, after the first character
        "sequences": None,
        "sequence_length": None,
        "unknown_share": None,
    }
    assert {one["token"] for one in found["most_frequent"]} >= {"a", "\x1b"}
    assert len(found["baseline"]) == 4
    assert main(["prepare", "copying", "--blank", "5", "--json"]) == 0
    found = strict(capsys.readouterr().out)
    assert found["splits"]["train"]["sequences"] == 20000
    assert found["memoryless_nats"] > 0


def test_what_is_not_finite_is_null():
    assert strict(formats.strict_json({"a": [float("nan"), (1.5, float("-inf"))]})) == {"a": [None, [1.5, None]]}


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        pytest.param("--help >&-", 0, "", marks=pytest.mark.slow),
        ("--help >&- 2>&- <&-", 0, ""),
        ("prepare pbt 2>&-", 2, ""),
        pytest.param("generate '[red]run' --prompt ab --length 3 >&-", 0, "note: ", marks=pytest.mark.slow),
        pytest.param("evaluate '[red]run' >&-", 0, "", marks=pytest.mark.slow),
        ("--help >/dev/full", 1, "There is no space left on the disk"),
    ],
)
def test_a_closed_or_full_output_is_no_accident(place, line, code, said):
    command = f'exec "{sys.executable}" -m equilibria {line}'
    result = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=120, check=False)
    assert (result.returncode, result.stdout) == (code, "")
    assert said in result.stderr
    assert result.stderr.count("\n") == bool(said)


@pytest.mark.parametrize(
    "line",
    [
        "generate '[red]run' --prompt ab",
        *(pytest.param(line, marks=pytest.mark.slow) for line in ("--help", "evaluate --help", "prepare copying")),
    ],
)
def test_a_reader_that_has_left_ends_every_verb_quietly(place, line):
    command = f'"{sys.executable}" -m equilibria {line}; echo $? >&2'
    reader = subprocess.Popen(["sh", "-c", f"{{ {command}; }} | true"], stderr=subprocess.PIPE, text=True)
    assert reader.communicate(timeout=120)[1] == "141\n"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["train", "tiny", "--training.threads", "1000000"], "Devices(threads=1000000): it must be at most 1,024"),
        (["train", "tiny", "--training.threads", "1000"], "this machine takes from 1 to "),
        (["train", "tiny", "--warmup", "99999"], "the warm-up is longer"),
        (
            ["train", "tiny", "--training.weight-decay", "nan"],
            "Optimisation(weight_decay=nan): weight_decay is a finite number; try 0.0.",
        ),
        (["train", "tiny", "--stages.0.penalty", "inf"], "Stage(penalty=inf): penalty is a finite number; try 0.0."),
        (["train", "tiny", "--model.cell.std", "nan"], "TransformerConfig(std=nan): std is a finite number; try 0.01."),
        (["train", "tiny", "--training.weight-decay", "1e300"], "weight_decay=1e+300"),
        (["train", "tiny", "--training.log-every", "9" * 30], "--training.log.log-every 999"),
        (["train", "tiny", "--training.seed", "9" * 30], "it must be at most 2⁶³ − 1; try 0."),
        (["train", "tiny\x00"], "is no text in UTF-8"),
        (["train", "tiny", "--name", "a\udcff"], r"'a\udcff' is no text in UTF-8"),
        (["evaluate", "[red]run", "--rtol", "nan"], "--rtol nan: it takes a finite number"),
        (["evaluate", "[red]run", "--rtol", "-1"], "--rtol -1.0: it must be at least 0"),
        (["evaluate", "[red]run", "--max-evals", "0"], "--max-evals 0: it must be at least 1"),
        (["evaluate", "[red]run", "--batch-size", "9999"], "try batch_size="),
        (["prepare", "copying", "--blank", "0"], "--blank 0: it counts steps and is at least 1"),
        (["generate", "[red]run", "--prompt", "a", "--temperature", "nan"], "--temperature nan: it takes a finite"),
        (["generate", "[red]run", "--prompt", "a", "--temperature", "-1"], "temperature=-1.0"),
        (["generate", "[red]run", "--prompt", "a", "--top-k", "0"], "top_k=0"),
        (["generate", "[red]run", "--prompt", "a", "--top-p", "nan"], "--top-p nan: it takes a finite number"),
        (["generate", "[red]run", "--prompt", "a", "--top-p", "0"], "top_p=0.0"),
        (["generate", "[red]run", "--prompt", "a", "--top-p", "2"], "top_p=2.0"),
        (["generate", "[red]run", "--prompt", "a", "--seed", "-1"], "seed=-1"),
        (["generate", "[red]run", "--prompt", "a", "--memory-length", "-1"], "--memory-length -1"),
    ],
)
def test_a_bad_value_is_wrong_usage(place, capsys, words, sentence):
    assert sentence in fails(capsys, *words)


@pytest.mark.parametrize("temperature", ["1e-45", "5e-324", "1e308"])
def test_no_temperature_is_unexpected(place, capsys, temperature):
    words = ["generate", "[red]run", "--prompt", "ab", "--length", "10"]
    assert main([*words, "--temperature", temperature]) == 0
    assert len(capsys.readouterr().out) == 13


def test_help_says_what_the_exit_codes_mean(capsys):
    assert main(["--help"]) == 0
    assert (
        "Exit codes: 0 done, 1 failed, 2 wrong command line, 130 or 143 stopped by Ctrl-C or SIGTERM"
        in capsys.readouterr().out
    )


def test_a_recipe_that_gives_up_has_failed(place, capsys):
    Path("recipe.py").write_text("import sys\n\ndef small():\n    sys.exit('no\\x1b more')\n")
    assert r"no\x1b more" in fails(capsys, "train", "recipe.py:small", code=1)
