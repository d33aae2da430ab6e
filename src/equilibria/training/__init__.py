"""Training: an experiment as one value, the trainer, its run directory, evaluation and measurements."""

from equilibria.training.checkpoint import CheckpointError
from equilibria.training.comparison import memory_comparison
from equilibria.training.evaluation import Evaluation, evaluate
from equilibria.training.experiment import Experiment, Stage, Training
from equilibria.training.memory import PeakMemory
from equilibria.training.run import Run
from equilibria.training.schedule import learning_rate
from equilibria.training.serialise import from_json, to_json
from equilibria.training.sources import Copying, PennTreebank, PythonDocs, Source, TextFolder
from equilibria.training.step import Step
from equilibria.training.trainer import Trainer, TrainingStopped

__all__ = [
    "CheckpointError",
    "Copying",
    "Evaluation",
    "Experiment",
    "PeakMemory",
    "PennTreebank",
    "PythonDocs",
    "Run",
    "Source",
    "Stage",
    "Step",
    "TextFolder",
    "Trainer",
    "Training",
    "TrainingStopped",
    "evaluate",
    "from_json",
    "learning_rate",
    "memory_comparison",
    "to_json",
]
