"""The forward and backward passes of one training step: over a whole batch, or over its parts one after the other.

Letters: B rows of this rank's batch, P parts.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from equilibria.corpora import Segment
from equilibria.draws import Part, part_of_batch
from equilibria.equilibrium import Memory
from equilibria.language import LanguageModel, LanguageOutput
from equilibria.solve import Solution
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

    def over(self, segment: Segment, memory: Memory, stage: Stage) -> Passed:
        """Forward and backward over all parts of the segment."""
        parts = self.training.accumulate
        rows = len(segment.tokens) // parts
        found: list[tuple[LanguageOutput, Tensor | None]] = []
        with stage.drawn_budget(self.model.layer):
            beginning = random_state(device_of(self.model)) if parts > 1 else None
            for index in range(parts):
                if index > 0 and beginning is not None:
                    set_random_state(beginning, device_of(self.model))  # every part draws for the whole batch
                with self._part(index, rows), gradients_kept(self.model, self.replica, last=index == parts - 1):
                    past = None if segment.fresh or memory is None else rows_of(memory, index * rows, rows)
                    found.append(self._pass(_rows(segment, index * rows, rows), past, stage))
        outputs, penalties = [output for output, _ in found], [penalty for _, penalty in found]
        extras = [output.extra for output in outputs]
        return Passed(
            loss=torch.stack([output.nats.detach().mean() for output in outputs]).mean(),
            extra=_mean(extras),
            penalty=_mean(penalties),
            solutions=tuple(output.solution for output in outputs if output.solution is not None),
            memory=joined([owned(output.memory) for output in outputs]),
        )

    def _pass(self, segment: Segment, past: Memory, stage: Stage) -> tuple[LanguageOutput, Tensor | None]:
        with self.arithmetic(), self.ranks.called():
            output = self.replica(segment.tokens, segment.targets, past, skip=segment.skip)
            penalty = stage.drawn_penalty(output)
            loss = loss_of(output) if penalty is None else loss_of(output) + stage.penalty * penalty
        (loss / self.training.accumulate).backward()
        return output, penalty

    def arithmetic(self) -> contextlib.AbstractContextManager[Any]:
        """Autocast, where the training asks for it."""
        half = self.training.precision == "bfloat16"
        device = device_of(self.model).type
        return torch.autocast(device, dtype=torch.bfloat16) if half else contextlib.nullcontext()

    @contextlib.contextmanager
    def _part(self, index: int, rows: int) -> Iterator[None]:
        parts = self.training.accumulate
        whole = self.ranks.alone and parts == 1
        part = Part(first=(self.ranks.rank * parts + index) * rows, total=self.ranks.size * parts * rows)
        with part_of_batch(None if whole else part):
            yield


def _rows(segment: Segment, first: int, count: int) -> Segment:
    mine = slice(first, first + count)
    return dataclasses.replace(segment, tokens=segment.tokens[mine], targets=segment.targets[mine])


def _mean(values: Sequence[Tensor | None]) -> Tensor | None:
    there = [value.detach() for value in values if value is not None]
    return torch.stack(there).mean() if there else None
