"""growing_penalty: a Jacobian penalty whose weight grows with the steps, as a sequence of stages."""

from __future__ import annotations

import dataclasses
import itertools
import math

from equilibria.lm.experiments.stage import Stage


def growing_penalty(stage: Stage, *, first: float, increment: float, every: int, done: int = 0) -> tuple[Stage, ...]:
    """The stage divided into stages whose penalty γ is ``first``, ``first + increment``, ``first + 2·increment``, ….

    γ grows when the number of steps since the beginning of the training is a multiple of ``every``, as in the code of
    Bai, Koltun and Kolter (2021). So the first part is shorter if ``done`` is not a multiple, and the last one if the
    stage ends earlier. Each part is named after its γ: "implicit γ=1.9".

    Args:
        stage: the stage to divide; its own penalty is ignored.
        first: γ of the first part.
        increment: increase of γ from part to part; with 0 the stage is not divided.
        every: steps between two increases.
        done: steps of all stages before this one.

    Raises:
        ValueError: ``every`` is below 1, ``done`` below 0, ``first`` or ``increment`` negative or not finite.
    """
    _check(first=first, increment=increment, every=every, done=done)
    end = done + stage.steps
    # Exclusive on the left: an increase at the very beginning of the stage would make a part without steps.
    growths = range((done // every + 1) * every, end, every) if increment else ()
    parts = []
    for index, (begin, until) in enumerate(itertools.pairwise([done, *growths, end])):
        penalty = round(float(first + index * increment), 12)  # 2.2 instead of 2.2000000000000002
        name = f"{stage.name} γ={penalty}"
        parts.append(dataclasses.replace(stage, name=name, steps=until - begin, penalty=penalty))
    return tuple(parts)


def _check(*, first: float, increment: float, every: int, done: int) -> None:
    for name, value, least in (
        ("first", first, 0),
        ("increment", increment, 0),
        ("every", every, 1),
        ("done", done, 0),
    ):
        if not least <= value < math.inf:
            raise ValueError(
                f"growing_penalty({name}={value}): it must be a finite number, at least {least}; the authors' are "
                "first=1.9, increment=0.1, every=35_000, done=32_000."
            )
