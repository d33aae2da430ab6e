"""ptb: a deep equilibrium transformer on the words of the Penn Treebank, at a size that a CPU can train."""

from __future__ import annotations

from equilibria.cells.transformer.cell import TransformerConfig
from equilibria.core.stop import Stop
from equilibria.fixed_point import Method
from equilibria.gradients.implicit import Implicit
from equilibria.lm.corpora import PennTreebank
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


def ptb() -> Experiment:
    """Words of the Penn Treebank, read from a folder: ``equilibria train ptb --data FOLDER``."""
    solver = Anderson(window=6)
    return Experiment(
        name="ptb",
        corpus=PennTreebank(),
        model=LanguageConfig(
            cell=TransformerConfig(
                width=200, heads=4, inner=800, memory=70, positions="decay", dropout=0.2, attention_dropout=0.0
            ),
            tied=True,
            dropout=0.3,
            std=0.05,  # five times the paper's: embeddings that start small learn late, see `tiny`
        ),
        stages=(
            network_of(3, name="shallow", steps=1600),
            Stage(
                name="implicit",
                steps=1400,
                method=Method(
                    solver,
                    Stop(rtol=1e-2, max_evals=30),
                    Implicit(solver=solver, stop=Stop(rtol=1e-2, max_evals=30)),
                ),
            ),
        ),
        training=Training(
            batches=Batches(batch_size=16, segment_length=70),
            optimisation=Optimisation(learning_rate=2e-3, warmup=200, clip=0.5),
            log=Logging(log_every=10, memory_depths=(8, 16, 32)),
            validation=Validation(valid_every=800, eval_batch_size=10),
            faults=Faults(checkpoint_every=200),
        ),
    )
