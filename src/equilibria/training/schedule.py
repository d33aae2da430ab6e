"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math


def learning_rate(step: int, *, peak: float, warmup: int, total: int, final: float = 0.0) -> float:
    """The rate for step s = 1, 2, …, ``total``: linear warm-up to ``peak``, then half a cosine down towards ``final``.

        s ≤ warmup:  peak · s / warmup
        s > warmup:  final + ½ (peak − final) (1 + cos(π (s − warmup) / (total + 1 − warmup)))

    It is set before the step, so that with a warm-up the first update has the rate peak / warmup, and it depends on
    nothing but s. ``final`` would be the rate of the step after the last: a step with a rate of 0 would train nothing.
    Deviations from the code of Bai, Kolter and Koltun (2019): theirs is set after the step (the first update has the
    full rate), and their cosine is measured from step 0, which makes the rate jump where the warm-up ends.

    Args:
        step: s, counted from 1; beyond ``total`` the rate stays ``final``.
        peak: the largest rate, reached at the end of the warm-up.
        warmup: steps of the warm-up; 0 for none.
        total: steps of the whole training.
        final: what the rate falls towards.
    """
    if step < 1:
        raise ValueError(f"learning_rate(step={step}): steps are counted from 1; the rate is set before the step.")
    if step <= warmup:
        return peak * step / warmup
    progress = min(1.0, (step - warmup) / max(1, total + 1 - warmup))
    return final + 0.5 * (peak - final) * (1.0 + math.cos(math.pi * progress))
