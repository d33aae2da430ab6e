"""`equilibria generate RUN`: text from a trained model, shown while it is made."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from equilibria.commands.arguments import Run, found, parse
from equilibria.commands.failures import failures_of
from equilibria.commands.recipe import kinds_of
from equilibria.commands.report import read_sample
from equilibria.commands.terminal import complain
from equilibria.errors import UsageError
from equilibria.lm.report.visible import visible
from equilibria.lm.runs.run import Which
from equilibria.lm.runs.trained import Trained, load


@dataclasses.dataclass(frozen=True)
class Options:
    """Let the model of a run continue a text."""

    run: Run
    """The folder that `equilibria train` has written, or `tiny` for the model inside the library."""
    prompt: tuple[str, ...] | None = None
    """The beginning of the text; several are continued side by side, and shown one after another. None for the prompt
    of the sample in the report of the run."""
    length: int = 400
    """Tokens to generate: characters, words or BPE tokens, as the model was trained."""
    temperature: float = 0.8
    """Logits are divided by it: below 1 safer, above 1 bolder; 0 always takes the most likely token."""
    top_k: int | None = None
    """Choose among the k most likely tokens only."""
    top_p: float | None = None
    """Choose among the fewest most likely tokens whose probabilities add up to this."""
    seed: int = 0
    """The same seed gives the same text to the same prompts."""
    stop: str | None = None
    """A token that ends the text, such as "<eos>" of a corpus of words; \\n stands for a line break."""
    memory_length: int | None = None
    """Positions that are remembered; None for those of the training."""
    checkpoint: Which = "best"
    """The checkpoint with the best validation, or the last one."""
    data: Path | None = None
    """Where the corpus lies now, if it has moved."""
    recipe: str | None = None
    """FILE.py:FUNCTION that the run was trained from, if solvers or shapes of your own are in it."""


def main(arguments: Sequence[str]) -> int:
    """Print each prompt and its continuation: one token by token, several one after another."""
    options = parse(Options, arguments, verb="generate")
    if sum(word.partition("=")[0] == "--prompt" for word in arguments) > 1:  # the last one alone would count
        raise UsageError("--prompt is there twice; give all prompts after one: --prompt 'The ' 'Iterators are'.")
    if options.prompt == ():  # such as --prompt $TEXT in a shell where TEXT is empty
        raise UsageError("--prompt needs a text after it; leave it out for the prompt of the sample in the report.")
    if options.memory_length is not None and options.memory_length < 0:
        raise UsageError(
            f"--memory-length {options.memory_length}: it counts positions and is at least 0; leave it out "
            "for those of the training."
        )
    run = found(options.run)
    loaded = load(
        run,
        checkpoint=options.checkpoint,
        data=options.data,
        extra=kinds_of(options.recipe),
        memory_length=options.memory_length,
    )
    if loaded.language.unit == "symbol":
        raise UsageError(
            f"{options.run} was trained on a synthetic task, {loaded.language.name}, which has no text to continue; "
            f"try equilibria evaluate {options.run}."
        )
    prompts = _usual_prompt(run) if options.prompt is None else options.prompt
    options = dataclasses.replace(options, prompt=prompts)
    with failures_of(loaded) as failed:
        _show(prompts, _pieces(loaded, options))
    for note in (*loaded.vocabulary.remarks(prompts), *failed.notes()):
        complain(f"note: {note}")
    return 0


def _show(prompts: Sequence[str], pieces: Iterator[tuple[str, ...]]) -> None:
    # The first token comes before anything is printed: an impossible prompt gives its sentence and nothing else.
    first = next(pieces)
    # What a terminal gets is for eyes, and must not steer it; a pipe or a file gets the text as it is.
    shown = visible if sys.stdout.isatty() else str
    if len(prompts) > 1:
        rows = zip(prompts, zip(first, *pieces, strict=True), strict=True)
        sys.stdout.write(shown("\n\n".join(prompt + "".join(row) for prompt, row in rows)))
    else:
        sys.stdout.write(shown("".join(prompts)))
        for (piece,) in itertools.chain([first], pieces):
            sys.stdout.write(shown(piece))
            sys.stdout.flush()
    sys.stdout.write("\n")


def _usual_prompt(run: Path) -> tuple[str, ...]:
    """The prompt of the sample that `train` has written for the report of the run."""
    sample = read_sample(run)
    if sample is None:
        raise UsageError(f"generate needs --prompt: the report of {run} has no sample whose prompt could be taken.")
    return sample[:1]


def _pieces(loaded: Trained, options: Options) -> Iterator[tuple[str, ...]]:
    names = ("length", "temperature", "top_k", "top_p", "seed", "stop")
    try:
        return loaded.pieces(options.prompt or (), **{name: getattr(options, name) for name in names})
    except ValueError as error:
        raise UsageError(str(error)) from None
