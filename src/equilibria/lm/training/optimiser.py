"""The optimiser of an experiment, and the averages of NT-ASGD."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.optim import ASGD, SGD, Adam, AdamW, Optimizer

from equilibria.lm.experiments.decay import Validated
from equilibria.lm.experiments.settings import Optimisation


def build_optimiser(model: nn.Module, settings: Optimisation) -> Optimizer:
    """The optimiser over all parameters of the model.

    "asgd" is NT-ASGD (Merity, Keskar and Socher 2017, algorithm 1): plain SGD until a validation triggers the
    non-monotone criterion, and then the same SGD with averaging of the weights:

        θ_{k+1} = θ_k − η g_k,    θ̄_k = 1/(k − T + 1) Σ_{i=T…k} θ_i

    The rate η does not change, and T is the second step after the trigger, as in PyTorch's ``ASGD`` and their code.
    """
    parameters, rate, weight_decay = model.parameters(), settings.learning_rate, settings.weight_decay
    if settings.optimiser == "sgd":
        return SGD(parameters, lr=rate, weight_decay=weight_decay, momentum=settings.momentum)
    if settings.optimiser == "asgd":
        return ASGD(parameters, lr=rate, weight_decay=weight_decay, lambd=0.0, t0=math.inf)
    kind = {"adam": Adam, "adamw": AdamW}[settings.optimiser]
    return kind(parameters, lr=rate, weight_decay=weight_decay, betas=settings.betas, eps=settings.epsilon)


def note_validation(optimiser: Optimizer, validated: Validated, settings: Optimisation, loss: float) -> Validated:
    """The validation history after one more loss; ASGD begins to average when the criterion first triggers."""
    after = validated.after(loss, settings.decay)
    if isinstance(optimiser, ASGD) and after.divisions > 0 and not _averages(optimiser):
        _begin_averaging(optimiser)
    return after


def restart_averages(optimiser: Optimizer, validated: Validated) -> Validated:
    """Reset the validation history and restart weight averaging when a stage changes the model."""
    if isinstance(optimiser, ASGD) and _averages(optimiser):
        _begin_averaging(optimiser)
    return validated.without_losses()


@contextlib.contextmanager
def averaged(optimiser: Optimizer) -> Iterator[bool]:
    """Within it, the parameters are the averages of ASGD; yields False, and changes nothing, if there are none."""
    averages = _averages(optimiser)
    kept = [parameter.detach().clone() for parameter in averages]
    _fill(averages.keys(), averages.values())
    try:
        yield bool(averages)
    finally:
        _fill(averages.keys(), kept)


def _averages(optimiser: Optimizer) -> dict[Tensor, Tensor]:
    """The averages by parameter; empty before the averaging begins, and for every other optimiser."""
    averaging = any(group.get("t0", math.inf) < math.inf for group in optimiser.param_groups)
    return {parameter: state["ax"] for parameter, state in optimiser.state.items()} if averaging else {}


@torch.no_grad()
def _begin_averaging(optimiser: ASGD) -> None:
    """Start, or restart, the averages with the present weights."""
    steps = [float(state["step"]) for state in optimiser.state.values()]
    for group in optimiser.param_groups:
        group["t0"] = max(steps, default=0.0)
    for parameter, state in optimiser.state.items():
        state["ax"].copy_(parameter)
        state["mu"].fill_(1.0)


@torch.no_grad()
def _fill(parameters: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
