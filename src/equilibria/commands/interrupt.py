"""A training that is interrupted by a signal: it writes a checkpoint, and says how to continue."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence

from equilibria.lm.ranks import ALONE, Ranks
from equilibria.lm.runs import checkpoint
from equilibria.lm.runs.run import Run
from equilibria.lm.training.trainer import Trainer


class Asked:
    """Handles Ctrl-C, and SIGTERM as before a machine is taken away: the training writes a checkpoint and ends.

    A second signal stops it at once.
    """

    def __init__(self) -> None:
        self.number = int(signal.SIGINT)
        """The last signal."""

    @contextlib.contextmanager
    def heard(self, trainer: Trainer) -> Iterator[None]:
        """Inside this context the signals tell the trainer to leave."""

        def leave(number: int, frame: object) -> None:
            self.number = number
            if trainer.leaving:
                raise KeyboardInterrupt
            trainer.leaving = True
            if number == signal.SIGINT:
                os.write(2, b"\nStopping after this step, with a checkpoint; Ctrl-C again stops at once.\n")

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def interrupted(run: Run, recipe: Sequence[str], step: int, ranks: Ranks = ALONE) -> str:
    """The message after a signal. It names the last step, and how to continue the training with as many processes."""
    if run.replacing and run.folder != run.path:
        return (
            f"Stopped at step {step:,}, before the first checkpoint: {run.path} holds the old run, as it was, and "
            "--resume would continue that one; give the same command again."
        )
    launcher = [] if ranks.parallel == "none" else ["torchrun", "--nproc-per-node", str(ranks.size), "-m"]
    again = [*launcher, "equilibria", "train", *recipe, "--out", str(run.path), "--resume"]
    kept = checkpoint.all_in(run.checkpoints)
    place = f"from the checkpoint {kept[-1].name}" if kept else "from the beginning, for lack of a checkpoint"
    return f"Stopped at step {step:,}; this continues {place}:\n{command(again)}"


def command(words: Sequence[str], width: int | None = None) -> str:
    """A command line for the shell, broken before its flags where it is wider than the terminal."""
    width = width or shutil.get_terminal_size().columns
    lines: list[list[str]] = [[]]
    for word in map(shlex.quote, words):
        if word.startswith("-") and lines[-1] and len(" ".join([*lines[-1], word])) + 12 > width:
            lines.append([])
        lines[-1].append(word)
    return " \\\n    ".join(map(" ".join, lines))
