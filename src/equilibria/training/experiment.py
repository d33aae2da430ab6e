"""An experiment: one frozen tree of values that says everything about a run."""

from __future__ import annotations

import dataclasses
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from equilibria.core.stop import Stop
from equilibria.corpora import Corpus
from equilibria.fixed_point import Method
from equilibria.language import LanguageConfig, LanguageModel, LanguageOutput, RecurrentConfig
from equilibria.layers.dropout import BatchSlice, batch_draw
from equilibria.stability import jacobian_penalty
from equilibria.training.names import nearest_or_all
from equilibria.training.settings import Training, at_least, finite
from equilibria.training.sources import Source
from equilibria.training.text import Language

SOLVES = ("method", "eval_stop")
"""Fields of a stage that decide how an ``Equilibrium`` solves, and which stages' validations can be compared."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of the training with its own way to solve."""

    name: str
    """What the logs call it."""
    steps: int
    """Training steps."""
    method: Method | None = None
    """How the equilibrium is found and differentiated; None for a model that solves nothing."""
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
        finite(self)
        at_least(self, 1, "steps")
        if self.penalty < 0:
            raise ValueError(
                f"Stage(penalty={self.penalty}): the weight of the penalty is ≥ 0; try 1.0, or 0 for none."
            )
        if not 0 < self.penalty_share <= 1:
            raise ValueError(f"Stage(penalty_share={self.penalty_share}): a probability in (0, 1]; try 0.4.")
        if self.method is None:
            self._check_without_method()
            return
        budget = self.method.stop.max_evals
        if not 0 <= self.budget_jitter < budget:
            raise ValueError(
                f"Stage(budget_jitter={self.budget_jitter}): a budget of {budget} evaluations falls short by 0 to "
                f"{budget - 1} of them; try 2, or 0 for the same budget in every step."
            )

    def _check_without_method(self) -> None:
        for name in ("penalty", "eval_stop", "warm", "budget_jitter"):
            if getattr(self, name):
                raise ValueError(
                    f"Stage({name}={getattr(self, name)!r}) without a method: it belongs to an equilibrium; give "
                    f"method=Method(…), or leave {name} out."
                )

    @property
    def training_method(self) -> Method | None:
        """How the stage is solved in training; failures are counted and recorded, so no solve warns of them."""
        return self.method and dataclasses.replace(self.method, on_failure="ignore")

    @property
    def evaluation_method(self) -> Method | None:
        """How the equilibrium is found in evaluation."""
        method = self.training_method
        return method if method is None or self.eval_stop is None else dataclasses.replace(method, stop=self.eval_stop)

    def drawn_method(self, method: Method | None) -> Method | None:
        """``method`` with a budget drawn for this step, max_evals − U{0, …, budget_jitter}.

        So that no one depth is learnt by heart: from the code of Bai, Koltun and Kolter (2021). It is drawn from
        PyTorch's generator, and only where there is something to draw.
        """
        if self.budget_jitter == 0 or method is None:
            return method
        shortfall = int(torch.randint(self.budget_jitter + 1, ()))
        stop = dataclasses.replace(method.stop, max_evals=method.stop.max_evals - shortfall)
        return dataclasses.replace(method, stop=stop)

    def drawn_penalty(self, output: LanguageOutput, part: BatchSlice | None) -> Float[Tensor, ""] | None:
        """The Jacobian penalty of a step, without its weight; None if the step has none, which may be drawn."""
        if self.penalty == 0 or output.solution is None:
            return None
        if self.penalty_share < 1 and float(torch.rand(())) >= self.penalty_share:
            return None

        def draw(leaf: Tensor) -> Tensor:
            normal = partial(torch.randn, dtype=leaf.dtype, device=leaf.device)
            return batch_draw(normal, leaf.shape, part=part)

        return jacobian_penalty(output.layer.f, output.solution.z.detach(), draw=draw).mean()


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What is trained on what, and how."""

    name: str
    """What the run is called."""
    corpus: Source
    """Where the text comes from."""
    model: LanguageConfig | RecurrentConfig
    """The sizes of the model."""
    stages: tuple[Stage, ...]
    """The parts of the training, in order."""
    training: Training = dataclasses.field(default_factory=Training)
    """Batches, optimiser, log and checkpoints."""

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("Experiment(stages=()): an experiment has at least one stage; give one Stage(…).")
        finite(self)
        self._check_methods()
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

    def _check_methods(self) -> None:
        """Raise a ValueError unless exactly the stages of an equilibrium have a method."""
        solves = self.model.solves
        for stage in self.stages:
            if solves and stage.method is None:
                raise ValueError(
                    f"Stage({stage.name!r}, method=None) of an equilibrium: it has to know how to solve; give "
                    "method=Method(solver, stop, gradient), or network_of(depth) for a shallow stage."
                )
            if not solves and stage.method is not None:
                raise ValueError(
                    f"Stage({stage.name!r}, method={stage.method}) of a model that solves nothing; leave the method "
                    "out."
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

    def build(self, corpus: Corpus | Language, stage: Stage | None = None) -> LanguageModel:
        """The model with fresh weights, drawn from PyTorch's generator.

        Its own way to solve is that of ``stage``, by default the last one; a training passes that of each step.
        """
        stage = stage or self.stages[-1]
        return self.model.build(len(corpus.vocabulary), method=stage.training_method, eval_stop=stage.eval_stop)
