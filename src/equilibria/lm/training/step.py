"""One training step: its learning rate, forward and backward over a batch or its parts one by one, and clipping.

A step draws what is random in it besides dropout: its budget, and whether it has the Jacobian penalty.

Letters: B streams of this rank, P parts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import ASGD, Optimizer

from equilibria.core.solve import Solution
from equilibria.core.trees import map_tensors, tensors_in, with_tensors
from equilibria.fixed_point import Method
from equilibria.layers.dropout import BatchSlice, batch_draw
from equilibria.layers.sequence import Memory
from equilibria.lm.corpora import Segment
from equilibria.lm.experiments.decay import Validated, learning_rate
from equilibria.lm.experiments.settings import Optimisation
from equilibria.lm.experiments.stage import Stage
from equilibria.lm.experiments.training import Training
from equilibria.lm.model import LanguageModel, LanguageOutput
from equilibria.lm.ranks import Ranks, full_tensor, gradients_kept
from equilibria.lm.training.randomness import random_state, set_random_state
from equilibria.stability import jacobian_penalty


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """The result of one training step as tensors, so that it waits for the device only when numbers are read."""

    loss: Float[Tensor, ""]
    """Mean nll per token in nats over all ranks, without extra losses and penalty."""
    extra: Float[Tensor, ""] | None
    """The weighted sum of the model's extra losses; None if it has none."""
    penalty: Float[Tensor, ""] | None
    """The Jacobian penalty without its weight; None if the step had none."""
    gradient_norm: Float[Tensor, ""]
    """Euclidean norm of the whole gradient before clipping."""
    learning_rate: float
    """The learning rate of this step."""
    tokens: int
    """Number of tokens that all ranks together have scored."""
    solutions: tuple[Solution, ...]
    """The solves of this rank, one per part of the batch; empty without an equilibrium."""
    memory: Memory
    """The memory of this rank's streams, for the next segment."""

    @property
    def solution(self) -> Solution | None:
        """The last of ``solutions``; None if there are none."""
        return self.solutions[-1] if self.solutions else None

    @property
    def adjoints(self) -> tuple[Solution, ...]:
        """The adjoint solves; empty if the gradient rule solves nothing in the backward pass."""
        return tuple(solution.adjoint[-1] for solution in self.solutions if solution.adjoint)


@dataclasses.dataclass(frozen=True, eq=False)
class Accumulation:
    """Computes the gradient of a batch that is divided among the ranks, and on each rank into ``accumulate`` parts.

    For any number of ranks and parts, the gradient is that of one process with the whole batch, up to the order of
    sums: losses are means over equally many targets, and every part draws random numbers for the whole batch.
    """

    model: LanguageModel
    """The model itself."""
    replica: Callable[..., LanguageOutput]
    """The model that training calls; see ``Ranks.spread``."""
    ranks: Ranks
    """The processes that train together."""
    training: Training
    """The settings of the training."""
    device: torch.device
    """The device of the model."""

    def step(
        self, segment: Segment, memory: Memory, stage: Stage, *, method: Method | None, learning_rate: float
    ) -> Step:
        """Forward and backward over all parts of the segment with ``method``; the gradient is summed and clipped.

        ``segment`` is on the model's device.
        """
        parts = self.training.devices.accumulate
        rows = len(segment.tokens) // parts  # streams per part
        found: list[tuple[LanguageOutput, Tensor | None]] = []
        drawn = drawn_method(stage, method)
        beginning = random_state(self.device) if parts > 1 else None
        for index in range(parts):
            if index > 0 and beginning is not None:
                set_random_state(beginning, self.device)  # every part draws for the whole batch
            last = index == parts - 1
            with contextlib.nullcontext() if last else gradients_kept(self.model, self.replica):
                past = None if segment.resets or memory is None else _rows_of(memory, index * rows, rows)
                part, piece = self._part(index, rows), _rows(segment, index * rows, rows)
                found.append(self._pass(piece, past, stage, method=drawn, part=part))
        outputs, penalties = [output for output, _ in found], [penalty for _, penalty in found]
        return Step(
            loss=torch.stack([output.nll.detach().mean() for output in outputs]).mean(),
            extra=_mean([output.extra for output in outputs]),
            penalty=_mean(penalties),
            gradient_norm=self._clipped(),
            learning_rate=learning_rate,
            tokens=sum(output.nll.numel() for output in outputs) * self.ranks.size,
            solutions=tuple(output.solution for output in outputs if output.solution is not None),
            memory=joined([owned(output.memory) for output in outputs]),
        )

    def arithmetic(self) -> contextlib.AbstractContextManager[Any]:
        """Autocast if the training uses bfloat16; otherwise an empty context."""
        bfloat16 = self.training.optimisation.precision == "bfloat16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16) if bfloat16 else contextlib.nullcontext()

    def _pass(
        self, segment: Segment, past: Memory, stage: Stage, *, method: Method | None, part: BatchSlice | None
    ) -> tuple[LanguageOutput, Tensor | None]:
        options = {"skip": segment.skip, "method": method, "warm": stage.warm, "depth": stage.depth, "part": part}
        with self.arithmetic():
            output = self.replica(segment.tokens, segment.targets, past, **options)
            penalty = drawn_penalty(stage, output, part)
            loss = output.loss if penalty is None else output.loss + stage.penalty * penalty
        (loss / self.training.devices.accumulate).backward()
        return output, penalty

    def _clipped(self) -> Float[Tensor, ""]:
        """Clip the gradient; returns its norm before clipping."""
        limit = self.training.optimisation.clip
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), math.inf if limit is None else limit)
        return (full_tensor(norm) if self.ranks.parallel == "fsdp" else norm).detach()

    def _part(self, index: int, rows: int) -> BatchSlice | None:
        parts = self.training.devices.accumulate
        if self.ranks.size * parts == 1:
            return None
        return BatchSlice(first=(self.ranks.rank * parts + index) * rows, total=self.ranks.size * parts * rows)


