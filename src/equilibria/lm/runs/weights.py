"""The weights of a model as named tensors, and copying them into a model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from equilibria.lm.runs.checkpoint import CheckpointError
from equilibria.lm.runs.pieces import Piece, like


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The model's ``state_dict`` with each tensor once, under the first of its names."""
    found: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)
    return {name: t.detach() for name, t in state.items() if found.setdefault(id(t), name) == name}


def load_weights(model: nn.Module, stored: Mapping[str, Tensor | Piece]) -> None:
    """Copy the result of ``weights`` into the model.

    Raises:
        CheckpointError: names or shapes differ; nothing has been copied.
    """
    mine = weights(model)
    for name in sorted(mine.keys() | stored.keys()):
        have, need = stored.get(name), mine.get(name)
        if have is None or need is None or have.shape != need.shape:
            raise CheckpointError(
                f"The checkpoint is of another model: {name} is {_shape(have)} in it and {_shape(need)} in the model; "
                "build the model from the experiment.json of its run."
            )
    with torch.no_grad():
        for name, tensor in mine.items():
            tensor.copy_(like(stored[name], tensor))


def _shape(tensor: Tensor | Piece | None) -> str:
    return "missing" if tensor is None else str(list(tensor.shape))
