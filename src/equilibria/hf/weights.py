"""Checks the weights of a saved model against its configuration, and draws those that are missing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from equilibria.layers.linear import NormedLinear


def are_folded(model: nn.Module) -> bool:
    """True if no weights are normalised any more, as after ``fold``."""
    return not any(isinstance(module, NormedLinear) for module in model.modules())


def check_form(told: Mapping[str, Iterable[str]], *, folded: bool) -> None:
    """Raise a ValueError if a file holds other weights than the configuration describes.

    transformers draws the missing weights, ignores the others, and says so only in its log.

    Args:
        told: what ``from_pretrained`` tells of its loading.
        folded: the field of the configuration.
    """
    missing, others = sorted(told["missing_keys"]), sorted(told["unexpected_keys"])
    if not missing or not others:
        return
    words = f"the file lacks {_few(missing)} and has {_few(others)}, and the model would have new weights there"
    mine, theirs = (".weight", ".direction") if folded else (".direction", ".weight")
    if {name.removesuffix(mine) for name in missing} & {name.removesuffix(theirs) for name in others}:
        stored, state = ("normalised", "true") if folded else ("folded", "false")
        raise ValueError(
            f'config.json says "folded": {state}, and the weights are stored {stored}: {words}; write '
            f'"folded": {str(not folded).lower()}.'
        )
    raise ValueError(f"The weights are those of another model than config.json describes: {words}.")


@torch.no_grad()
def draw(module: nn.Module) -> None:
    """Initialise the parameters of a module that the checkpoint lacks, by the library's own rule for that module."""
    reset = getattr(module, "reset_parameters", None)
    if reset is None:
        return
    loaded = [(p, p.clone()) for p in module.parameters() if getattr(p, "_is_hf_initialized", False)]
    reset()
    for parameter, value in loaded:
        parameter.copy_(value)


def _few(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
