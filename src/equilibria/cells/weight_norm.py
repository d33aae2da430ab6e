"""Weight normalisation, W = g·v/‖v‖ per output row (Salimans and Kingma 2016), written as a function of g and v.

PyTorch's parametrisation caches W; filled without a graph by the solver, it would cut g and v off from the gradient.
Here nothing is cached: ``effective()`` is called once per forward pass, in ``prepare``, and its value is handed on.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
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

    def effective(self, direction: Float[Tensor, "out in"] | None = None) -> Float[Tensor, "out in"]:
        """W, with graph; of another v, of which entries were dropped, if it is given."""
        v = self.direction if direction is None else direction
        if self.gain is None:
            return v
        return v * (self.gain / torch.linalg.vector_norm(v, dim=1)).unsqueeze(1)

    def extra_repr(self) -> str:
        """Sizes and kind."""
        outputs, inputs = self.direction.shape
        return f"inputs={inputs}, outputs={outputs}, bias={self.bias is not None}, normed={self.gain is not None}"
