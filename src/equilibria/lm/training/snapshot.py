"""capture and restore: between a training in progress and its checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from equilibria.layers.sequence import Memory
from equilibria.lm.device import device_of
from equilibria.lm.model import LanguageModel
from equilibria.lm.model.modes import eval_mode
from equilibria.lm.ranks import ALONE, Ranks, is_sharded, reshard
from equilibria.lm.runs.checkpoint import Checkpoint, CheckpointError, save
from equilibria.lm.runs.pieces import Piece, like, whole
from equilibria.lm.runs.shards import save_sharded
from equilibria.lm.runs.weights import load_weights, weights
from equilibria.lm.training.memories import flatten, rebuild
from equilibria.lm.training.optimiser import averaged
from equilibria.lm.training.randomness import random_state, set_random_state
from equilibria.lm.training.step import owned

_log = logging.getLogger(__name__)


def capture(
    model: LanguageModel,
    optimiser: Optimizer,
    memory: Memory,
    *,
    step: int,
    state: Mapping[str, Any],
    ranks: Ranks = ALONE,
) -> Checkpoint:
    """A checkpoint of the present state, including PyTorch's random generators; all ranks call it together.

    Sharded weights and optimiser states stay sharded; the memory is that of the streams of all ranks. While ASGD
    averages, ``model`` contains the averages, and ``optimiser`` also the weights with which the training continues.
    """
    kept: dict[str, Any] = {"optimiser": optimiser.state_dict(), "random": random_state(device_of(model))}
    model_weights = weights(model)
    with averaged(optimiser) as averaging:
        if averaging:
            model_weights = {name: tensor.clone() for name, tensor in model_weights.items()}
    if averaging:
        kept["weights"] = weights(model)
    return Checkpoint(
        step=step,
        model=model_weights,
        memory={name: ranks.rows_of_all(tensor) for name, tensor in flatten(memory).items()},
        optimiser=kept,
        state={**state, **circumstances(model), "torch": torch.__version__},
    )


def restore(
    checkpoint: Checkpoint,
    model: LanguageModel,
    optimiser: Optimizer,
    *,
    streams: int,
    depth: int | None = None,
    ranks: Ranks = ALONE,
) -> Memory:
    """Restore weights, optimiser and random generators from a checkpoint; returns the memory of this rank's streams.

    The checkpoint may have been written by another number of ranks. A warning is logged if the run may differ in the
    last bits from one that never stopped.

    Args:
        checkpoint: the checkpoint.
        model: the model, which is changed in place.
        optimiser: its optimiser, which is changed in place.
        streams: number of streams of this rank.
        depth: number of layers that the last step before the checkpoint used; None for all.
        ranks: the processes that train together.

    Raises:
        CheckpointError: the checkpoint is of a model with other weights or another memory.
    """
    if "optimiser" not in checkpoint.optimiser:
        raise CheckpointError(
            "These weights were converted from a published file, which holds no optimiser and no position in the text, "
            "so no training can continue from them; evaluate, generate and export read them."
        )
    load_weights(model, checkpoint.optimiser.get("weights", checkpoint.model))
    optimiser.load_state_dict(_sharded_as(optimiser, checkpoint.optimiser["optimiser"]))
    memory = _memory(checkpoint, model, streams=streams, depth=depth, ranks=ranks)
    set_random_state(checkpoint.optimiser["random"], device_of(model))
    for name, now in circumstances(model).items():
        before = checkpoint.state.get(name, now)
        if before != now:
            _log.warning(
                "The weights were trained with %s = %s and the training continues with %s: their last bits may differ "
                "from those of a run that never stopped; --training.%s %s avoids this.",
                *(name, before, now, name, before),
            )
    return memory


def circumstances(model: nn.Module) -> dict[str, Any]:
    """Runtime settings that affect bitwise reproducibility, by their names in ``Training``."""
    return {"threads": torch.get_num_threads(), "device": device_of(model).type}


def save_together(folder: Path, checkpoint: Checkpoint, ranks: Ranks) -> None:
    """Write the checkpoint: rank 0 alone, or, if the weights are sharded, every rank its own shards."""
    if any(is_sharded(tensor) for tensor in checkpoint.model.values()):
        save_sharded(folder, checkpoint, ranks)
    elif ranks.first:
        save(folder, checkpoint)
    ranks.wait()


def _sharded_as(optimiser: Optimizer, stored: Mapping[str, Any]) -> dict[str, Any]:
    """The state of an optimiser with each tensor sharded like its parameter."""
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    state = {
        index: {
            name: like(value, parameters[index]) if _of_shape(value, parameters[index]) else _read(value)
            for name, value in values.items()
        }
        for index, values in stored["state"].items()
    }
    return {**stored, "state": state}


def _of_shape(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor | Piece) and value.shape == parameter.shape


def _read(value: Any) -> Any:
    return whole(value) if isinstance(value, Piece) else value


def _memory(checkpoint: Checkpoint, model: LanguageModel, *, streams: int, depth: int | None, ranks: Ranks) -> Memory:
    """The stored tensors in the structure of the cell's memory, which is found by reading one token."""
    if not checkpoint.memory:
        return None
    token = torch.zeros(streams, 1, dtype=torch.long, device=device_of(model))
    with eval_mode(model):
        template = model(token, token, None, depth=depth).memory
    reshard(model)
    try:
        return owned(rebuild(template, {name: ranks.my_rows(all_) for name, all_ in checkpoint.memory.items()}))
    except KeyError as error:
        raise CheckpointError(f"The checkpoint is of another model: {error.args[0]}; start a new run.") from None
