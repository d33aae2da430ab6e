"""Validations: the scores of a training on its validation stream, the best one, and their effect on the optimiser."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer

from equilibria.fixed_point import Method
from equilibria.lm.corpora import Stream
from equilibria.lm.evaluation import Evaluation, evaluate, jacobian_radius
from equilibria.lm.experiments.decay import Validated
from equilibria.lm.experiments.experiment import Experiment
from equilibria.lm.experiments.stage import Stage
from equilibria.lm.ranks import reshard
from equilibria.lm.training.log import Log
from equilibria.lm.training.optimiser import averaged, note_validation, restart_averages
from equilibria.lm.training.step import Accumulation


class Validations:
    """Scores a model on the validation stream during its training.

    Args:
        experiment: how the stream is read.
        stream: the validation text.
        optimiser: that of the training; a score may divide its rate, or begin its averaging.
        log: where the scores are written.
    """

    def __init__(self, experiment: Experiment, stream: Stream, optimiser: Optimizer, log: Log) -> None:
        self._experiment, self._stream, self._optimiser, self._log = experiment, stream, optimiser, log
        self.best: dict[str, Any] | None = None
        """The best validation of the stage: its step, its stage and its nats."""
        self.effect = Validated()
        """What the validations have done to the learning rate."""

    def score(self, accumulation: Accumulation, *, step: int, stage: Stage, method: Method | None) -> Evaluation:
        """Evaluate the weights after ``step``, solved by ``method``; once weights are averaged, the averages."""
        training, model, ranks = self._experiment.training, accumulation.model, accumulation.ranks
        reading = {**training.evaluation, "max_segments": training.validation.valid_segments}
        solve = {"method": method, "warm": stage.warm}
        with averaged(self._optimiser), accumulation.arithmetic():
            found = evaluate(model, self._stream, **reading, **solve, depth=stage.depth, ranks=ranks)
            nats = found.nll_per_token
            best = math.isfinite(nats) and (self.best is None or nats < self.best["nats"])
            if best:
                self.best = {"step": step, "nats": nats, "stage": stage.name}
            self._log.valid(found, step=step, stage=stage.name, best=best, setting=reading)
            if training.log.spectral_radius and stage.method is not None:
                rows = {name: reading[name] for name in ("batch_size", "segment_length")}
                radius = jacobian_radius(model, self._stream, **rows, **solve, iterations=training.log.spectral_radius)
                self._log.radius(radius, step=step, stage=stage.name)
            reshard(model)
        self.effect = note_validation(self._optimiser, self.effect, self._experiment, nats)
        return found

    def restart(self) -> None:
        """Forget the scores where a stage changes the model: later ones cannot be compared with them."""
        self.best = None
        self.effect = restart_averages(self._optimiser, self.effect)

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {"best": self.best, "validated": dataclasses.asdict(self.effect)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Return to the values of a checkpoint."""
        self.best, self.effect = state["best"], Validated.stored(state.get("validated"))
