"""Experiments: frozen values that describe a training completely, and their JSON."""

from equilibria.lm.experiments.decay import Cosine, Decay, Milestones, NonMonotone, Plateau, learning_rate
from equilibria.lm.experiments.experiment import Experiment
from equilibria.lm.experiments.explicit import explicit
from equilibria.lm.experiments.growing_penalty import growing_penalty
from equilibria.lm.experiments.serialise import from_json, part_from_json, part_to_json, to_json
from equilibria.lm.experiments.settings import Batches, Devices, Faults, Logging, Optimisation, Validation
from equilibria.lm.experiments.stage import Stage, network_of
from equilibria.lm.experiments.training import Training

__all__ = [
    "Batches",
    "Cosine",
    "Decay",
    "Devices",
    "Experiment",
    "Faults",
    "Logging",
    "Milestones",
    "NonMonotone",
    "Optimisation",
    "Plateau",
    "Stage",
    "Training",
    "Validation",
    "explicit",
    "from_json",
    "growing_penalty",
    "learning_rate",
    "network_of",
    "part_from_json",
    "part_to_json",
    "to_json",
]
