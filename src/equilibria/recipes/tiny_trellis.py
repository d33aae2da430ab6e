"""tiny_trellis: a deep equilibrium TrellisNet that learns to spell English documentation in minutes, on a CPU."""

from __future__ import annotations

from equilibria.cells import TrellisShape
from equilibria.gradients import Implicit
from equilibria.language import LanguageShape
from equilibria.solve import Stop
from equilibria.solvers import Picard
from equilibria.training import Experiment, PythonDocs, Stage, Training, network_of


def tiny_trellis() -> Experiment:
    """Characters of Python's documentation: first a network of three layers, then its equilibrium."""
    stop = Stop(rtol=1e-3, max_evals=30)
    return Experiment(
        name="tiny-trellis",
        corpus=PythonDocs(),
        model=LanguageShape(
            cell=TrellisShape(width=128, hidden=192, outputs=128, recurrence="scan"),
            std=0.3,  # a strong input learns sooner, as in `tiny`
        ),
        stages=(
            network_of(3, name="shallow", steps=600),
            Stage(
                name="implicit",
                steps=700,
                solver=Picard(),  # what is left of J leads forwards in time, so its powers vanish of themselves
                stop=stop,
                gradient=Implicit(solver=Picard(), stop=stop),
            ),
        ),
        training=Training(
            batch_size=8,
            segment_length=64,
            learning_rate=5e-3,
            warmup=50,
            clip=1.0,
            log_every=20,
            valid_every=400,
            checkpoint_every=400,
        ),
    )
