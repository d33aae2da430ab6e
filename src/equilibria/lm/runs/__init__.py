"""Runs: the directory that a training writes, and loading a trained model from it."""

from equilibria.lm.runs.checkpoint import Checkpoint, CheckpointError
from equilibria.lm.runs.run import Run
from equilibria.lm.runs.trained import Trained, load

__all__ = ["Checkpoint", "CheckpointError", "Run", "Trained", "load"]
