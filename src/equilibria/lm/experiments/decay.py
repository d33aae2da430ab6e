"""Decay: how the learning rate falls after the warm-up, as a function of the step or of the validation losses."""

from __future__ import annotations

import dataclasses
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from equilibria.checks import check_fields


class Decay(ABC):
    """How the learning rate falls after the warm-up. Subclasses are frozen dataclasses of numbers."""

    @abstractmethod
    def rate(self, step: int, *, peak: float, warmup: int, total: int, final: float, divisions: int) -> float:
        """The rate for a step after the warm-up; the arguments are those of ``learning_rate``."""

    def divides(self, losses: Sequence[float]) -> bool:
        """True if the last of these validation losses, oldest first, divides the rate; by default never."""
        return False


@dataclasses.dataclass(frozen=True)
class Cosine(Decay):
    """Half a cosine from the peak to the final learning rate; see ``learning_rate``."""

    origin: Literal["warmup", "start"] = "warmup"
    """Where the cosine has its peak: at the end of the warm-up, or at the start of the training, as in the code of Bai,
    Kolter and Koltun (2019), where the rate jumps down at the end of the warm-up."""

    def __post_init__(self) -> None:
        check_fields(self)

    def rate(self, step: int, *, peak: float, warmup: int, total: int, final: float, divisions: int) -> float:
        """final + ½ (peak − final) (1 + cos(π p)), where p is the progress since the origin.

        From "warmup" p is (step − warmup) / (total + 1 − warmup), and from "start" it is (step − 1) / total.
        """
        after, whole = (step - 1, total) if self.origin == "start" else (step - warmup, total + 1 - warmup)
        progress = min(1.0, after / max(1, whole))
        return final + 0.5 * (peak - final) * (1.0 + math.cos(math.pi * progress))


@dataclasses.dataclass(frozen=True)
class Milestones(Decay):
    """The peak, divided by the same number after each of several steps."""

    steps: tuple[int, ...]
    """Steps, counted over the whole training, after which the rate is divided."""
    divide: float = 10.0
    """Divisor of the rate."""

    def __post_init__(self) -> None:
        _check(self, above={"divide": 1})
        if not self.steps or self.steps[0] < 1 or list(self.steps) != sorted(set(self.steps)):
            raise ValueError(
                f"Milestones(steps={self.steps}): give at least one step, counted from 1, each later than the one "
                "before; try (1_000, 2_000), or Cosine()."
            )

    def rate(self, step: int, *, peak: float, warmup: int, total: int, final: float, divisions: int) -> float:
        """peak / divide^n after n of the milestones."""
        return peak / self.divide ** sum(step > milestone for milestone in self.steps)


@dataclasses.dataclass(frozen=True)
class NonMonotone(Decay):
    """Divides the rate after a validation that is worse than the best one at least n + 1 validations before it.

    The criterion is that of NT-ASGD (Merity, Keskar and Socher 2017, algorithm 1), which begins to average the weights
    when it first holds. The code of TrellisNet (Bai, Kolter and Koltun 2019) divides the rate of plain SGD by 4
    whenever it holds.
    """

    window: int = 10
    """n: the n validations before the last one are ignored when the best earlier one is determined."""
    divide: float = 4.0
    """Divisor of the rate; with averaging ("asgd") the rate is not divided."""
    floor: float = 0.02
    """A rate at or below it is not divided again, as in that code: 20 ends at 20/4⁵ = 0.0195."""

    def __post_init__(self) -> None:
        _check(self, least={"window": 1, "floor": 0}, above={"divide": 1})

    def rate(self, step: int, *, peak: float, warmup: int, total: int, final: float, divisions: int) -> float:
        """peak / divide^n, where n are the divisions of rates above the floor."""
        counted = next((n for n in range(divisions) if peak / self.divide**n <= self.floor), divisions)
        return peak / self.divide**counted

    def divides(self, losses: Sequence[float]) -> bool:
        """True if more than n losses precede the last one and it exceeds the minimum of all but the last n of them."""
        *before, loss = losses
        return len(before) > self.window and loss > min(before[: -self.window])


