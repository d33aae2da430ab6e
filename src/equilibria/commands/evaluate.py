"""`equilibria evaluate RUN`: the score of a trained model on held-out text, with everything it depends on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console

from equilibria.commands.arguments import Run, found, parse
from equilibria.commands.recipe import kinds_of
from equilibria.errors import UsageError
from equilibria.fixed_point import Method
from equilibria.lm.corpora.vocabulary import noun
from equilibria.lm.experiments.serialise import to_json
from equilibria.lm.report import formats
from equilibria.lm.report.display import summary_table, waiting
from equilibria.lm.report.summary import Row
from equilibria.lm.runs.run import Which
from equilibria.lm.runs.trained import Trained, load
from equilibria.lm.score import Evaluation, Setting


@dataclasses.dataclass(frozen=True)
class Options:
    """Score the model of a run on text that it was not trained on."""

    run: Run
    """The folder that `equilibria train` has written, or `tiny` for the model inside the library."""
    split: Literal["valid", "test"] = "valid"
    """Which part of the corpus."""
    checkpoint: Which = "best"
    """The checkpoint with the best validation, or the last one."""
    data: Path | None = None
    """Where the corpus lies now, if it has moved."""
    recipe: str | None = None
    """FILE.py:FUNCTION that the run was trained from, if solvers or shapes of your own are in it."""
    protocol: Literal["exact", "official"] = "exact"
    """"exact" scores every target that the streams hold; "official" first divides the n tokens into B rows of n // B,
    as the authors' codes do, so that the first token of a row is not scored."""
    batch_size: int | None = None
    """Streams read side by side; 1 is exact, more is faster and what papers do: each begins without a past. None for
    1, and with --protocol official for that of the training's validations."""
    memory_length: int | None = None
    """Positions of the past that the model remembers; None for those of the training."""
    segment_length: int | None = None
    """Tokens in one solve; None for that of the training."""
    overlap: int | None = None
    """Tokens of the segment before that a segment reads again, instead of a memory; None for those of the training."""
    max_segments: int | None = None
    """Read only the first segments; None for all."""
    max_evals: int | None = None
    """Budget of a solve in evaluations of f; None for that of the run."""
    rtol: float | None = None
    """Relative tolerance of a solve; None for that of the run."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one JSON object instead of the table."""


def main(arguments: Sequence[str]) -> int:
    """Print the score."""
    options = _checked(parse(Options, arguments, verb="evaluate"))
    loaded = load(
        found(options.run),
        checkpoint=options.checkpoint,
        data=options.data,
        extra=kinds_of(options.recipe),
        memory_length=options.memory_length,
        segment=options.segment_length,
    )
    method = _method(loaded, options)
    stream = loaded.stream(options.split)
    cut = _segments(loaded, options, episodes=bool(stream.episode))
    official = options.protocol == "official"
    batch_size = options.batch_size or (loaded.experiment.training.validation.eval_batch_size if official else 1)
    with waiting(f"reading {len(stream):,} tokens of {loaded.language.name} ({_scored(loaded, options)})"):
        try:
            how = {"batch_size": batch_size, "max_segments": options.max_segments, "method": method}
            result = loaded.evaluate(options.split, official=official, **cut, **how)
        except ValueError as error:  # the text or the cell is too short for the options
            raise UsageError(str(error)) from None
    if options.json:
        print(formats.strict_json(_object(result, loaded, options)))
        return 0
    title = f"{options.run}, {options.checkpoint} checkpoint (step {loaded.step:,}), {_scored(loaded, options)}"
    scores = _scores(result, loaded.language.unit, loaded.experiment.corpus.chance)
    rows = [*scores, *_conditions(loaded, result.setting, episodes=bool(stream.episode))]
    Console(highlight=False).print(summary_table([*rows, *_cost(result)], title))
    return 0


def _object(result: Evaluation, loaded: Trained, options: Options) -> dict[str, Any]:
    """The score for programs; its numbers have the names that they have in metrics.jsonl."""
    return {
        "run": str(loaded.path),
        "checkpoint": options.checkpoint,
        "step": loaded.step,
        "corpus": loaded.language.name,
        "unit": loaded.language.unit,
        "split": None if loaded.is_file else options.split,
        "data": None if options.data is None else str(options.data),
        "nats": result.nll_per_token,
        "bits": result.bits,
        "bits_per_byte": result.bits_per_byte,
        "perplexity": result.perplexity,
        "accuracy": result.accuracy,
        "tokens": result.tokens,
        "bytes": result.bytes,
        "seconds": result.seconds,
        "forward": result.forward,
        "setting": dataclasses.asdict(result.setting),
    }


def _checked(options: Options) -> Options:
    """The options, refused where a number is too small."""
    from_one = ("batch_size", "segment_length", "max_segments", "max_evals")
    from_zero = ("memory_length", "overlap", "rtol")
    for name, least in [*((name, 1) for name in from_one), *((name, 0) for name in from_zero)]:
        value = getattr(options, name)
        if value is not None and value < least:
            raise UsageError(
                f"--{name.replace('_', '-')} {value}: it must be at least {least}; leave it out for the default."
            )
    return options


