"""Where a model is, and where it is to go."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from equilibria.corpora import Segment
from equilibria.layers.cell import Cell


def choose_device(name: str) -> torch.device:
    """The device called ``name``; "auto" is a GPU if there is one.

    Raises:
        ValueError: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    allowed = ["auto", "cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if torch.cuda.is_available():
        allowed.append("cuda")
    if name not in allowed:
        raise ValueError(f"Training(device={name!r}): this machine has {', '.join(allowed)}; try auto.")
    return torch.device(name)


def device_of(model: nn.Module) -> torch.device:
    """Where the parameters are."""
    return next(model.parameters()).device


def compile_cells(model: nn.Module) -> None:
    """Compiles every cell, in place: parameters keep their names.

    A cell is called in more ways than torch.compile expects of one function before it gives up: with and without past,
    graph and dropout, with all rows and with some.
    """
    import torch._dynamo  # which takes seconds

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    for module in model.modules():
        if isinstance(module, Cell):
            module.compile()


def to(segment: Segment, device: torch.device) -> Segment:
    """The segment on ``device``."""
    tokens, targets = segment.tokens.to(device, non_blocking=True), segment.targets.to(device, non_blocking=True)
    return dataclasses.replace(segment, tokens=tokens, targets=targets)


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The states of PyTorch's generators on the CPU and, if it is a GPU, on the device."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    """Go back to what ``random_state`` gave; that of a GPU is left out on a CPU."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
