"""explicit: the explicit baseline of an experiment, a network of L layers where the equilibrium was.

Tied, every layer is the equilibrium's own cell f, injection included, and z_0 = 0: the weight-tied network of Bai,
Kolter and Koltun (2019, table 3), and with ever more layers the equilibrium itself.

Untied, it is a Transformer-XL (Dai et al. 2019) of the same sizes, with weights of their own for each layer: no
injection, so that x enters once; layer norms with gain and bias; no weight norm; dropout masks for each position;
weights from N(0, 0.02²). Deviations from its code: (1) the position biases u and v belong to a layer, and are not
shared by all; (2) W_o has a bias; (3) gains of the layer norms start at 1, and not from N(1, 0.02²); (4) clusters of
words, positions, dropout rates and what is dropped from the output are those of the experiment. Of a chain of blocks,
each layer is a chain of as many.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from equilibria.cells.trellis.cell import TrellisConfig
from equilibria.lm.experiments.experiment import Experiment
from equilibria.lm.experiments.stage import Stage
from equilibria.lm.model import Explicit, LanguageConfig

TRANSFORMER_XL: dict[str, Any] = {
    "injection": False,
    "affine": True,
    "attention_norm": False,
    "weight_norm": False,
    "variational": False,
    "norm": "post",
    "init": "normal",
    "std": 0.02,
}
"""What makes a layer of Transformer-XL of a ``TransformerConfig``."""


def explicit(
    experiment: Experiment,
    depth: int,
    tied: bool = True,
    *,
    memory: Literal["last", "layers"] = "last",
    checkpoint: bool = False,
) -> Experiment:
    """The experiment with a network of ``depth`` layers instead of the equilibrium, trained by back-propagation.

    Corpus, sizes, optimiser and the number of steps are those of the equilibrium. A stage that trains a shallow network
    trains as many layers of this one; the others become one stage with all layers. Flags and ``dataclasses.replace``
    change it as they change any experiment. The module says what the layers are.

    Args:
        experiment: with an equilibrium.
        depth: L, layers.
        tied: whether all layers share the weights of one cell.
        memory: "last" lets all layers read the remembered states of the last one, as in an equilibrium; "layers"
            remembers for each layer its own input, as Transformer-XL does. An untied network always does the latter.
        checkpoint: keep only the states between layers, and evaluate each again in the backward pass.

    Raises:
        ValueError: there is no equilibrium to replace, or no layer to put in its place.
    """
    shape = _shape(experiment)
    if depth < 1:
        raise ValueError(f"explicit(depth={depth}): a network has at least one layer; try depth=12.")
    layers = Explicit(depth=depth, tied=tied, memory=memory if tied else "layers", checkpoint=checkpoint)
    kind = "-untied" if not tied else "-layer-memory" if memory == "layers" else ""
    if not tied:
        shape = dataclasses.replace(shape, cell=_transformer_xl(shape.cell), std=TRANSFORMER_XL["std"])
    return dataclasses.replace(
        experiment,
        name=f"{experiment.name}-{depth}-layers{kind}{'-recomputed' if checkpoint else ''}",
        model=dataclasses.replace(shape, explicit=layers),
        stages=_stages(experiment, depth),
        # It has no meaning without a fixed point.
        training=experiment.training.changed(spectral_radius=0),
    )


def _stages(experiment: Experiment, depth: int) -> tuple[Stage, ...]:
    """The shallow stages before the first solve, as stages of as many layers, and one with all layers."""
    shallow: list[Stage] = []
    for stage in experiment.stages:
        layers = stage.layers
        if layers is None or layers >= depth or stage is experiment.stages[-1]:
            break
        shallow.append(Stage(name=stage.name, steps=stage.steps, depth=layers))
    rest = experiment.total_steps - sum(stage.steps for stage in shallow)
    return (*shallow, Stage(name="explicit", steps=rest))


def _shape(experiment: Experiment) -> LanguageConfig:
    """The shape of an equilibrium."""
    shape = experiment.model
    if not isinstance(shape, LanguageConfig):
        raise ValueError(
            f"explicit({experiment.name!r}): its model is a {type(shape).__name__}, which has no equilibrium to be "
            "replaced; take a recipe with a cell, such as tiny."
        )
    if shape.explicit is not None:
        raise ValueError(
            f"explicit({experiment.name!r}): its model is an explicit network of {shape.explicit.depth} layers "
            "already; take the recipe that it comes from."
        )
    return shape


def _transformer_xl(cell: Any) -> Any:
    """The shape of a layer of Transformer-XL, or of a chain of them, with the sizes of ``cell``."""
    if hasattr(cell, "cells"):
        return dataclasses.replace(cell, cells=tuple(map(_transformer_xl, cell.cells)))
    if isinstance(cell, TrellisConfig):
        raise ValueError(
            "explicit(tied=False) of a TrellisConfig: a TrellisNet is weight-tied, and that is what makes it one; give "
            "tied=True, on the command line --explicit without --untied."
        )
    missing = TRANSFORMER_XL.keys() - {field.name for field in dataclasses.fields(cell)}
    if missing:
        raise ValueError(
            f"explicit(tied=False): a {type(cell).__name__} has no {', '.join(sorted(missing))}, and the untied "
            "network is a Transformer-XL; take a TransformerConfig, or tied=True."
        )
    return dataclasses.replace(cell, **TRANSFORMER_XL)
