"""copying: the copy-memory task, with a model of 14,006 parameters."""

from __future__ import annotations

import dataclasses
from typing import Literal

from equilibria.cells.transformer.cell import TransformerConfig
from equilibria.core.stop import Stop
from equilibria.fixed_point import Method
from equilibria.gradients.implicit import Implicit
from equilibria.lm.corpora import Copying
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


def copying() -> Experiment:
    """Ten symbols have to be recalled after 100 blanks; takes minutes on a CPU.

    The task of Bai, Kolter, Koltun (2019), appendix F, at a quarter of its length. The sizes of the model are not
    published; these are chosen to match the published 14 thousand parameters: 14,006, and 268 gains of the weight norm.
    """
    solver = Anderson(window=6)
    return Experiment(
        name="copying",
        corpus=Copying(blank=100),
        model=_model(),
        stages=(
            network_of(3, name="shallow", steps=400),
            Stage(
                name="implicit",
                steps=800,
                method=Method(
                    solver,
                    Stop(rtol=1e-2, max_evals=30),
                    Implicit(solver=solver, stop=Stop(rtol=1e-2, max_evals=30)),
                ),
            ),
        ),
        training=Training(
            batches=Batches(batch_size=32, segment_length=120),
            optimisation=Optimisation(learning_rate=5e-3, warmup=100, clip=1.0),
            log=Logging(log_every=10, memory_depths=(2, 4, 8)),
            validation=Validation(valid_every=200, eval_batch_size=32, valid_segments=10),
            faults=Faults(checkpoint_every=100),
        ),
    )


def _model(attention: Literal["exact", "auto"] = "exact") -> LanguageConfig:
    return LanguageConfig(
        cell=TransformerConfig(width=32, heads=4, inner=76, memory=0, positions="relative", attention=attention),
        tied=False,
        std=0.3,  # as in `tiny`: embeddings that start small learn late
    )


def copying_400() -> Experiment:
    """The task at its full length, 400 blanks, in less than an hour on a CPU; the published loss is 3.5e-6.

    Small batches suffice, since every sequence asks for the same operation. With the usual β₂ = 0.999, Adam divides by
    gradients of a thousand steps ago, which were orders of magnitude larger, and the loss falls far more slowly.
    """
    short = copying()
    shallow, implicit = short.stages
    return dataclasses.replace(
        short,
        name="copying-400",
        corpus=Copying(blank=400),
        model=_model(attention="auto"),
        stages=(dataclasses.replace(shallow, steps=600), dataclasses.replace(implicit, steps=1_400)),
        training=short.training.changed(
            batch_size=8, segment_length=420, learning_rate=3e-3, warmup=300, betas=(0.9, 0.98)
        ),
    )
