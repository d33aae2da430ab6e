"""tiny_trellis: a deep equilibrium TrellisNet that learns to spell English documentation in minutes, on a CPU."""

from __future__ import annotations

from equilibria.cells.trellis.cell import TrellisConfig
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
from equilibria.solvers.picard import Picard


def tiny_trellis() -> Experiment:
    """Characters of Python's documentation: first a network of three layers, then its equilibrium."""
    stop = Stop(rtol=1e-3, max_evals=30)
    return Experiment(
        name="tiny-trellis",
        corpus=PythonDocs(),
        model=LanguageConfig(
            cell=TrellisConfig(width=128, hidden=192, outputs=128, recurrence="scan"),
            std=0.3,  # strong inputs learn sooner, see `tiny`
        ),
        stages=(
            network_of(3, name="shallow", steps=600),
            Stage(
                name="implicit",
                steps=700,
                # J is nearly block-subdiagonal in time, so its powers vanish quickly and plain iteration is enough.
                method=Method(Picard(), stop, Implicit(Picard(), stop)),
            ),
        ),
        training=Training(
            batches=Batches(batch_size=8, segment_length=64),
            optimisation=Optimisation(learning_rate=5e-3, warmup=50, clip=1.0),
            log=Logging(log_every=20),
            validation=Validation(valid_every=400),
            faults=Faults(checkpoint_every=400),
        ),
    )
