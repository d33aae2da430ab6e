"""prefix-sums: parities of random bits, by a cell that carries news from one position to the next."""

from __future__ import annotations

from equilibria.cells.trellis.cell import TrellisConfig
from equilibria.core.stop import Stop
from equilibria.fixed_point import Method
from equilibria.gradients.implicit import Implicit
from equilibria.lm.corpora import PrefixSums
from equilibria.lm.experiments import (
    Batches,
    Experiment,
    Faults,
    Logging,
    Optimisation,
    Stage,
    Training,
    Validation,
)
from equilibria.lm.model import LanguageConfig
from equilibria.solvers.picard import Picard


def prefix_sums() -> Experiment:
    """The parity of the bits so far, at each of 32 positions; takes minutes on a CPU.

    At each position, f reads the state of the position before. One evaluation therefore carries a sum one position
    further, and the equilibrium of N bits needs at least N evaluations. The solver takes as many as a sequence needs.
    There is no shallow stage, since a network of three layers cannot solve the task.
    """
    stop = Stop(rtol=1e-3, max_evals=128)
    return Experiment(
        name="prefix-sums",
        corpus=PrefixSums(),
        model=LanguageConfig(
            cell=TrellisConfig(width=16, hidden=64, outputs=64, recurrence="delayed"), tied=False, std=1.0
        ),
        stages=(Stage(name="implicit", steps=600, method=Method(Picard(), stop, Implicit(Picard(), stop))),),
        training=Training(
            batches=Batches(batch_size=32, segment_length=32),
            optimisation=Optimisation(learning_rate=5e-3, warmup=50, clip=1.0),
            log=Logging(log_every=10, memory_depths=(8, 16, 32)),
            validation=Validation(valid_every=200, eval_batch_size=100),
            faults=Faults(checkpoint_every=200),
        ),
    )
