"""Weight normalisation, W = g·v/‖v‖ per output row (Salimans and Kingma 2016), written as a function of g and v.

PyTorch's parametrisation caches W; filled without a graph by the solver, it would cut g and v off from the gradient.
Here nothing is cached: ``effective()`` is called once per forward pass, in ``prepare``, and its value is passed on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
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
        if kept is not None:
            return _Dropped.apply(self.direction, self.gain, kept, 1 / (1 - rate))  # pyright: ignore
        if self.gain is None:
            return self.direction
        return self.direction * (self.gain / torch.linalg.vector_norm(self.direction, dim=1)).unsqueeze(1)

    def extra_repr(self) -> str:
        """Sizes and kind."""
        outputs, inputs = self.direction.shape
        return f"inputs={inputs}, outputs={outputs}, bias={self.bias is not None}, normed={self.gain is not None}"


class Held:
    """What a module computes from its parameters alone, kept from one generated position to the next.

    It is computed again when a parameter was changed in place by an optimiser or ``load_state_dict``, replaced, cast or
    moved. Only what PyTorch does not count as a change goes unnoticed, until ``renew``: writing through
    ``parameter.data``, and the step of an optimiser with ``fused=True``. Copies and pickles of the module begin without
    it.
    """

    def __init__(self) -> None:
        self.renew()

    def of(self, module: nn.Module, compute: Callable[[], Any], *choices: Any) -> Any:
        """``compute()``, or its last value if parameters, autocast and ``choices`` are the same."""
        parameters = list(module.parameters())
        if any(p.is_inference() for p in parameters):  # of inference mode: they count no changes
            return compute()
        versions = [(id(p), p._version, p.dtype, p.device) for p in parameters]
        devices = {p.device.type for p in parameters}
        autocast = [(torch.is_autocast_enabled(name), torch.get_autocast_dtype(name)) for name in devices]
        key = (choices, versions, autocast)
        if key != self._key:
            self._key, self._value = key, compute()
            self._parameters = parameters  # kept alive, so that no other tensor can have the id of one of them
        return self._value

    def renew(self) -> None:
        """Forget the value."""
        self._key: Any = None
        self._value: Any = None
        self._parameters: list[nn.Parameter] = []

    def __deepcopy__(self, memo: Any) -> Held:
        return Held()

    def __reduce__(self) -> tuple[type[Held], tuple[()]]:
        return Held, ()


ROWS = 512
"""Rows of v that are copied at a time."""


class _Dropped(torch.autograd.Function):
    """W of a v of which entries were dropped, without a copy of v that autograd would keep."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, gain: Tensor | None, kept: Tensor, scale: float) -> Tensor:
        w = _drop(v.clone(), kept, scale)
        norm = None if gain is None else torch.linalg.vector_norm(w, dim=1)
        ctx.save_for_backward(v, gain, kept, norm)
        ctx.scale = scale
        return w if gain is None or norm is None else w.mul_((gain / norm).unsqueeze(1))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        """With the unit rows e = v/‖v‖: dg = dW·e, dv = g/‖v‖ (dW − (dW·e) e)."""
        with torch.autocast(grads[0].device.type, enabled=False):
            return *_gradients(grads[0], *ctx.saved_tensors, scale=ctx.scale), None, None


def _gradients(
    grad: Tensor, v: Tensor, gain: Tensor | None, kept: Tensor, norm: Tensor | None, *, scale: float
) -> tuple[Tensor, Tensor | None]:
    """Of v and of the gain."""
    if gain is None or norm is None:
        return _drop(grad.clone(), kept, scale), None
    if torch.is_grad_enabled():  # a second derivative is wanted, and may keep its products
        v = _drop(v.clone(), kept, scale)
        size = torch.linalg.vector_norm(v, dim=1)
        inner = (grad * v).sum(dim=1) / size
        dv = (grad - v * (inner / size).unsqueeze(1)) * (gain / size).unsqueeze(1)
        return _drop(dv.clone(), kept, scale), inner
    dv, inner = torch.empty_like(grad), torch.empty_like(gain)
    pieces = zip(*(x.split(ROWS) for x in (grad, v, gain, kept, norm, dv, inner)), strict=True)
    for grad_rows, v_rows, g, kept_rows, size, out, along in pieces:
        e = _drop(v_rows.clone(), kept_rows, scale)
        along.copy_(torch.bmm(grad_rows[:, None], e[:, :, None])[:, 0, 0] / size)
        torch.mul(grad_rows, (g / size).unsqueeze(1), out=out)
        _drop(out.addcmul_(e, (g * along / size.square()).unsqueeze(1), value=-1), kept_rows, scale)
    return dv, inner


def _drop(v: Tensor, kept: Tensor, scale: float) -> Tensor:
    """In place: the first columns, where they are not kept, become 0."""
    v[:, : kept.shape[1]].mul_(kept).mul_(scale)
    return v
