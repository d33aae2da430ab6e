"""Verbs, help, and the one place where errors become sentences."""

from __future__ import annotations

import importlib
import inspect
import io
import os
import shutil
import sys
import textwrap
import traceback
from collections.abc import Sequence

from equilibria.commands.errors import debugging, explain, unknown

VERBS = {
    "train": ("RECIPE", "train a model and watch it; writes a run folder"),
    "evaluate": ("RUN", "score the model of a run on held-out text"),
    "generate": ("RUN", "let the model of a run write text"),
    "report": ("RUN", "one HTML page with figures about a run"),
    "export": ("RUN", "the weights of a run as one safetensors file"),
    "prepare": ("CORPUS", "look at a corpus before training on it"),
}
"""Each verb, what it is given, and what it does. The module of the same name has ``main(arguments)``."""


def run(arguments: Sequence[str]) -> int:
    """Do what the command line says; returns the exit code. Nothing but help leaves as an exception."""
    debug = debugging() or "--debug" in arguments
    words = [word for word in arguments if word != "--debug"]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal without Unicode shows a question mark, and no error
            stream.reconfigure(errors="replace")
    try:
        code = _dispatch(words)
        sys.stdout.flush()
        return code
    except SystemExit as exit_:  # tyro has printed help
        return exit_.code if isinstance(exit_.code, int) else 0
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if debug:
            traceback.print_exc()
        sentence, code = explain(error)
        rank = os.environ.get("RANK", "0")  # of the processes of a torchrun
        if rank == "0" or code != 2:  # a wrong command line is wrong everywhere
            print(f"equilibria{'' if rank == '0' else f', rank {rank}'}: {sentence}", file=sys.stderr)
        return code


def _dispatch(words: Sequence[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0
    if words[0] == "--version":
        from importlib.metadata import version

        print(f"equilibria {version('equilibria')}")
        return 0
    if words[0] not in VERBS:
        raise unknown("verb", words[0], VERBS)
    return importlib.import_module(f"equilibria.commands.{words[0]}").main(words[1:])


def help_text() -> str:
    """What a newcomer needs: the verbs, the recipes, an example."""
    from equilibria.recipes import RECIPES

    verbs = {f"{verb} {given}": words for verb, (given, words) in VERBS.items()}
    recipes = {name: (inspect.getdoc(recipe) or "").partition("\n")[0] for name, recipe in RECIPES.items()}
    return f"""\
equilibria: deep equilibrium models, networks whose output is the fixed point of one cell.

Verbs
{_columns(verbs)}

Recipes for `equilibria train`; a function of your own is FILE.py:FUNCTION
{_columns(recipes)}

Example
  equilibria train tiny                               a few minutes, no download
  equilibria generate runs/tiny --prompt "The "
  equilibria train tiny --training.learning-rate 1e-3
  equilibria train tiny --resume                      go on where a run was stopped

`equilibria VERB --help` explains a verb; `equilibria train tiny --help` lists every number of a recipe."""


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
