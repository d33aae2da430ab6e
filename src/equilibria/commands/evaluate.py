"""`equilibria evaluate RUN`: the score of a trained model on held-out text, with everything it depends on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from rich.console import Console

from equilibria.commands import formats
from equilibria.commands.arguments import Run, parse
from equilibria.commands.display import summary_table
from equilibria.commands.errors import UsageError
from equilibria.commands.loading import Trained, Which, trained
from equilibria.commands.summary import Row
from equilibria.equilibrium import Equilibrium
from equilibria.solve import Stop
from equilibria.training.evaluation import Evaluation
from equilibria.training.evaluation import evaluate as score


@dataclasses.dataclass(frozen=True)
class Options:
    """Score the model of a run on text that it was not trained on."""

    run: Run
    """The folder that `equilibria train` has written."""
    split: Literal["valid", "test"] = "valid"
    """Which part of the corpus."""
    checkpoint: Which = "best"
    """The checkpoint with the best validation, or the last one."""
    data: Path | None = None
    """Where the corpus lies now, if it has moved."""
    recipe: str | None = None
    """FILE.py:FUNCTION that the run was trained from, if solvers or shapes of your own are in it."""
    batch_size: int = 1
    """Streams read side by side; 1 is exact, more is faster."""
    segment_length: int | None = None
    """Tokens in one solve; None for that of the training."""
    max_segments: int | None = None
    """Read only the first segments; None for all."""
    max_evals: int | None = None
    """Budget of a solve in evaluations of f; None for that of the run."""
    rtol: float | None = None
    """Relative tolerance of a solve; None for that of the run."""


def main(arguments: Sequence[str]) -> int:
    """Print the score."""
    options = parse(Options, arguments, verb="evaluate")
    for name in ("batch_size", "segment_length", "max_segments"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(
                f"--{name.replace('_', '-')} {value}: it must be at least 1; leave it out for the default."
            )
    loaded = trained(options.run, checkpoint=options.checkpoint, data=options.data, recipe=options.recipe)
    stop = _set_stop(loaded, options)
    stream = {"valid": loaded.corpus.valid, "test": loaded.corpus.test}[options.split]
    length = options.segment_length or _length(loaded)
    console = Console(highlight=False)
    with console.status(f"reading {len(stream):,} tokens of {loaded.corpus.name} ({options.split})"):
        result = score(
            loaded.model,
            stream,
            batch_size=options.batch_size,
            segment_length=None if stream.episode else length,
            max_segments=options.max_segments,
        )
    title = f"{options.run}, {options.checkpoint} checkpoint (step {loaded.step:,}), {options.split}"
    rows = [*_scores(result, loaded.corpus.unit), *_conditions(loaded, options, stop, stream.episode or length)]
    console.print(summary_table([*rows, *_cost(result)], title))
    return 0


def _length(loaded: Trained) -> int:
    training = loaded.experiment.training
    return training.eval_segment_length or training.segment_length


def _set_stop(loaded: Trained, options: Options) -> Stop | None:
    """Change the stop of the model's solves as asked; returns the one that holds."""
    layer = loaded.model.layer
    if not isinstance(layer, Equilibrium):
        return None
    changes = {name: getattr(options, name) for name in ("max_evals", "rtol") if getattr(options, name) is not None}
    layer.eval_stop = dataclasses.replace(layer.eval_stop or layer.stop, **changes)
    return layer.eval_stop


def _scores(result: Evaluation, unit: str) -> list[Row]:
    nats, bits = f"{result.nats_per_token:.4f} nats", f"{result.bits:.4f} bits per {unit}"
    if unit == "word":
        first = Row("Score", f"perplexity {result.perplexity:.2f}", f"{nats}, {bits}")
    elif unit == "character":
        first = Row("Score", bits, f"{nats}, perplexity {result.perplexity:.3f}")
    else:
        first = Row("Score", f"{result.nats_per_token:.3e} nats per {unit}", "mean over every place of the sequence")
    answers = [] if result.accuracy is None else [Row("Right answers", formats.percent(result.accuracy))]
    return [first, *answers]


def _conditions(loaded: Trained, options: Options, stop: Stop | None, length: int) -> list[Row]:
    cell = loaded.experiment.model.cell
    rows = [
        Row("Memory length", f"{cell.memory:,} tokens"),
        Row("Segment length", f"{length:,} tokens", f"batch size {options.batch_size}"),
    ]
    if stop is not None:
        rows.append(Row("Budget", f"{stop.max_evals} evaluations", f"relative tolerance {stop.rtol:g}"))
    return rows


def _cost(result: Evaluation) -> list[Row]:
    speed = (
        f"in {formats.duration(result.seconds)}, {formats.count(result.tokens / max(result.seconds, 1e-9))} tokens/s"
    )
    rows = [Row("Tokens scored", formats.count(result.tokens), speed)]
    if result.forward is not None:
        forward = result.forward
        beside = f"residual {formats.residual(forward['residual'])}, {formats.percent(forward['converged'])} converged"
        rows.append(Row("Mean solve", f"{forward['evals']:.1f} evaluations", beside))
    return rows
