"""A trained model back from its run directory, with the corpus that it speaks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch

from equilibria.commands.errors import UsageError
from equilibria.commands.record import require
from equilibria.corpora import Corpus
from equilibria.equilibrium import Equilibrium
from equilibria.language import LanguageModel
from equilibria.training.checkpoint import CheckpointError
from equilibria.training.experiment import Experiment
from equilibria.training.run import Run
from equilibria.training.snapshot import load_weights

Which = Literal["best", "last"]
"""The checkpoint with the best validation of the last stage, or the newest one."""


@dataclasses.dataclass(frozen=True, eq=False)
class Trained:
    """A model ready for use, and where it comes from."""

    experiment: Experiment
    """What was trained."""
    corpus: Corpus
    """What it was trained on."""
    model: LanguageModel
    """In evaluation mode, set to the stage in which its weights were trained."""
    step: int
    """The training step of the weights."""


def trained(path: Path, *, checkpoint: Which = "best", data: Path | None = None, extra: Iterable[type] = ()) -> Trained:
    """The model of the run in folder ``path``.

    Args:
        path: the run directory.
        checkpoint: whose weights.
        data: where the corpus lies now, if it has moved.
        extra: dataclasses from outside the library that the experiment uses.
    """
    run = Run.open(require(path))
    experiment = run.experiment(extra=extra)
    if data is not None:
        experiment = with_data(experiment, data)
    stored = run.best() if checkpoint == "best" else run.newest()
    if stored is None:
        raise CheckpointError(f"{path} has no good checkpoint yet: continue the training with --resume.")
    corpus = experiment.corpus.load()
    model = experiment.build(corpus)
    try:
        load_weights(model, stored.model)
    except CheckpointError:
        raise CheckpointError(
            f"The weights of {path} do not fit a corpus with {len(corpus.vocabulary):,} tokens in its vocabulary: is "
            f"{corpus.name} still the text it was trained on? Name the right folder with --data."
        ) from None
    stage = experiment.stages[experiment.stage_at(max(stored.step - 1, 0))]
    if isinstance(model.layer, Equilibrium):
        model.layer.solver, model.layer.stop, model.layer.eval_stop = stage.solver, stage.stop, stage.eval_stop
    model.eval().to(device(experiment))
    return Trained(experiment=experiment, corpus=corpus, model=model, step=stored.step)


def with_data(experiment: Experiment, data: Path) -> Experiment:
    """The experiment with its corpus read from the folder ``data``."""
    corpus: Any = experiment.corpus
    if not any(field.name == "root" for field in dataclasses.fields(corpus)):
        raise UsageError(
            f"--data {data}: the corpus {type(corpus).__name__} is not read from a folder; leave --data out, or choose "
            "a recipe that reads one, such as ptb."
        )
    return dataclasses.replace(experiment, corpus=dataclasses.replace(corpus, root=data.expanduser().absolute()))


def device(experiment: Experiment) -> torch.device:
    """Where the model runs: the device of the training, if this machine has it."""
    asked = experiment.training.device
    if asked != "auto" and not (asked.startswith("cuda") and not torch.cuda.is_available()):
        return torch.device(asked)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
