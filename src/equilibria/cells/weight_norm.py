"""Weight normalisation, W = g·v/‖v‖ per output row (Salimans and Kingma 2016), written as a function of g and v.

PyTorch's parametrisation caches W; filled without a graph by the solver, it would cut g and v off from the gradient.
Here nothing is cached: ``effective()`` is called once per forward pass, in ``prepare``, and its value is handed on.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

Init = Literal["default_fan_in", "normal"]
INITS: tuple[Init, ...] = ("default_fan_in", "normal")


class NormedLinear(nn.Module):
    """The parameters of x ↦ W x (+ b); it computes W and leaves the product to its owner.

    Args:
        inputs: width of x.
        outputs: width of W x.
        bias: whether there is a b; it starts at 0.
        normed: W = g·v/‖v‖ row by row, with g started at ‖v‖; otherwise W is the parameter itself.
        init: W from U(±1/√inputs) ("default_fan_in") or from N(0, std²) ("normal"), drawn before W is split into g
            and v, so that it is what the name says.
        std: of "normal".
    """

    def __init__(
        self, *, inputs: int, outputs: int, bias: bool = True, normed: bool = True, init: Init, std: float = 0.01
    ) -> None:
        super().__init__()
        self.direction = nn.Parameter(torch.empty(outputs, inputs))
        if init == "normal":
            nn.init.normal_(self.direction, std=std)
        else:
            bound = 1 / math.sqrt(inputs)
            nn.init.uniform_(self.direction, -bound, bound)
        self.gain = nn.Parameter(self.direction.detach().norm(dim=1)) if normed else None
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None

    def effective(self, kept: Bool[Tensor, "out kept"] | None = None, rate: float = 0.0) -> Float[Tensor, "out in"]:
        """W, with graph.

        Args:
            kept: False where an entry of v, in its first columns, is dropped before it is normalised (DropConnect).
            rate: the share that is dropped; what is kept is multiplied by 1/(1 − rate).
        """
        if self.gain is None and kept is None:
            return self.direction
        return _Effective.apply(self.direction, self.gain, kept, 1 / (1 - rate))  # pyright: ignore

    def extra_repr(self) -> str:
        """Sizes and kind."""
        outputs, inputs = self.direction.shape
        return f"inputs={inputs}, outputs={outputs}, bias={self.bias is not None}, normed={self.gain is not None}"


class _Effective(torch.autograd.Function):
    """g·v/‖v‖ of a v of which entries were dropped: of all that it computes only W is kept, and no product with v."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, gain: Tensor | None, kept: Tensor | None, scale: float) -> Tensor:
        dropped = _dropped(v, kept, scale)
        norm = None if gain is None else torch.linalg.vector_norm(dropped, dim=1)
        ctx.save_for_backward(v, gain, kept, norm)
        ctx.scale = scale
        if gain is None or norm is None:
            return dropped
        factor = (gain / norm).unsqueeze(1)
        return v * factor if dropped is v else dropped.mul_(factor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        """With the unit rows e = v/‖v‖: dg = dW·e, dv = g/‖v‖ (dW − (dW·e) e)."""
        (grad,), (v, gain, kept, norm) = grads, ctx.saved_tensors
        if gain is None:
            return _dropped(grad, kept, ctx.scale), None, None, None
        dropped = _dropped(v, kept, ctx.scale)
        if torch.is_grad_enabled():  # a second derivative is wanted, and may have its products
            norm = torch.linalg.vector_norm(dropped, dim=1)
            inner = (grad * dropped).sum(dim=1) / norm
            dv = (grad - dropped * (inner / norm).unsqueeze(1)) * (gain / norm).unsqueeze(1)
            return _dropped(dv, kept, ctx.scale), inner, None, None
        inner = torch.bmm(grad[:, None], dropped[:, :, None])[:, 0, 0] / norm
        dv = grad * (gain / norm).unsqueeze(1)
        dv.addcmul_(dropped, (gain * inner / norm.square()).unsqueeze(1), value=-1)
        return _drop(dv, kept, ctx.scale), inner, None, None


def _dropped(v: Tensor, kept: Tensor | None, scale: float) -> Tensor:
    """v itself, or a copy whose first columns are dropped where they are not kept."""
    return v if kept is None else _drop(v.clone(), kept, scale)


def _drop(v: Tensor, kept: Tensor | None, scale: float) -> Tensor:
    """The same in place."""
    if kept is not None:
        v[:, : kept.shape[1]].mul_(kept).mul_(scale)
    return v
