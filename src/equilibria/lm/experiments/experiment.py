"""Experiment: one frozen tree of values that describes a training completely."""

from __future__ import annotations

import dataclasses
from functools import cached_property

from equilibria.checks import check_fields
from equilibria.lm.corpora import Corpus
from equilibria.lm.corpora.language import Language
from equilibria.lm.corpora.source import Source
from equilibria.lm.experiments.checks import finite
from equilibria.lm.experiments.stage import Stage
from equilibria.lm.experiments.training import Training
from equilibria.lm.model import ConvolutionalConfig, LanguageConfig, LanguageModel, RecurrentConfig
from equilibria.lm.suggestions import nearest_or_all


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The corpus, the model and the training."""

    name: str
    """The name of the run."""
    corpus: Source
    """The corpus to load."""
    model: LanguageConfig | RecurrentConfig | ConvolutionalConfig
    """The hyper-parameters of the model."""
    stages: tuple[Stage, ...]
    """The stages of the training, in order."""
    training: Training = dataclasses.field(default_factory=Training)
    """Batches, optimiser, validation, log, faults and devices."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.stages:
            raise ValueError("Experiment(stages=()): an experiment needs at least one stage; give Stage(…).")
        finite(self)
        self._check_methods()
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError(
                f"Experiment(stages=…): the stages are called {', '.join(map(repr, names))}; logs and checkpoints tell "
                "them apart by their names, so give each its own."
            )
        warmup = self.training.optimisation.warmup
        if warmup > self.total_steps:
            raise ValueError(
                f"Training(warmup={warmup}): the warm-up is longer than the {self.total_steps} steps of all stages "
                "together; shorten it with --training.warmup, or lengthen a stage."
            )

    def _check_methods(self) -> None:
        """Raise a ValueError unless the stages of an equilibrium have a method, and only those of a network a depth."""
        solves = self.model.solves
        for stage in self.stages:
            if solves and stage.method is None:
                raise ValueError(
                    f"Stage({stage.name!r}, method=None) of an equilibrium: a method says how to solve it; give "
                    "method=Method(solver, stop, gradient), or network_of(depth) for a shallow stage."
                )
            if not solves and stage.method is not None:
                raise ValueError(
                    f"Stage({stage.name!r}, method={stage.method}) of a model that solves nothing; leave the method "
                    "out."
                )

        explicit = self.model.explicit
        for stage in self.stages:
            if stage.depth is not None and stage.depth > (0 if explicit is None else explicit.depth):
                layers = "no explicit network" if explicit is None else f"a network of {explicit.depth} layers"
                raise ValueError(f"Stage({stage.name!r}, depth={stage.depth}) of {layers}; leave the depth out.")

    @cached_property
    def total_steps(self) -> int:
        """Number of steps of all stages together."""
        return sum(stage.steps for stage in self.stages)

    def stage_at(self, done: int) -> int:
        """The index of the stage of step ``done`` + 1; the last stage after the end."""
        end = 0
        for index, stage in enumerate(self.stages):
            end += stage.steps
            if done < end:
                return index
        return len(self.stages) - 1

    def stage_named(self, name: str) -> Stage:
        """The stage with this name.

        Raises:
            ValueError: there is no such stage.
        """
        for stage in self.stages:
            if stage.name == name:
                return stage
        names = (stage.name for stage in self.stages)
        raise ValueError(f"There is no stage {name!r} in {self.name!r}; {nearest_or_all(name, names)}")

    def build(self, corpus: Corpus | Language, stage: Stage | None = None, *, counted: bool = False) -> LanguageModel:
        """The model with new weights, drawn from PyTorch's global generator.

        Args:
            corpus: its vocabulary gives the number of tokens.
            stage: its method is that of the model; None for the last stage. The trainer passes a method with every
                step.
            counted: True if the caller counts failed solves, as the trainer does; False for a model that warns of them.
        """
        stage = stage or self.stages[-1]
        method = stage.training_method if counted else stage.method
        return self.model.build(len(corpus.vocabulary), depth=stage.depth, method=method, eval_stop=stage.eval_stop)
