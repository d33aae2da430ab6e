"""Runs: what a training leaves on disk, and a trained model back from it."""

from equilibria.lm.runs.checkpoint import Checkpoint, CheckpointError
from equilibria.lm.runs.run import Run
from equilibria.lm.runs.trained import Trained, load

__all__ = ["Checkpoint", "CheckpointError", "Run", "Trained", "load"]