def _segments(loaded: Trained, options: Options, *, episodes: bool) -> dict[str, Any]:
    """How the text is cut: as in the training's validations, unless the options say otherwise."""
    usual = loaded.experiment.training.evaluation
    length = None if episodes else options.segment_length or usual["segment_length"]
    overlap = usual["overlap"] if options.overlap is None else options.overlap
    if overlap and options.memory_length is not None:
        raise UsageError(
            f"--memory-length {options.memory_length}: segments with an overlap ({overlap}) begin without memory; add "
            "--overlap 0, or leave one of the two out."
        )
    if overlap and episodes:
        raise UsageError(f"--overlap {overlap}: every sequence of this corpus stands alone; leave it out.")
    if length is not None and overlap >= length:
        raise UsageError(
            f"--overlap {overlap}: segments of {length:,} tokens share less than that with the one before; give at "
            f"most {length - 1:,}, or 0, or a longer --segment-length."
        )
    return {"segment_length": length, "overlap": overlap}


def _scored(loaded: Trained, options: Options) -> str:
    """The name of the text that is scored: a split of the corpus, or a file."""
    return str(loaded.data) if loaded.is_file else options.split


def _method(loaded: Trained, options: Options) -> Method | None:
    """How the run solves in evaluation, with the budget and tolerance that the options ask for."""
    method = loaded.stage.evaluation_method
    changes = {name: getattr(options, name) for name in ("max_evals", "rtol") if getattr(options, name) is not None}
    if method is not None:
        return method.with_stop(dataclasses.replace(method.stop, **changes))
    if changes:
        flags = " and ".join(f"--{name.replace('_', '-')}" for name in changes)
        network = formats.network(to_json(loaded.experiment)["model"])
        raise UsageError(f"{flags}: the model of {options.run} is {network}, which solves nothing; leave it out.")
    return None


def _scores(result: Evaluation, unit: str, chance: float | None) -> list[Row]:
    one = noun(unit)
    nll, bits = f"{result.nll_per_token:.4f} nats", f"{result.bits:.4f} bits per {one}"
    if unit == "character":
        rows = [Row("Score", bits, f"{nll}, perplexity {result.perplexity:.3f}")]
    elif unit == "symbol":
        rows = [Row("Score", f"{result.nll_per_token:.3e} nats per {unit}", "mean over every place of the sequence")]
    else:
        rows = [Row("Score", f"perplexity {result.perplexity:.2f}", f"{nll}, {bits}")]
    if result.bytes and result.bits_per_byte is not None:
        size = f"{formats.count(result.bytes)} bytes of text, {result.bytes / result.tokens:.2f} per {one}"
        beside = f"of {size}; comparable between vocabularies"
        rows.append(Row("Bits per byte", f"{result.bits_per_byte:.4f}", beside))
    if result.accuracy is not None:
        guesses = "" if chance is None else f"guessing gets {formats.percent(chance)}"
        rows.append(Row("Right answers", formats.percent(result.accuracy), guesses))
    return rows


def _conditions(loaded: Trained, setting: Setting, *, episodes: bool) -> list[Row]:
    """The conditions that the score depends on."""
    rows = []
    if setting.memory_length is not None and not setting.overlap:
        rows.append(Row("Memory length", f"{setting.memory_length:,} tokens", _seen(loaded, setting)))
    again = f"each reads the last {setting.overlap:,} of the one before again, unscored, and has no memory"
    rows.append(Row("Segment length", f"{setting.segment_length:,} tokens", again if setting.overlap else ""))
    if episodes:
        streams = "each sequence stands alone"
    elif setting.official:
        first = f"first {setting.overlap + 1:,} tokens are" if setting.overlap else "first token is"
        streams = f"official: each has n // {setting.batch_size} of the n tokens, and its {first} not scored"
    elif setting.batch_size > 1:
        streams = "each begins without memory, and its first token has no past"
    else:
        streams = "the text is read in one piece" if setting.overlap else "exact: the text is read in one piece"
    rows.append(Row("Batch size", formats.numbered(setting.batch_size, "stream"), streams))
    if setting.max_evals is not None:
        evaluations = formats.numbered(setting.max_evals, "evaluation")
        rows.append(Row("Budget", evaluations, formats.tolerance(dataclasses.asdict(setting))))
    else:
        rows.append(Row("Budget", "no solve", formats.network(to_json(loaded.experiment)["model"])))
    return rows


def _seen(loaded: Trained, setting: Setting) -> str:
    """Where the past that counts is not what the memory length says, or not what the training had."""
    cell: Any = getattr(loaded.experiment.model, "cell", None)
    blocks, notes = getattr(cell, "cells", (cell,)), []
    before = max((getattr(block, "memory", 0) for block in blocks), default=0)
    if before != setting.memory_length:
        notes.append(f"{before:,} in the training")
    window = min(getattr(block, "window", 0) or 1000 for block in blocks)
    if (setting.memory_length or 0) + setting.segment_length > window:
        notes.append(f"attention sees {window:,} tokens at most")
    return "; ".join(notes)


def _cost(result: Evaluation) -> list[Row]:
    speed = (
        f"in {formats.duration(result.seconds)}, {formats.count(result.tokens / max(result.seconds, 1e-9))} tokens/s"
    )
    scored = f"{formats.count(result.tokens)} of {formats.count(result.setting.stream_tokens)}"
    rows = [Row("Tokens scored", scored, speed)]
    if result.forward is not None:
        forward = result.forward
        beside = f"residual {formats.residual(forward['residual'])}, {formats.percent(forward['converged'])} converged"
        rows.append(Row("Mean solve", f"{forward['evals']:.1f} evaluations", beside))
    return rows
