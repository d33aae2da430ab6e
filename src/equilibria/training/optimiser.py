"""The optimiser of an experiment."""

from __future__ import annotations

from torch import nn
from torch.optim import Adam, AdamW, Optimizer

from equilibria.training.experiment import Experiment, Training
from equilibria.training.schedule import learning_rate


def build_optimiser(model: nn.Module, training: Training) -> Optimizer:
    """Adam or AdamW over all parameters of the model."""
    kind = {"adam": Adam, "adamw": AdamW}[training.optimiser]
    return kind(
        model.parameters(),
        lr=training.learning_rate,
        betas=training.betas,
        eps=training.epsilon,
        weight_decay=training.weight_decay,
    )


def set_learning_rate(optimiser: Optimizer, experiment: Experiment, step: int) -> float:
    """Set, and return, the learning rate of the step, counted from 1: it is set before the step."""
    training = experiment.training
    rate = learning_rate(
        step,
        peak=training.learning_rate,
        warmup=training.warmup,
        total=experiment.total_steps,
        final=training.final_learning_rate,
    )
    for group in optimiser.param_groups:
        group["lr"] = rate
    return rate
