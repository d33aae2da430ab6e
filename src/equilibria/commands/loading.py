"""A trained model back from its run directory, with the corpus that it speaks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch

from equilibria.commands.errors import UsageError
from equilibria.commands.recipe import experiment_of
from equilibria.commands.record import require
from equilibria.corpora import Corpus
from equilibria.language import LanguageModel
from equilibria.training.checkpoint import CheckpointError
from equilibria.training.device import choose_device
from equilibria.training.experiment import Experiment, Stage
from equilibria.training.run import Run
from equilibria.training.serialise import kinds_in
from equilibria.training.snapshot import load_weights, weights

Which = Literal["best", "last"]
"""The checkpoint with the best validation (see ``Run.best``), or the newest one."""


@dataclasses.dataclass(frozen=True, eq=False)
class Trained:
    """A model ready for use, and where it comes from."""

    experiment: Experiment
    """What was trained."""
    corpus: Corpus
    """What it was trained on."""
    model: LanguageModel
    """In evaluation mode; it solves as in ``stage``."""
    stage: Stage
    """The stage that the checkpoint was written in: where two meet, the later one."""
    step: int
    """The training step of the weights."""


def trained(
    path: Path,
    *,
    checkpoint: Which = "best",
    data: Path | None = None,
    recipe: str | None = None,
    memory_length: int | None = None,
    segment: int | None = None,
    extra: Iterable[type] = (),
) -> Trained:
    """The model of the run in folder ``path``.

    Args:
        path: the run directory.
        checkpoint: whose weights.
        data: where the corpus lies now, if it has moved.
        recipe: what the run was trained from, if it uses dataclasses from outside the library.
        memory_length: positions of the past that the cell is to remember; None for those of the training.
        segment: positions that are to be solved at once beside them; None for those of the training.
        extra: these dataclasses themselves.
    """
    if recipe is not None:
        extra = {*extra, *kinds_in(experiment_of(recipe))}
    run = Run.open(require(path))
    experiment = run.experiment(extra=extra)
    if data is not None:
        experiment = with_data(experiment, data)
    stored = run.best() if checkpoint == "best" else run.newest()
    if stored is None:
        raise CheckpointError(f"{path} has no good checkpoint yet: continue the training with --resume.")
    corpus = experiment.corpus.load()
    stage = experiment.stage_named(stored.state["stage"])
    built = experiment if memory_length is None else with_memory(experiment, memory_length, segment=segment)
    model = built.build(corpus, stage)
    try:
        load_weights(model, stored.model)
    except CheckpointError:
        if weights(model).keys() != stored.model.keys():
            raise CheckpointError(
                f"The weights of {path} have other names than those that its experiment.json stands for in this "
                "version of the library; use the version that wrote them, or train anew."
            ) from None
        raise CheckpointError(
            f"The weights of {path} do not fit a corpus with {len(corpus.vocabulary):,} tokens in its vocabulary: is "
            f"{corpus.name} still the text it was trained on? Name the right folder with --data."
        ) from None
    model.eval().to(device(experiment))
    return Trained(experiment=experiment, corpus=corpus, model=model, stage=stage, step=stored.step)


def with_data(experiment: Experiment, data: Path) -> Experiment:
    """The experiment with its corpus read from the folder ``data``."""
    corpus: Any = experiment.corpus
    if not any(field.name == "root" for field in dataclasses.fields(corpus)):
        raise UsageError(
            f"--data {data}: the corpus {type(corpus).__name__} is not read from a folder; leave --data out, or choose "
            "a recipe that reads one, such as ptb."
        )
    return dataclasses.replace(experiment, corpus=dataclasses.replace(corpus, root=data.expanduser().absolute()))


def with_memory(experiment: Experiment, length: int, *, segment: int | None = None) -> Experiment:
    """The experiment with a cell, in a chain with blocks, that remember ``length`` positions beside a segment."""
    model: Any = experiment.model
    cell = _remembering(getattr(model, "cell", model), length, segment or experiment.training.segment_length)
    return dataclasses.replace(experiment, model=dataclasses.replace(model, cell=cell))


def _remembering(cell: Any, length: int, segment: int) -> Any:
    if hasattr(cell, "cells"):
        return dataclasses.replace(cell, cells=tuple(_remembering(block, length, segment) for block in cell.cells))
    if not hasattr(cell, "memory"):
        raise UsageError(
            f"--memory-length {length}: a {type(cell).__name__} has no number of positions that it remembers; leave it "
            "out for this model."
        )
    longest = cell.longest - segment
    if cell.positions == "decay" and min(length, (cell.window or 1000) - 1) > longest:
        raise UsageError(
            f"--memory-length {length}: this cell has position biases for {cell.longest:,} positions, memory and a "
            f"segment of {segment:,} together; give at most {max(0, longest):,}."
        )
    return dataclasses.replace(cell, memory=length)


def device(experiment: Experiment) -> torch.device:
    """Where the model runs: the device of the training, if this machine has it."""
    try:
        return choose_device(experiment.training.device)
    except ValueError:
        return choose_device("auto")
