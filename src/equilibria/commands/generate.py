"""`equilibria generate RUN`: text from a trained model, shown while it is made."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from equilibria.commands.arguments import Run, parse
from equilibria.commands.errors import UsageError
from equilibria.commands.loading import Trained, Which, trained
from equilibria.corpora import Vocabulary
from equilibria.language.generate import stream


@dataclasses.dataclass(frozen=True)
class Options:
    """Let the model of a run continue a text."""

    run: Run
    """The folder that `equilibria train` has written."""
    prompt: str
    """The beginning of the text."""
    length: int = 400
    """Tokens to generate: characters or words, as the model was trained."""
    temperature: float = 0.8
    """Logits are divided by it: below 1 safer, above 1 bolder; 0 takes the likeliest token always."""
    top_k: int | None = None
    """Choose among the k likeliest tokens only."""
    top_p: float | None = None
    """Choose among the fewest likeliest tokens that have this probability together."""
    seed: int = 0
    """The same seed gives the same text."""
    checkpoint: Which = "best"
    """The checkpoint with the best validation, or the last one."""
    data: Path | None = None
    """Where the corpus lies now, if it has moved."""
    recipe: str | None = None
    """FILE.py:FUNCTION that the run was trained from, if solvers or shapes of your own are in it."""


def main(arguments: Sequence[str]) -> int:
    """Print the prompt and its continuation, token by token."""
    options = parse(Options, arguments, verb="generate")
    if options.length < 1:
        raise UsageError(f"--length {options.length}: it counts the tokens to generate and is at least 1; try 400.")
    loaded = trained(options.run, checkpoint=options.checkpoint, data=options.data, recipe=options.recipe)
    # The first token comes before anything is printed: an impossible prompt gives its sentence and nothing else.
    pieces = continuation(loaded, options)
    first = next(pieces)
    sys.stdout.write(options.prompt + first)
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    return 0


def continuation(loaded: Trained, options: Options) -> Iterator[str]:
    """The pieces of text that follow the prompt."""
    vocabulary = loaded.corpus.vocabulary
    if loaded.corpus.unit == "symbol":
        raise UsageError(
            f"The corpus {loaded.corpus.name} is a made-up task, no text; generate needs a run on characters or words."
        )
    if not options.prompt:
        raise UsageError("--prompt is empty, and the model needs something to continue; try --prompt 'The '.")
    try:
        ids = vocabulary.encode(options.prompt, finish=False)
    except ValueError as error:
        raise UsageError(f"--prompt: {error}") from None
    if not len(ids):
        raise UsageError(f"--prompt {options.prompt!r} has no word in it; try --prompt 'The '.")
    tokens = stream(
        loaded.model,
        ids[None].to(next(loaded.model.parameters()).device),
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
        segment=loaded.experiment.training.segment_length,
    )
    return spoken(vocabulary, (int(token) for token in itertools.islice(tokens, options.length)), options.prompt)


def spoken(vocabulary: Vocabulary, ids: Iterator[int], before: str) -> Iterator[str]:
    """Tokens as pieces of text; words get their spaces, the end of a line its line break."""
    last = before[-1:]
    for place in ids:
        token = vocabulary.tokens[place]
        if vocabulary.unit == "word":
            token = "\n" if token == vocabulary.end else token if last in ("", " ", "\n") else f" {token}"
        yield token
        last = token[-1:]
