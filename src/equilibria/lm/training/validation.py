"""Validations: the scores of a training on its validation stream, and their effect on the optimiser."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer

from equilibria.fixed_point import Method
from equilibria.lm.corpora import Corpus
from equilibria.lm.evaluation import evaluate, jacobian_radius
from equilibria.lm.experiments.decay import Validated
from equilibria.lm.experiments.experiment import Experiment
from equilibria.lm.experiments.stage import Stage
from equilibria.lm.ranks import reshard
from equilibria.lm.score import Evaluation
from equilibria.lm.training.log import Log
from equilibria.lm.training.optimiser import averaged, note_validation, restart_averages
from equilibria.lm.training.step import Accumulation


class Validations:
    """Evaluates a model on the validation stream during its training.

    Args:
        experiment: the experiment, with the settings of the validations.
        corpus: its validation text is scored.
        optimiser: the optimiser of the training; a score may divide its rate, or start its averaging.
        log: the log of the scores.
    """

    def __init__(self, experiment: Experiment, corpus: Corpus, optimiser: Optimizer, log: Log) -> None:
        self._experiment, self._corpus, self._optimiser, self._log = experiment, corpus, optimiser, log
        self._check_length()
        self.best: dict[str, Any] | None = None
        """The best validation of the stage and of those before it that solve alike: its step, its stage and its nll
        ("nats"). From the end of a stage until the next one has a finite score, that of the old one without "nats"."""
        self.effect = Validated()
        """The effect of the validations on the learning rate."""

    def _check_length(self) -> None:
        """Raise a ValueError if the validation text is too short to be scored, before anything is trained."""
        text, streams = self._corpus.valid, self._experiment.training.validation.eval_batch_size
        have, parts = len(text) // (text.episode or 1), "episodes" if text.episode else "tokens to predict"
        if have < streams:
            raise ValueError(
                f"The validation text has {have} {parts}, and each of the {streams} streams that read it side by side "
                f"needs one; try --training.eval-batch-size {have}, or a longer text."
            )

    def score(self, accumulation: Accumulation, *, step: int, stage: Stage, method: Method | None) -> Evaluation:
        """Evaluate the weights after ``step``, or their averages if ASGD averages, with ``method``."""
        training, model, ranks = self._experiment.training, accumulation.model, accumulation.ranks
        reading = {**training.evaluation, "max_segments": training.validation.valid_segments}
        solve, text = {"method": method, "warm": stage.warm}, self._corpus.valid
        how = {"depth": stage.depth, "ranks": ranks, "vocabulary": self._corpus.spelling}
        with averaged(self._optimiser), accumulation.arithmetic():
            found = evaluate(model, text, **reading, **solve, **how)
            nll = found.nll_per_token
            best = math.isfinite(nll) and (self.best is None or self.best["nats"] is None or nll < self.best["nats"])
            if best:
                self.best = {"step": step, "nats": nll, "stage": stage.name}
            self._log.valid(found, step=step, stage=stage.name, best=best, setting=reading)
            if training.log.spectral_radius and stage.method is not None:
                sizes = {name: reading[name] for name in ("batch_size", "segment_length")}
                radius = jacobian_radius(model, text, **sizes, **solve, iterations=training.log.spectral_radius)
                self._log.radius(radius, step=step, stage=stage.name)
            reshard(model)
        self.effect = note_validation(self._optimiser, self.effect, training.optimisation, nll)
        return found

    def restart(self) -> None:
        """Discard the scores when a stage changes the model, since later scores are not comparable with them."""
        self.best = self.best and {**self.best, "nats": None}
        self.effect = restart_averages(self._optimiser, self.effect)

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {"best": self.best, "validated": dataclasses.asdict(self.effect)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore the plain values from a checkpoint."""
        self.best, self.effect = state.get("best"), Validated.stored(state.get("validated"))
