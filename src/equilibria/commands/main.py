"""Verbs, help, and the one place where errors become sentences.

Only a verb loads PyTorch: what is imported here needs Python alone.
"""

from __future__ import annotations

import ast
import importlib
import os
import shutil
import sys
import textwrap
import traceback
from collections.abc import Sequence
from pathlib import Path

from equilibria.commands import terminal
from equilibria.commands.errors import debugging, explain, unknown
from equilibria.errors import UsageError
from equilibria.version import version

VERBS = {
    "train": ("RECIPE", "train a model and watch it; writes a run folder"),
    "evaluate": ("RUN", "score the model of a run on held-out text"),
    "generate": ("RUN", "let the model of a run write text"),
    "report": ("RUN", "one HTML page with figures about a run"),
    "export": ("RUN", "the weights of a run as one safetensors file"),
    "convert": ("CHECKPOINT", "a run from weights that the authors of DEQ, TrellisNet or TorchDEQ have published"),
    "doctor": ("RUN", "whether a run is whole, and what to do if not"),
    "prepare": ("CORPUS", "look at a corpus before training on it"),
}
"""Each verb, what it is given, and what it does. The module of the same name has ``main(arguments)``."""

CODES = "0 done, 1 failed, 2 wrong command line, 130 or 143 stopped by Ctrl-C or SIGTERM, 141 the output was closed"
"""Exit codes and what they say; the last is what a shell calls a process that wrote to a closed pipe."""


def run(arguments: Sequence[str]) -> int:
    """Do what the command line says; returns the exit code, one of ``CODES``. Nothing leaves as an exception."""
    terminal.open_streams()
    debug = debugging() or "--debug" in arguments
    try:
        with terminal.readable_warnings():
            code = _left([word for word in arguments if word != "--debug"])
            sys.stdout.flush()
            return code
    except KeyboardInterrupt:
        terminal.complain("\nStopped.")
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has had enough
        return 141
    except Exception as error:
        if debug:
            traceback.print_exc()
        said, code = explain(error)
        rank = os.environ.get("RANK", "0")  # of the processes of a torchrun
        if rank == "0" or code != 2:  # a wrong command line is wrong everywhere
            terminal.complain(f"equilibria{'' if rank == '0' else f', rank {rank}'}: {said}")
        return code
    finally:
        terminal.release()


def _left(words: Sequence[str]) -> int:
    """The exit code of the verb, also where it ends by SystemExit: tyro has printed help, or a recipe gives up."""
    try:
        return _dispatch(words)
    except SystemExit as exit_:
        if isinstance(exit_.__context__, BrokenPipeError):  # rich says it so
            raise exit_.__context__ from None
        if isinstance(exit_.code, str):
            terminal.complain(f"equilibria: {exit_.code}")
            return 1
        return exit_.code if isinstance(exit_.code, int) else 0


def _dispatch(words: Sequence[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0
    if words[0] == "--version":
        print(f"equilibria {version()}")
        return 0
    _check_text(words)
    if words[0] not in VERBS:
        raise unknown("verb", words[0], VERBS)
    return importlib.import_module(f"equilibria.commands.{words[0]}").main(words[1:])


def _check_text(words: Sequence[str]) -> None:
    """Refuse what a run cannot write down: its files are UTF-8, and so are the paths that safetensors takes."""
    for word in words:
        if "\0" in word or any("\ud800" <= letter <= "\udfff" for letter in word):
            raise UsageError(f"{word[:80]!r} is no text in UTF-8; rename the file or folder, or say it in UTF-8.")


def help_text() -> str:
    """The help for a newcomer: the verbs, the recipes, an example."""
    verbs = {f"{verb} {given}": words for verb, (given, words) in VERBS.items()}
    return f"""\
equilibria: deep equilibrium models, networks whose output is the fixed point of one cell.

Verbs
{_columns(verbs)}

Recipes for `equilibria train`; a function of your own is FILE.py:FUNCTION
{_columns(_recipes())}

Example
  equilibria generate tiny                            a trained model that ships with the library
  equilibria train tiny                               a few minutes, no download
  equilibria generate runs/tiny --prompt "The "
  equilibria train tiny --training.learning-rate 1e-3
  equilibria train tiny --resume                      continue where a run was stopped

`equilibria VERB --help` explains a verb; `equilibria train tiny --help` lists every number of a recipe.
Exit codes: {CODES}."""


def _recipes() -> dict[str, str]:
    """Each recipe with the first line of its docstring, read from the files, since importing them loads PyTorch."""
    folder = Path(__file__).parents[1] / "lm" / "recipes"
    trees = {file.name: ast.parse(file.read_text(encoding="utf-8")) for file in folder.glob("*.py")}
    functions = [part for tree in trees.values() for part in tree.body if isinstance(part, ast.FunctionDef)]
    lines = {function.name: (ast.get_docstring(function) or "").partition("\n")[0] for function in functions}
    (table,) = (part.value for part in trees["__init__.py"].body if isinstance(part, ast.AnnAssign))
    assert isinstance(table, ast.Dict)
    pairs = zip(table.keys, table.values, strict=True)
    return {
        key.value: lines[value.id]
        for key, value in pairs
        if isinstance(key, ast.Constant) and isinstance(value, ast.Name)
    }


def _columns(rows: dict[str, str]) -> str:
    width = max(map(len, rows), default=0)
    columns = min(100, shutil.get_terminal_size().columns)
    return "\n".join(
        textwrap.fill(
            words.replace("``", "`"),
            width=max(columns, width + 30),
            initial_indent=f"  {name:<{width}}   ",
            subsequent_indent=" " * (width + 5),
        )
        for name, words in rows.items()
    )
