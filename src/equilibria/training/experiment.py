"""An experiment: one frozen tree of values that says everything about a run."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from equilibria.corpora import Corpus
from equilibria.equilibrium import Equilibrium, GradientRule
from equilibria.language import LanguageModel, LanguageOutput, LanguageShape, RecurrentShape
from equilibria.solve import Solver, Stop
from equilibria.stability import jacobian_penalty
from equilibria.training.names import nearest_or_all
from equilibria.training.settings import Training, at_least
from equilibria.training.sources import Source

SOLVES = ("solver", "stop", "gradient", "eval_stop")
"""What of a stage decides how an ``Equilibrium`` solves, and which stages' validations can be compared."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of the training with its own solver, stopping rule and gradient rule."""

    name: str
    """What the logs call it."""
    steps: int
    """Training steps."""
    solver: Solver
    """Proposes the iterates of the forward solve."""
    stop: Stop
    """Tolerances and budget of the forward solve."""
    gradient: GradientRule
    """How the gradient gets through the solve."""
    penalty: float = 0.0
    """Weight γ of the Jacobian penalty ‖εᵀJ‖²/(B·T·D), in nats; 0 for none. z* counts as constant in it."""
    penalty_share: float = 1.0
    """Probability with which a step has the penalty; the steps without it cost nothing more."""
    eval_stop: Stop | None = None
    """Tolerances and budget in evaluation; None for those of the training."""
    warm: bool = False
    """Start solves from what the cell remembers of the segment before, instead of zero."""
    budget_jitter: int = 0
    """Evaluations by which the budget of a training step may fall short: each draws one of 0 … budget_jitter."""

    def __post_init__(self) -> None:
        at_least(self, 1, "steps")
        if self.penalty < 0:
            raise ValueError(
                f"Stage(penalty={self.penalty}): the weight of the penalty is ≥ 0; try 1.0, or 0 for none."
            )
        if not 0 < self.penalty_share <= 1:
            raise ValueError(f"Stage(penalty_share={self.penalty_share}): a probability in (0, 1]; try 0.4.")
        if not 0 <= self.budget_jitter < self.stop.max_evals:
            raise ValueError(
                f"Stage(budget_jitter={self.budget_jitter}): a budget of {self.stop.max_evals} evaluations falls short "
                f"by 0 to {self.stop.max_evals - 1} of them; try 2, or 0 for the same budget in every step."
            )

    @property
    def solves(self) -> dict[str, Any]:
        """How an ``Equilibrium`` solves in this stage, by the names of its attributes."""
        return {name: getattr(self, name) for name in SOLVES}

    def apply_to(self, layer: nn.Module) -> None:
        """Let ``layer`` solve as in this stage; a layer that solves nothing stays as it is."""
        if isinstance(layer, Equilibrium):
            for name, value in self.solves.items():
                setattr(layer, name, value)
            layer.warm = self.warm

    @contextlib.contextmanager
    def drawn_budget(self, layer: nn.Module) -> Iterator[None]:
        """Let ``layer`` solve forward with a budget drawn for this step, max_evals − U{0, …, budget_jitter}.

        So that no one depth is learnt by heart: from the code of Bai, Koltun and Kolter (2021). It is drawn from
        PyTorch's generator, and only where there is something to draw; afterwards the layer has its own stop back.
        """
        if self.budget_jitter == 0 or not isinstance(layer, Equilibrium):
            yield
            return
        stop, shortfall = layer.stop, int(torch.randint(self.budget_jitter + 1, ()))
        layer.stop = dataclasses.replace(stop, max_evals=stop.max_evals - shortfall)
        try:
            yield
        finally:
            layer.stop = stop

    def drawn_penalty(self, output: LanguageOutput) -> Float[Tensor, ""] | None:
        """The Jacobian penalty of a step, without its weight; None if the step has none, which may be drawn."""
        if self.penalty == 0 or output.solution is None:
            return None
        if self.penalty_share < 1 and float(torch.rand(())) >= self.penalty_share:
            return None
        return jacobian_penalty(output.layer.f, output.solution.z.detach()).mean()


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What is trained on what, and how."""

    name: str
    """What the run is called."""
    corpus: Source
    """Where the text comes from."""
    model: LanguageShape | RecurrentShape
    """The sizes of the model."""
    stages: tuple[Stage, ...]
    """The parts of the training, in order."""
    training: Training = dataclasses.field(default_factory=Training)
    """Batches, optimiser, log and checkpoints."""

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("Experiment(stages=()): an experiment has at least one stage; give one Stage(…).")
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError(
                f"Experiment(stages=…): the stages are called {', '.join(map(repr, names))}; logs and checkpoints tell "
                "them apart by their names, so give each its own."
            )
        if self.training.warmup > self.total_steps:
            raise ValueError(
                f"Training(warmup={self.training.warmup}): the warm-up is longer than the {self.total_steps} steps of "
                "all stages together; shorten it with --training.warmup, or lengthen a stage."
            )

    @property
    def total_steps(self) -> int:
        """Steps of all stages together."""
        return sum(stage.steps for stage in self.stages)

    def stage_at(self, done: int) -> int:
        """The index of the stage that the next step belongs to, after ``done`` steps; the last one at the end."""
        end = 0
        for index, stage in enumerate(self.stages):
            end += stage.steps
            if done < end:
                return index
        return len(self.stages) - 1

    def stage_named(self, name: str) -> Stage:
        """The stage of that name.

        Raises:
            ValueError: there is none.
        """
        for stage in self.stages:
            if stage.name == name:
                return stage
        names = (stage.name for stage in self.stages)
        raise ValueError(f"There is no stage {name!r} in {self.name!r}; {nearest_or_all(name, names)}")

    def build(self, corpus: Corpus) -> LanguageModel:
        """The model with fresh weights, drawn from PyTorch's generator, set to the first stage."""
        model = self.model.build(len(corpus.vocabulary), **self.stages[0].solves)
        self.stages[0].apply_to(model.layer)
        return model
