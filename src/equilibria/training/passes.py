"""The forward and backward passes of one training step: over a whole batch, or over its parts one after the other.

Letters: B rows of this rank's batch, P parts.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from equilibria.core.solve import Solution
from equilibria.corpora import Segment
from equilibria.fixed_point import Method
from equilibria.language import LanguageModel, LanguageOutput
from equilibria.layers.dropout import BatchSlice
from equilibria.layers.sequence import Memory
from equilibria.training.comparison import loss_of
from equilibria.training.device import device_of, random_state, set_random_state
from equilibria.training.experiment import Stage
from equilibria.training.nested import joined, owned, rows_of
from equilibria.training.ranks import Ranks, gradients_kept
from equilibria.training.settings import Training


@dataclasses.dataclass(frozen=True, eq=False)
class Passed:
    """What the passes of a step give back; gradients are on the parameters."""

    loss: Float[Tensor, ""]
    """Mean nats of this rank's rows."""
    extra: Float[Tensor, ""] | None
    """What the model's own losses have added."""
    penalty: Float[Tensor, ""] | None
    """The Jacobian penalty without its weight."""
    solutions: tuple[Solution, ...]
    """One a part; none without an equilibrium."""
    memory: Memory
    """Of this rank's rows, for the next segment."""


@dataclasses.dataclass(frozen=True, eq=False)
class Passes:
    """Computes the gradient of a batch that all ranks share, each its rows, each in ``accumulate`` parts.

    Whatever the number of ranks and parts, the gradient is that of one process with the whole batch, up to the order of
    sums: losses are means over equally many targets, and random numbers are drawn for the whole batch everywhere.
    """

    model: LanguageModel
    replica: Callable[..., LanguageOutput]
    """The model as it is called: where gradients are to be summed over the ranks, what does so."""
    ranks: Ranks
    training: Training

    def over(self, segment: Segment, memory: Memory, stage: Stage, method: Method | None) -> Passed:
        """Forward and backward over all parts of the segment, solved by ``method``."""
        parts = self.training.accumulate
        rows = len(segment.tokens) // parts
        found: list[tuple[LanguageOutput, Tensor | None]] = []
        drawn = stage.drawn_method(method)
        beginning = random_state(device_of(self.model)) if parts > 1 else None
        for index in range(parts):
            if index > 0 and beginning is not None:
                set_random_state(beginning, device_of(self.model))  # every part draws for the whole batch
            with gradients_kept(self.model, self.replica, last=index == parts - 1):
                past = None if segment.fresh or memory is None else rows_of(memory, index * rows, rows)
                part, piece = self._part(index, rows), _rows(segment, index * rows, rows)
                found.append(self._pass(piece, past, stage, method=drawn, part=part))
        outputs, penalties = [output for output, _ in found], [penalty for _, penalty in found]
        extras = [output.extra for output in outputs]
        return Passed(
            loss=torch.stack([output.nats.detach().mean() for output in outputs]).mean(),
            extra=_mean(extras),
            penalty=_mean(penalties),
            solutions=tuple(output.solution for output in outputs if output.solution is not None),
            memory=joined([owned(output.memory) for output in outputs]),
        )

    def _pass(
        self, segment: Segment, past: Memory, stage: Stage, *, method: Method | None, part: BatchSlice | None
    ) -> tuple[LanguageOutput, Tensor | None]:
        options = {"skip": segment.skip, "method": method, "warm": stage.warm, "part": part}
        with self.arithmetic(), self.ranks.called():
            output = self.replica(segment.tokens, segment.targets, past, **options)
            penalty = stage.drawn_penalty(output, part)
            loss = loss_of(output) if penalty is None else loss_of(output) + stage.penalty * penalty
        (loss / self.training.accumulate).backward()
        return output, penalty

    def arithmetic(self) -> contextlib.AbstractContextManager[Any]:
        """Autocast, where the training asks for it."""
        half = self.training.precision == "bfloat16"
        device = device_of(self.model).type
        return torch.autocast(device, dtype=torch.bfloat16) if half else contextlib.nullcontext()

    def _part(self, index: int, rows: int) -> BatchSlice | None:
        parts = self.training.accumulate
        if self.ranks.alone and parts == 1:
            return None
        return BatchSlice(first=(self.ranks.rank * parts + index) * rows, total=self.ranks.size * parts * rows)


def _rows(segment: Segment, first: int, count: int) -> Segment:
    mine = slice(first, first + count)
    return dataclasses.replace(segment, tokens=segment.tokens[mine], targets=segment.targets[mine])


def _mean(values: Sequence[Tensor | None]) -> Tensor | None:
    there = [value.detach() for value in values if value is not None]
    return torch.stack(there).mean() if there else None
