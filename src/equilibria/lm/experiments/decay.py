"""How the learning rate falls after the warm-up: with the steps, or with what the validations say."""

from __future__ import annotations

import dataclasses
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any


class Decay(ABC):
    """How the learning rate falls after the warm-up. Subclasses are frozen dataclasses of numbers."""

    @abstractmethod
    def rate(self, step: int, *, peak: float, warmup: int, total: int, final: float, divisions: int) -> float:
        """The rate for a step after the warm-up, for the same arguments as those of ``learning_rate``."""

    def divides(self, losses: Sequence[float]) -> bool:
        """Whether the last of these validations, oldest first, divides the rate; by default none does."""
        return False


@dataclasses.dataclass(frozen=True)
class Cosine(Decay):
    """Half a cosine from the peak down towards the final learning rate; see ``learning_rate``."""

    def rate(self, step: int, *, peak: float, warmup: int, total: int, final: float, divisions: int) -> float:
        """final + ½ (peak − final) (1 + cos(π (step − warmup) / (total + 1 − warmup)))."""
        progress = min(1.0, (step - warmup) / max(1, total + 1 - warmup))
        return final + 0.5 * (peak - final) * (1.0 + math.cos(math.pi * progress))


@dataclasses.dataclass(frozen=True)
class Milestones(Decay):
    """The peak, divided by the same number after each of some steps."""

    steps: tuple[int, ...]
    """Steps of the whole training; the first with a lower rate is the one after."""
    divide: float = 10.0
    """What the rate is divided by."""

    def __post_init__(self) -> None:
        _check(self, above={"divide": 1})
        if not self.steps or self.steps[0] < 1 or list(self.steps) != sorted(set(self.steps)):
            raise ValueError(
                f"Milestones(steps={self.steps}): at least one step, counted from 1 and each later than the one "
                "before; try (1_000, 2_000), or Cosine()."
            )

    def rate(self, step: int, *, peak: float, warmup: int, total: int, final: float, divisions: int) -> float:
        """peak / divide^n after n of the steps."""
        return peak / self.divide ** sum(step > milestone for milestone in self.steps)


@dataclasses.dataclass(frozen=True)
class NonMonotone(Decay):
    """The rate is divided after a validation that is worse than the best of all but the last few before it.

    The criterion is that of NT-ASGD (Merity, Keskar and Socher 2017, algorithm 1), which begins to average where it
    first holds; dividing plain SGD's rate by 4 wherever it holds is what the code of TrellisNet does (Bai, Kolter and
    Koltun 2019).
    """

    window: int = 10
    """n: the validations just before the last one, which do not count: worse than min(all before those)."""
    divide: float = 4.0
    """What the rate is divided by; with averaging ("asgd") it stays as it is."""
    floor: float = 0.02
    """No division leads below this rate; a peak that is lower is never divided."""

    def __post_init__(self) -> None:
        _check(self, least={"window": 1, "floor": 0}, above={"divide": 1})

    def rate(self, step: int, *, peak: float, warmup: int, total: int, final: float, divisions: int) -> float:
        """peak / divide^divisions, and never below the floor."""
        return max(peak / self.divide**divisions, min(peak, self.floor))

    def divides(self, losses: Sequence[float]) -> bool:
        """Whether there are more than n losses before the last, and it is above the least of those but n."""
        *before, loss = losses
        return len(before) > self.window and loss > min(before[: -self.window])


@dataclasses.dataclass(frozen=True)
class Plateau(Decay):
    """The rate is divided when more than so many validations in a row have brought nothing.

    The rule is that of ``torch.optim.lr_scheduler.ReduceLROnPlateau`` in its relative form, without cool-down.
    """

    patience: int = 5
    """Validations in a row without a better loss that are forgiven; the next one divides."""
    divide: float = 10.0
    """What the rate is divided by."""
    threshold: float = 1e-4
    """Relative amount by which a loss must lie below the best one to be better."""

    def __post_init__(self) -> None:
        _check(self, least={"patience": 0, "threshold": 0}, above={"divide": 1})

    def rate(self, step: int, *, peak: float, warmup: int, total: int, final: float, divisions: int) -> float:
        """peak / divide^divisions."""
        return peak / self.divide**divisions

    def divides(self, losses: Sequence[float]) -> bool:
        """Whether patience ends with the last of the losses; it begins anew after each division."""
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
    """What the validations have done to the learning rate so far."""

    losses: tuple[float, ...] = ()
    """Nats of the validations that can be compared with each other, oldest first."""
    divisions: int = 0
    """How often they have divided the rate."""

    @classmethod
    def stored(cls, state: Mapping[str, Any] | None) -> Validated:
        """What ``dataclasses.asdict`` made of one, from JSON; nothing yet if a checkpoint has none."""
        return cls() if state is None else cls(losses=tuple(state["losses"]), divisions=state["divisions"])

    def after(self, loss: float, decay: Decay) -> Validated:
        """The same after one more validation; a loss that is not finite is worse than any other."""
        losses = (*self.losses, loss if math.isfinite(loss) else sys.float_info.max)
        return Validated(losses=losses, divisions=self.divisions + decay.divides(losses))

    def without_losses(self) -> Validated:
        """Without the losses, with which what follows cannot be compared; the rate stays divided."""
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

    It is set before the step, so that with a warm-up the first update has the rate peak / warmup, and it depends on
    nothing but s, and on the number of divisions where validations divide it. ``final`` would be the rate of the step
    after the last: a step with a rate of 0 would train nothing. Deviations from the code of Bai, Kolter and Koltun
    (2019): theirs is set after the step (the first update has the full rate), and their cosine is measured from
    step 0, which makes the rate jump where the warm-up ends.

    Args:
        step: s, counted from 1; beyond ``total`` a cosine stays ``final``.
        peak: the largest rate, reached at the end of the warm-up.
        warmup: steps of the warm-up; 0 for none.
        total: steps of the whole training.
        final: what a cosine falls towards; the other decays have no use for it.
        decay: how the rate falls after the warm-up; None for ``Cosine()``.
        divisions: how often validations have divided the rate.
    """
    if step < 1:
        raise ValueError(f"learning_rate(step={step}): steps are counted from 1; the rate is set before the step.")
    if step <= warmup:
        return peak * step / warmup
    decay = Cosine() if decay is None else decay
    return decay.rate(step, peak=peak, warmup=warmup, total=total, final=final, divisions=divisions)


def _check(decay: Decay, *, above: dict[str, float], least: dict[str, float] | None = None) -> None:
    """Refuse numbers out of bounds."""
    wrong = [(name, f"above {bound:g}") for name, bound in above.items() if not bound < getattr(decay, name) < math.inf]
    for name, bound in (least or {}).items():
        if not bound <= getattr(decay, name) < math.inf:
            wrong.append((name, f"at least {bound:g}"))
    for name, wanted in wrong:
        value, usual = getattr(decay, name), getattr(type(decay), name)
        raise ValueError(f"{type(decay).__name__}({name}={value}): it must be a finite number {wanted}; try {usual}.")
