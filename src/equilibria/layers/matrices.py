"""W and b of a module that replaces a linear one: its results for the identity and for zero."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from equilibria.torch_private import hooks_of_calls, is_batched, is_traced


class LinearWeights(NamedTuple):
    """The matrix W and the bias b of a linear module."""

    weight: Float[Tensor, "out in"]
    bias: Float[Tensor, " out"] | None


def weights_by_call(module: nn.Module, *, inputs: int, like: Tensor, bias: bool = True) -> LinearWeights:
    """W and b of any module that computes x ↦ W x + b, by one call of it; see ``weights_of``."""
    _check_no_backward_hook(module)
    eye = torch.eye(inputs, dtype=like.dtype, device=like.device)
    before = _random_state(like)
    rows = module(torch.cat([eye, eye.new_zeros(1, inputs)]))
    added = rows[-1]
    if not bias and bool(added.any()):
        raise ValueError(
            f"a {type(module).__name__} that replaces a linear map without bias adds a bias; replace it by one that "
            "does not."
        )
    after = _random_state(like)
    if before is not None and after is not None and torch.equal(before, after):
        _check_linear(module, eye, rows)
    return LinearWeights((rows[:-1] - added).t(), added if bias else None)


LINEAR = 1e-2
"""Largest deviation from a linear map, relative to the numbers that are added up: above the rounding of bfloat16."""


@torch.no_grad()
def _check_linear(module: nn.Module, eye: Float[Tensor, "in in"], rows: Float[Tensor, "_ out"]) -> None:
    """Raise a ValueError unless the module maps a sum of unit vectors to the sum of its results for each of them.

    The sum is taken as it is and multiplied by a large number, since a clamp changes large numbers alone. A module
    that draws random numbers, such as an adapter with dropout, has another W for each row, and is not checked.
    """
    wide = torch.promote_types(rows.dtype, torch.float32)
    added, parts = rows[-1].to(wide), (rows[:-1:2] - rows[-1]).to(wide)
    for scale in (1.0, 2.0**6 if rows.dtype == torch.float16 else 2.0**20):  # powers of two round nothing
        # Call by call: a module that quantises its input does so by the largest number of all rows.
        found = module(scale * eye[::2].sum(dim=0, keepdim=True))[0].to(wide)
        wanted = scale * parts.sum(dim=0) + added
        if (found - wanted).norm() > LINEAR * (scale * parts.norm() + wanted.norm() + added.norm()):
            raise ValueError(
                f"a {type(module).__name__} that replaces a linear map, or a hook on it, is not linear, and a cell "
                "reads its matrix once per forward pass instead of calling it: give an adapter that adds a matrix, "
                "such as LoRA, or write an nn.Module f(z, *inputs) of your own, whose parts are called."
            )


def _check_no_backward_hook(module: nn.Module) -> None:
    if any(hooks_of_calls(part)[1] for part in module.modules()):
        raise ValueError(
            f"a {type(module).__name__} has a hook on its backward pass, and a cell reads its matrix once per forward "
            "pass instead of calling it: the hook would get the gradient of the matrix, and not those of its results "
            "in f, nor a gradient per sample. Give the hook to the cell, or take parameter.register_hook."
        )


def _random_state(like: Tensor) -> Tensor | None:
    """The state of the generator of the device; None where it cannot be read, or where no value decides anything."""
    if is_traced() or is_batched() or like.device.type not in ("cpu", "cuda"):
        return None
    return torch.cuda.get_rng_state(like.device) if like.is_cuda else torch.get_rng_state()


def like_of(module: nn.Module) -> Tensor:
    """A tensor with the dtype and the device of the module's parameters.

    Dynamically quantised weights are no parameters: they compute in float32 on a CPU.
    """
    return next(module.parameters(), torch.empty(0, dtype=torch.float32))
