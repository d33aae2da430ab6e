"""Training: the trainer, its steps and its measurements."""

from equilibria.lm.training.measure import memory_comparison
from equilibria.lm.training.policy import TrainingStopped
from equilibria.lm.training.step import Step
from equilibria.lm.training.trainer import Trainer, TrainingInterrupted

__all__ = [
    "Step",
    "Trainer",
    "TrainingInterrupted",
    "TrainingStopped",
    "memory_comparison",
]
