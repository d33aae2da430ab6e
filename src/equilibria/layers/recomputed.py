"""Weights that hooks of PyTorch compute from others before each call of a module.

``torch.nn.utils.prune`` and the older ``weight_norm`` and ``spectral_norm`` are such hooks. A module whose weights are
read without a call, as in ``prepare``, would have those of the last call: without a graph, or of the step before.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from equilibria.core.trees import tensors_in
from equilibria.layers.cell import Cell, Prepared
from equilibria.layers.sequence import sequence_cell
from equilibria.torch_private import hooks_of_calls

_COMPUTE_WEIGHTS = (BasePruningMethod, WeightNorm, SpectralNorm)


def prepared_by(cell: Cell, *inputs: Any, **options: Any) -> Prepared:
    """``cell.prepare(*inputs, **options)`` with the weights of this moment; every layer calls it through here.

    Raises:
        ValueError: parameters of the cell are on the meta device, and its inputs are not.
    """
    if type(cell).prepare is not Cell.prepare:  # a call of the cell does it for all that f itself reads
        with_own_weights(cell)
    try:
        return cell.prepare(*inputs, **options)
    except RuntimeError as error:
        empty = [name for name, parameter in cell.named_parameters() if parameter.is_meta]
        if not empty or all(tensor.is_meta for tensor in tensors_in(inputs)):
            raise
        raise ValueError(
            f"The parameter {empty[0]} of the {type(cell).__name__} is on the meta device, whose tensors hold no "
            "numbers, and prepare reads it: load the weights, model.to_empty(device=…) and then load_state_dict. If a "
            "library moves weights to the device only while their own module is called (cpu_offload), keep the whole "
            "layer on the device."
        ) from error


def cache_of(cell: Cell, batch: int, **choices: Any) -> Any:
    """``cell.cache(batch, **choices)`` with the weights of this moment; a TypeError if the cell keeps no past."""
    remembering = sequence_cell(cell)
    with torch.no_grad():
        with_own_weights(cell)
    return remembering.cache(batch, **choices)


def with_own_weights(module: nn.Module) -> None:
    """Compute again, with graph, all weights inside the module that hooks of PyTorch compute before a call."""
    for part in module.modules():
        for hook in hooks_of_calls(part)[0]:
            if isinstance(hook, _COMPUTE_WEIGHTS):
                hook(part, ())


def does_more_when_called(module: nn.Module) -> bool:
    """True if a call of the module runs code of others too: a hook that computes no weights, or another ``forward``."""
    forward, backward = hooks_of_calls(module)
    others = [hook for hook in forward if not isinstance(hook, _COMPUTE_WEIGHTS)]
    return bool(others or backward) or "forward" in vars(module)
