"""Training: an experiment as one value, the trainer, its run directory, evaluation and measurements."""

from equilibria.training.checkpoint import CheckpointError
from equilibria.training.comparison import memory_comparison, network_of
from equilibria.training.decay import Cosine, Decay, Milestones, NonMonotone, Plateau, learning_rate
from equilibria.training.evaluation import Evaluation, Setting, evaluate
from equilibria.training.experiment import Experiment, Stage
from equilibria.training.explicit import explicit
from equilibria.training.memory import PeakMemory
from equilibria.training.run import Run
from equilibria.training.schedule import growing_penalty
from equilibria.training.serialise import from_json, to_json
from equilibria.training.settings import Training
from equilibria.training.sources import (
    Copying,
    PennTreebank,
    PennTreebankCharacters,
    PythonDocs,
    Source,
    TextFolder,
    WikiText2,
    WikiText103,
)
from equilibria.training.step import Step
from equilibria.training.trainer import Trainer, TrainingStopped

__all__ = [
    "CheckpointError",
    "Copying",
    "Cosine",
    "Decay",
    "Evaluation",
    "Experiment",
    "Milestones",
    "NonMonotone",
    "PeakMemory",
    "PennTreebank",
    "PennTreebankCharacters",
    "Plateau",
    "PythonDocs",
    "Run",
    "Setting",
    "Source",
    "Stage",
    "Step",
    "TextFolder",
    "Trainer",
    "Training",
    "TrainingStopped",
    "WikiText2",
    "WikiText103",
    "evaluate",
    "explicit",
    "from_json",
    "growing_penalty",
    "learning_rate",
    "memory_comparison",
    "network_of",
    "to_json",
]
