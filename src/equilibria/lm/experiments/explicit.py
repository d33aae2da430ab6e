"""explicit: the explicit baseline of an experiment, a network of L layers instead of the equilibrium.

Tied: every layer is the equilibrium's cell f, including the injection, and z_0 = 0. This is the weight-tied network of
Bai, Kolter and Koltun (2019, table 3); as the number of layers grows, its output approaches the equilibrium.

Untied: a Transformer-XL (Dai et al. 2019) of the same sizes, in which each layer has its own weights: no injection, so
x enters once; layer norms with gain and bias; no weight norm; a dropout mask for each position. Weights start from
N(0, 0.02²); if the equilibrium's matrices start by their width ("default_fan_in"), these do too, and embeddings start
as in the equilibrium: in a narrow network 0.02 is too small, and twelve layers may learn nothing for a long time.
Deviations from its code: (1) each layer has its own position biases u and v; theirs are shared; (2) W_o has a bias; (3)
gains of layer norms start at 1; theirs from N(1, 0.02²); (4) clusters of words, positions, dropout rates and kind of
output dropout are those of the experiment. For a chain of blocks, each layer is a chain of as many.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from equilibria.cells.chain import ChainConfig
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
    "std": 0.02,
}
"""The fields that turn a ``TransformerConfig`` into a layer of Transformer-XL."""


def explicit(
    experiment: Experiment,
    depth: int,
    tied: bool = True,
    *,
    memory: Literal["last", "layers"] = "last",
    checkpoint: bool = False,
) -> Experiment:
    """The experiment with a network of ``depth`` layers instead of the equilibrium, trained by back-propagation.

    The network has the corpus, the sizes, the optimiser and the number of steps of the equilibrium. Shallow stages
    before the first solve stay, as stages that train as many layers of the new network; all other stages become one
    stage with all layers.
    The module's docstring describes the layers.

    Args:
        experiment: an experiment with an equilibrium.
        depth: L, the number of layers.
        tied: all layers share the weights of one cell.
        memory: "last": every layer reads the remembered states of the last layer, as in an equilibrium; "layers": each
            layer remembers its own input, as in Transformer-XL. An untied network always uses "layers".
        checkpoint: keep only the states between layers, and evaluate each layer again in the backward pass.

    Raises:
        ValueError: the experiment has no equilibrium, or its cell has no untied counterpart.
    """
    config = _config(experiment)
    if depth < 1:
        raise ValueError(f"explicit(depth={depth}): a network has at least one layer; try depth=12.")
    layers = Explicit(depth=depth, tied=tied, memory=memory if tied else "layers", checkpoint=checkpoint)
    kind = "-untied" if not tied else "-layer-memory" if memory == "layers" else ""
    if not tied:
        std = config.std if _starts_by_width(config.cell) else TRANSFORMER_XL["std"]
        config = dataclasses.replace(config, cell=_transformer_xl(config.cell), std=std)
    return dataclasses.replace(
        experiment,
        name=f"{experiment.name}-{depth}-layers{kind}{'-recomputed' if checkpoint else ''}",
        model=dataclasses.replace(config, explicit=layers),
        stages=_stages(experiment, depth),
        # Without a fixed point there is no Jacobian to measure.
        training=experiment.training.changed(spectral_radius=0),
    )


def _stages(experiment: Experiment, depth: int) -> tuple[Stage, ...]:
    """Stages of as many layers for the shallow stages before the first solve, and one stage with all layers."""
    shallow: list[Stage] = []
    for stage in experiment.stages:
        layers = stage.layers
        if layers is None or layers >= depth or stage is experiment.stages[-1]:
            break
        shallow.append(Stage(name=stage.name, steps=stage.steps, depth=layers))
    rest = experiment.total_steps - sum(stage.steps for stage in shallow)
    return (*shallow, Stage(name="explicit", steps=rest))


def _config(experiment: Experiment) -> LanguageConfig:
    """The configuration of the model, after checking that it is an equilibrium."""
    config = experiment.model
    if not isinstance(config, LanguageConfig):
        raise ValueError(
            f"explicit({experiment.name!r}): its model is a {type(config).__name__}, which has no equilibrium to "
            "replace; use a recipe with a cell, such as tiny."
        )
    if config.explicit is not None:
        raise ValueError(
            f"explicit({experiment.name!r}): its model is an explicit network of {config.explicit.depth} layers "
            "already; use the recipe that it was made from."
        )
    return config


def _transformer_xl(cell: Any) -> Any:
    """The configuration of a layer of Transformer-XL, or of a chain of them, with the sizes of ``cell``."""
    if isinstance(cell, ChainConfig):
        return dataclasses.replace(cell, cells=tuple(map(_transformer_xl, cell.cells)), memory="blocks")
    if isinstance(cell, TrellisConfig):
        raise ValueError(
            "explicit(tied=False) of a TrellisConfig: a TrellisNet is weight-tied by definition; give tied=True, or on "
            "the command line --explicit without --untied."
        )
    missing = {*TRANSFORMER_XL, "init"} - {field.name for field in dataclasses.fields(cell)}
    if missing:
        raise ValueError(
            f"explicit(tied=False): a {type(cell).__name__} has no {', '.join(sorted(missing))}, and the untied "
            "network is a Transformer-XL; use a TransformerConfig, or tied=True."
        )
    return dataclasses.replace(cell, **TRANSFORMER_XL)


def _starts_by_width(cell: Any) -> bool:
    """True if the matrices of a cell, or of all cells of a chain, start from a range that depends on their width."""
    cells = cell.cells if isinstance(cell, ChainConfig) else (cell,)
    return all(getattr(part, "init", None) == "default_fan_in" for part in cells)
