"""Weight normalisation, W = g·v/‖v‖ per output row (Salimans and Kingma 2016), written as a function of g and v.

PyTorch's parametrisation caches W; filled without a graph by the solver, it would cut g and v off from the gradient.
Here nothing is cached: ``effective()`` is called once per forward pass, in ``prepare``, and its value is passed on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from equilibria.torch_private import version

Init = Literal["default_fan_in", "normal"]
INITS: tuple[Init, ...] = ("default_fan_in", "normal")


class NormedLinear(nn.Module):
    """The parameters of x ↦ W x (+ b); it computes W, and its owner computes the product.

    Args:
        inputs: the width of x.
        outputs: the width of W x.
        bias: add b, which starts at 0.
        normed: W = g·v/‖v‖ row by row, where g starts at ‖v‖; otherwise W is the parameter itself.
        init: W from U(±1/√inputs) ("default_fan_in") or from N(0, std²) ("normal"), drawn before W is split into g
            and v, so that W itself has this distribution.
        std: the standard deviation of "normal".
    """

    def __init__(
        self, *, inputs: int, outputs: int, bias: bool = True, normed: bool = True, init: Init, std: float = 0.01
    ) -> None:
        super().__init__()
        self.init: Init = init
        self.std = std
        self.direction = nn.Parameter(torch.empty(outputs, inputs))
        self.gain = nn.Parameter(torch.empty(outputs)) if normed else None
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the parameters again."""
        if self.init == "normal":
            nn.init.normal_(self.direction, std=self.std)
        else:
            bound = 1 / math.sqrt(self.direction.shape[1])
            nn.init.uniform_(self.direction, -bound, bound)
        if self.gain is not None:
            self.gain.copy_(self.direction.norm(dim=1))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def effective(self, kept: Bool[Tensor, "out kept"] | None = None, rate: float = 0.0) -> Float[Tensor, "out in"]:
        """W, with graph.

        Args:
            kept: False for the entries of the first columns of v to drop before normalisation (DropConnect).
            rate: the share that is dropped; the other entries of these columns are multiplied by 1/(1 − rate).
        """
        if kept is not None:
            return _Dropped.apply(self.direction, self.gain, kept, 1 / (1 - rate))  # pyright: ignore
        if self.gain is None:
            return self.direction
        return self.direction * (self.gain / torch.linalg.vector_norm(self.direction, dim=1)).unsqueeze(1)

    def extra_repr(self) -> str:
        """The sizes, and whether there are a bias and weight normalisation."""
        outputs, inputs = self.direction.shape
        return f"inputs={inputs}, outputs={outputs}, bias={self.bias is not None}, normed={self.gain is not None}"


class LinearWeights(NamedTuple):
    """The matrix W and the bias b of a linear module."""

    weight: Float[Tensor, "out in"]
    bias: Float[Tensor, " out"] | None


def weights_of(linear: nn.Module, *, inputs: int, like: Tensor, bias: bool = True) -> LinearWeights:
    """W and b of a linear module, with graph, computed once per forward pass.

    If another library has replaced a ``NormedLinear`` or an ``nn.Linear`` by a module of its own, such as one with a
    low-rank adapter or with quantised weights, W is its result for the identity, and b its result for zero.

    Args:
        linear: a ``NormedLinear``, an ``nn.Linear``, or any module that computes x ↦ W x + b.
        inputs: the width of x.
        like: gives dtype and device.
        bias: False if the module must not add anything.

    Raises:
        ValueError: the module adds something, and must not.
    """
    if isinstance(linear, NormedLinear):
        return LinearWeights(linear.effective(), linear.bias)
    if type(linear) is nn.Linear:
        return LinearWeights(linear.weight, linear.bias)
    eye = torch.eye(inputs, dtype=like.dtype, device=like.device)
    rows = linear(torch.cat([eye, eye.new_zeros(1, inputs)]))
    added = rows[-1]
    if not bias and bool(added.any()):
        raise ValueError(
            f"a {type(linear).__name__} that replaces a linear map without bias adds a bias; replace it by one that "
            "does not."
        )
    return LinearWeights((rows[:-1] - added).t(), added if bias else None)


def like_of(module: nn.Module) -> Tensor:
    """A tensor with dtype and device of the module's parameters.

    Dynamically quantised weights are no parameters: they compute in float32 on a CPU.
    """
    return next(module.parameters(), torch.empty(0, dtype=torch.float32))


@torch.no_grad()
def fold(module: nn.Module) -> None:
    """Replace every ``NormedLinear`` inside the module by the ``nn.Linear`` with the same W and b, for use elsewhere.

    The folded module computes the same outputs. Trained further, its weights are no longer normalised.
    """
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, NormedLinear):
                setattr(parent, name, _folded(child))


def _folded(linear: NormedLinear) -> nn.Linear:
    outputs, inputs = linear.direction.shape
    plain = nn.Linear(inputs, outputs, bias=linear.bias is not None, device="meta")
    plain.weight = nn.Parameter(linear.effective().detach().clone(), requires_grad=linear.direction.requires_grad)
    if linear.bias is not None:
        plain.bias = linear.bias
    return plain.train(linear.training)


class Held:
    """The cached result of a computation from a module's parameters alone, reused for every generated position.

    It is recomputed when a parameter was changed in place by an optimiser or ``load_state_dict``, replaced, cast or
    moved. Two changes that PyTorch does not count go unnoticed until ``renew``: writing through ``parameter.data``, and
    the step of an optimiser with ``fused=True``. Copies and pickles of the module start with an empty cache.
    """

    def __init__(self) -> None:
        self.renew()

    def of(self, module: nn.Module, compute: Callable[[], Any], *choices: Any) -> Any:
        """``compute()``, or its last value if parameters, autocast and ``choices`` are the same."""
        parameters = list(module.parameters())
        if any(p.is_inference() for p in parameters):  # tensors of inference mode do not count changes
            return compute()
        versions = [(id(p), version(p), p.dtype, p.device) for p in parameters]
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
"""Number of rows of v that are copied at a time."""


class _Dropped(torch.autograd.Function):
    """W from a v with dropped entries; autograd keeps no second copy of v."""

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
    """The gradients of v and of the gain."""
    if gain is None or norm is None:
        return _drop(grad.clone(), kept, scale), None
    if torch.is_grad_enabled():  # for a second derivative: recorded by autograd, with its intermediate results
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
    """Multiply the first columns of v by ``kept``·``scale``, in place."""
    v[:, : kept.shape[1]].mul_(kept).mul_(scale)
    return v
