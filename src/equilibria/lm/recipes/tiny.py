"""tiny: a deep equilibrium transformer that learns to spell English documentation in minutes, on a CPU."""

from __future__ import annotations

from equilibria.cells.transformer.cell import TransformerConfig
from equilibria.core.stop import Stop
from equilibria.fixed_point import Method
from equilibria.gradients.implicit import Implicit
from equilibria.lm.corpora import PythonDocs
from equilibria.lm.experiments import (
    Batches,
    Experiment,
    Faults,
    Logging,
    Optimisation,
    Stage,
    Training,
    Validation,
    network_of,
)
from equilibria.lm.model import LanguageConfig
from equilibria.solvers.anderson import Anderson


def tiny() -> Experiment:
    """Characters of Python's documentation: first a network of three layers, then its equilibrium."""
    solver = Anderson(window=6)
    return Experiment(
        name="tiny",
        corpus=PythonDocs(),
        model=LanguageConfig(
            cell=TransformerConfig(width=128, heads=4, inner=512, memory=64, positions="decay"),
            std=0.1,  # ten times the paper's: small embeddings stay long on the plateau of a bigram model
        ),
        stages=(
            network_of(3, name="shallow", steps=1250),
            Stage(
                name="implicit",
                steps=750,
                method=Method(
                    solver,
                    Stop(rtol=1e-2, max_evals=30),
                    Implicit(solver=solver, stop=Stop(rtol=1e-2, max_evals=30)),
                ),
            ),
        ),
        training=Training(
            batches=Batches(batch_size=8, segment_length=64),
            optimisation=Optimisation(learning_rate=2e-3, warmup=100, clip=1.0),
            log=Logging(log_every=20),
            validation=Validation(valid_every=400),
            faults=Faults(checkpoint_every=400),
        ),
    )
