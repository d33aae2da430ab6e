"""capture and restore: between a training in progress and its checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from equilibria.equilibrium import Memory
from equilibria.language import LanguageModel
from equilibria.language.modes import evaluating
from equilibria.training.checkpoint import Checkpoint, CheckpointError
from equilibria.training.device import device_of
from equilibria.training.nested import flatten, owned, rebuild
from equilibria.training.optimiser import averaged

_log = logging.getLogger(__name__)


def capture(
    model: LanguageModel, optimiser: Optimizer, memory: Memory, *, step: int, state: Mapping[str, Any]
) -> Checkpoint:
    """The checkpoint of this moment, the states of PyTorch's random generators included.

    Where ASGD averages, the averages are the model, and the weights that the training goes on with stand beside the
    optimiser.
    """
    random: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if device_of(model).type == "cuda":
        random["cuda"] = torch.cuda.get_rng_state(device_of(model))
    kept: dict[str, Any] = {"optimiser": optimiser.state_dict(), "random": random}
    model_weights = weights(model)
    with averaged(optimiser) as averaging:
        if averaging:
            model_weights = {name: tensor.clone() for name, tensor in model_weights.items()}
    if averaging:
        kept["weights"] = weights(model)
    return Checkpoint(
        step=step,
        model=model_weights,
        memory=flatten(memory),
        optimiser=kept,
        state={**state, **circumstances(model), "torch": torch.__version__},
    )


def restore(checkpoint: Checkpoint, model: LanguageModel, optimiser: Optimizer, *, batch_size: int) -> Memory:
    """Put weights, optimiser and random generators into the state of the checkpoint; returns the memory of the streams.

    A warning says so if the last bits of what follows may differ from those of a run that never stopped.

    Raises:
        CheckpointError: the checkpoint is of a model with other weights.
    """
    load_weights(model, checkpoint.optimiser.get("weights", checkpoint.model))
    optimiser.load_state_dict(checkpoint.optimiser["optimiser"])
    memory = _memory(checkpoint, model, batch_size=batch_size)
    random = checkpoint.optimiser["random"]
    torch.set_rng_state(random["cpu"])
    if "cuda" in random and device_of(model).type == "cuda":
        torch.cuda.set_rng_state(random["cuda"], device_of(model))
    for name, now in circumstances(model).items():
        before = checkpoint.state.get(name, now)
        if before != now:
            _log.warning(
                "The weights were trained with %s = %s and go on with %s: their last bits may differ from those of a "
                "run that never stopped; --training.%s %s avoids that.",
                *(name, before, now, name, before),
            )
    return memory


def circumstances(model: nn.Module) -> dict[str, Any]:
    """What the last bits of the weights depend on, besides the experiment: the fields of ``Training`` as they hold."""
    return {"threads": torch.get_num_threads(), "device": device_of(model).type}


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The model's ``state_dict`` with each tensor once, under the first of its names."""
    found: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)
    return {name: t.detach() for name, t in state.items() if found.setdefault(id(t), name) == name}


def load_weights(model: nn.Module, stored: Mapping[str, Tensor]) -> None:
    """Copy the weights that ``weights`` gave into the model.

    Raises:
        CheckpointError: names or shapes differ; nothing was copied.
    """
    mine = weights(model)
    for name in sorted(mine.keys() | stored.keys()):
        have, need = stored.get(name), mine.get(name)
        if have is None or need is None or have.shape != need.shape:
            raise CheckpointError(
                f"The checkpoint is of another model: {name} is {_shape(have)} in it and {_shape(need)} in the model; "
                "build the model from the experiment.json beside it."
            )
    with torch.no_grad():
        for name, tensor in mine.items():
            tensor.copy_(stored[name])


def _memory(checkpoint: Checkpoint, model: LanguageModel, *, batch_size: int) -> Memory:
    """The stored tensors in the structure of the cell's memory, which is learnt by reading one token."""
    if not checkpoint.memory:
        return None
    token = torch.zeros(batch_size, 1, dtype=torch.long, device=device_of(model))
    with evaluating(model):
        template = model(token, token, None).memory
    try:
        return owned(rebuild(template, checkpoint.memory))
    except KeyError as error:
        raise CheckpointError(f"The checkpoint is of another model: {error.args[0]}; start a new run.") from None


def _shape(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else str(list(tensor.shape))