def set_learning_rate(
    optimiser: Optimizer,
    settings: Optimisation,
    step: int,
    validated: Validated,
    *,
    total: int,
    factor: float = 1.0,
) -> float:
    """Set the learning rate of ``step``, counted from 1, to ``factor`` times the scheduled rate; returns it.

    It is set before the step.

    Args:
        optimiser: the optimiser.
        settings: peak, warm-up and decay of the rate.
        step: number of the step.
        validated: the validations so far, which may have divided the rate.
        total: number of steps of the whole training.
        factor: factor of the rate.
    """
    # With ASGD a division starts the averaging instead.
    divisions = 0 if isinstance(optimiser, ASGD) else validated.divisions
    rate = factor * learning_rate(
        step,
        peak=settings.learning_rate,
        warmup=settings.warmup,
        total=total,
        final=settings.final_learning_rate,
        decay=settings.decay,
        divisions=divisions,
    )
    for group in optimiser.param_groups:
        group["lr"] = rate
    if isinstance(optimiser, ASGD):  # ASGD computes the rate of a step at the end of the previous step
        for state in optimiser.state.values():
            state["eta"].fill_(rate)
    return rate


def drawn_method(stage: Stage, method: Method | None) -> Method | None:
    """``method`` with a budget drawn for one step, max_evals − U{0, …, budget_jitter}.

    It keeps the weights from fitting one particular depth, as in the code of Bai, Koltun and Kolter (2021). The number
    comes from PyTorch's global generator, which is not used if ``budget_jitter`` is 0.
    """
    if stage.budget_jitter == 0 or method is None:
        return method
    shortfall = int(torch.randint(stage.budget_jitter + 1, ()))
    stop = dataclasses.replace(method.stop, max_evals=method.stop.max_evals - shortfall)
    return method.with_stop(stop)


def drawn_penalty(stage: Stage, output: LanguageOutput, part: BatchSlice | None) -> Float[Tensor, ""] | None:
    """The Jacobian penalty of a step at z*, without its weight; None if it has none (see ``Stage.penalty_share``)."""
    if stage.penalty == 0 or output.solution is None:
        return None
    if stage.penalty_share < 1 and float(torch.rand(())) >= stage.penalty_share:
        return None

    def draw(leaf: Tensor) -> Tensor:
        normal = partial(torch.randn, dtype=leaf.dtype, device=leaf.device)
        return batch_draw(normal, leaf.shape, part=part)

    found = output.solution
    point = map_tensors(torch.Tensor.detach, found.z if found.point is None else found.point)
    return jacobian_penalty(output.layer.f, point, draw=draw).mean()


def owned(memory: Memory) -> Memory:
    """A detached, contiguous copy of the memory.

    A view would keep the longer state alive that it is a part of. And a resumed run has contiguous tensors from its
    checkpoint: products of tensors with other strides could differ in the last bit.
    """
    return map_tensors(lambda tensor: tensor.detach().clone(memory_format=torch.contiguous_format), memory)


def joined(memories: Sequence[Memory]) -> Memory:
    """The rows of several memories as one memory, in order."""
    parts = [tensors_in(memory) for memory in memories]
    if len(parts) == 1 or not parts[0]:
        return memories[0]
    return with_tensors(memories[0], map(torch.cat, zip(*parts, strict=True)))


def _rows_of(memory: Memory, first: int, count: int) -> Memory:
    return map_tensors(lambda tensor: tensor[first : first + count], memory)


def _rows(segment: Segment, first: int, count: int) -> Segment:
    mine = slice(first, first + count)
    return dataclasses.replace(segment, tokens=segment.tokens[mine], targets=segment.targets[mine])


def _mean(values: Sequence[Tensor | None]) -> Tensor | None:
    there = [value.detach() for value in values if value is not None]
    return torch.stack(there).mean() if there else None