@dataclasses.dataclass(frozen=True)
class Plateau(Decay):
    """Divides the rate when more than ``patience`` validations in a row are no improvement.

    The rule is that of ``torch.optim.lr_scheduler.ReduceLROnPlateau`` in its relative form, without cool-down.
    """

    patience: int = 5
    """Number of validations in a row that may bring no improvement; the next such validation divides the rate."""
    divide: float = 10.0
    """Divisor of the rate."""
    threshold: float = 1e-4
    """Relative amount by which a loss must be below the best one to count as an improvement."""

    def __post_init__(self) -> None:
        _check(self, least={"patience": 0, "threshold": 0}, above={"divide": 1})

    def rate(self, step: int, *, peak: float, warmup: int, total: int, final: float, divisions: int) -> float:
        """peak / divide^divisions."""
        return peak / self.divide**divisions

    def divides(self, losses: Sequence[float]) -> bool:
        """True if the patience is exceeded at the last loss; the count restarts after each division."""
        best, idle, divided = math.inf, 0, False
        for loss in losses:
            better = loss < best * (1 - self.threshold)
            best, idle = (loss, 0) if better else (best, idle + 1)
            divided = idle > self.patience
            idle = 0 if divided else idle
        return divided


CATALOGUE = (Cosine, Milestones, NonMonotone, Plateau)


@dataclasses.dataclass(frozen=True)
class Validated:
    """The validation losses so far, and their effect on the learning rate."""

    losses: tuple[float, ...] = ()
    """Mean nll of the validations that are comparable with each other, oldest first."""
    divisions: int = 0
    """Number of times that validations have divided the rate."""

    @classmethod
    def stored(cls, state: Mapping[str, Any] | None) -> Validated:
        """The value from the JSON of its ``dataclasses.asdict``; an empty one for None, as in old checkpoints."""
        return cls() if state is None else cls(losses=tuple(state["losses"]), divisions=state["divisions"])

    def after(self, loss: float, decay: Decay) -> Validated:
        """The value after one more validation; a loss that is not finite counts as worse than any other."""
        losses = (*self.losses, loss if math.isfinite(loss) else sys.float_info.max)
        return Validated(losses=losses, divisions=self.divisions + decay.divides(losses))

    def without_losses(self) -> Validated:
        """The value without losses, for a model whose losses are not comparable; the divisions stay."""
        return dataclasses.replace(self, losses=())


def learning_rate(
    step: int,
    *,
    peak: float,
    warmup: int,
    total: int,
    final: float = 0.0,
    decay: Decay | None = None,
    divisions: int = 0,
) -> float:
    """The rate for step s = 1, 2, …, ``total``: linear warm-up to ``peak``, then the decay, by default half a cosine.

        s ≤ warmup:  peak · s / warmup
        s > warmup:  final + ½ (peak − final) (1 + cos(π (s − warmup) / (total + 1 − warmup)))

    The rate is set before the step, so with a warm-up the first update has the rate peak / warmup. It depends only on s
    and, where validations divide it, on the number of divisions. ``final`` is the rate of step ``total`` + 1, since a
    step with a rate of 0 would train nothing. Deviations from the code of Bai, Kolter and Koltun (2019): theirs sets
    the rate after the step, so that the first update has the full rate, and measures the cosine from step 0, as
    ``Cosine(origin="start")`` does.

    Args:
        step: s, counted from 1; after ``total`` a cosine stays at ``final``.
        peak: the largest rate, reached at the end of the warm-up.
        warmup: steps of the warm-up; 0 for none.
        total: steps of the whole training.
        final: final rate of a cosine; the other decays ignore it.
        decay: how the rate falls after the warm-up; None for ``Cosine()``.
        divisions: number of times that validations have divided the rate.

    Raises:
        ValueError: ``step`` is below 1.
    """
    if step < 1:
        raise ValueError(f"learning_rate(step={step}): steps are counted from 1; give the number of the next step.")
    if step <= warmup:
        return peak * step / warmup
    decay = Cosine() if decay is None else decay
    return decay.rate(step, peak=peak, warmup=warmup, total=total, final=final, divisions=divisions)


def _check(decay: Decay, *, above: dict[str, float], least: dict[str, float] | None = None) -> None:
    """Raise a ValueError for fields of the wrong type, not above ``above``, or below ``least``."""
    check_fields(decay)
    wrong = [(name, f"above {bound:g}") for name, bound in above.items() if not getattr(decay, name) > bound]
    for name, bound in (least or {}).items():
        if not getattr(decay, name) >= bound:
            wrong.append((name, f"at least {bound:g}"))
    for name, wanted in wrong:
        value, usual = getattr(decay, name), getattr(type(decay), name)
        raise ValueError(f"{type(decay).__name__}({name}={value}): it must be a finite number {wanted}; try {usual}.")
