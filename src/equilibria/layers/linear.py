"""Linear maps x ↦ W x + b in two halves: W once per forward pass, and the product at each evaluation of f.

W = g·v/‖v‖ per output row (weight normalisation, Salimans and Kingma 2016). PyTorch's parametrisation caches W; filled
without a graph by the solver, it would cut g and v off from the gradient. Here nothing is cached: ``effective()`` is
called once per forward pass, in ``prepare``, and its value is passed on.

x Wᵀ + b is computed by the quicker of PyTorch's two libraries for it on a CPU (see ``onednn.py``). The results are
equal up to rounding. ``torch.backends.mkldnn.flags(enabled=False)`` is a context in which everything is computed as by
PyTorch.

Letters: N rows of x, in and out channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from equilibria.layers.dropconnect import dropped_weight
from equilibria.layers.matrices import LinearWeights, weights_by_call
from equilibria.layers.onednn import MKL_HOLDS_BACK, compiled_product
from equilibria.torch_private import (
    hooks_of_calls,
    is_forward_mode,
    is_many,
    is_transformed,
    is_wanted,
    product_by_onednn,
)

Init = Literal["default_fan_in", "normal"]


class NormedLinear(nn.Module):
    """The parameters of x ↦ W x (+ b); it computes W, and its owner computes the product without a call of it.

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
            return dropped_weight(self.direction, self.gain, kept, rate=rate)
        if self.gain is None:
            return self.direction
        return self.direction * (self.gain / torch.linalg.vector_norm(self.direction, dim=1)).unsqueeze(1)

    def forward(self, x: Float[Tensor, "*shape in"]) -> Float[Tensor, "*shape out"]:
        """x Wᵀ + b, for hooks of the module."""
        return functional.linear(x, self.effective(), self.bias)

    def extra_repr(self) -> str:
        """The sizes, and whether there are a bias and weight normalisation."""
        outputs, inputs = self.direction.shape
        return f"inputs={inputs}, outputs={outputs}, bias={self.bias is not None}, normed={self.gain is not None}"


def weights_of(module: nn.Module, *, inputs: int, like: Tensor, bias: bool = True) -> LinearWeights:
    """W and b of a linear module, with graph, computed once per forward pass.

    If another library has replaced a ``NormedLinear`` or an ``nn.Linear`` by a module of its own, such as one with a
    low-rank adapter or with quantised weights, or acts on its calls by a hook or another ``forward``, W is its result
    for the identity, and b its result for zero. So a hook sees the identity, and not what f multiplies.

    Args:
        module: a ``NormedLinear``, an ``nn.Linear``, or any module that computes x ↦ W x + b.
        inputs: the width of x.
        like: gives dtype and device.
        bias: False if the module must not add anything.

    Raises:
        ValueError: the module adds something, and must not, it is not linear, or it has a hook on its backward pass.
    """
    own = not does_more_when_called(module)
    if own and isinstance(module, NormedLinear):
        return LinearWeights(module.effective(), module.bias)
    if own and type(module) is nn.Linear:
        return LinearWeights(module.weight, module.bias)
    return weights_by_call(module, inputs=inputs, like=like, bias=bias)


_COMPUTE_WEIGHTS = (BasePruningMethod, WeightNorm, SpectralNorm)
"""Hooks that compute weights from others before each call of a module, which is not called where they are read."""


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


@torch.no_grad()
def fold(module: nn.Module) -> None:
    """Replace every ``NormedLinear`` inside the module by the ``nn.Linear`` with the same W and b, for use elsewhere.

    The folded module computes the same outputs. Trained further, its weights are no longer normalised.
    """
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, NormedLinear):
                setattr(parent, name, _folded(child))


def _folded(normed: NormedLinear) -> nn.Linear:
    outputs, inputs = normed.direction.shape
    plain = nn.Linear(inputs, outputs, bias=normed.bias is not None, device="meta")
    plain.weight = nn.Parameter(normed.effective().detach().clone(), requires_grad=normed.direction.requires_grad)
    if normed.bias is not None:
        plain.bias = normed.bias
    return plain.train(normed.training)


LEAST_MULTIPLICATIONS = 2**22
"""With fewer multiplications of two numbers, oneDNN takes longer to begin than it saves."""


def linear(
    x: Float[Tensor, "*shape in"], weight: Float[Tensor, "out in"], added: Float[Tensor, "*_ out"] | None = None
) -> Float[Tensor, "*shape out"]:
    """x Wᵀ + b, differentiable any number of times, backwards and forwards.

    Args:
        x: rows.
        weight: W.
        added: the bias b [out], or a number for each entry of the result.
    """
    bias, entries = (None, added) if added is not None and added.ndim > 1 else (added, None)
    if not _by_onednn(x, weight):
        if entries is None:
            return functional.linear(x, weight, bias)
        return torch.addmm(entries.flatten(0, -2), x.flatten(0, -2), weight.t()).view(*x.shape[:-1], -1)
    rows = x.flatten(0, -2)
    if torch.compiler.is_compiling():
        product = compiled_product(rows, weight, bias)
    elif torch.is_grad_enabled():
        product: Any = _Product.apply(*map(_inner, (rows, weight, bias)))
    else:
        product = product_by_onednn(rows, weight, bias)
    product = product if entries is None else product.add_(entries.flatten(0, -2))
    return product if x.ndim == 2 else product.unflatten(0, x.shape[:-1])  # a view must not be changed in place


def _inner(tensor: Tensor | None) -> Tensor | None:
    """The tensor, or a view of a leaf. Autograd tells of inner nodes alone whether their gradient is wanted."""
    if tensor is None or not (tensor.requires_grad and tensor.is_leaf):
        return tensor
    return tensor.view_as(tensor)


def _by_onednn(x: Tensor, weight: Tensor) -> bool:
    """True where oneDNN is the quicker one, unless only PyTorch's own operator can do what follows."""
    return (
        MKL_HOLDS_BACK
        and weight.shape[0] * x.numel() >= LEAST_MULTIPLICATIONS
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == "cpu"
        and type(x) in _PLAIN
        and type(weight) in _PLAIN
        and torch.backends.mkldnn.enabled
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_exporting()
        and (torch.compiler.is_compiling() or not (is_forward_mode() or is_transformed()))
    )


_PLAIN = (Tensor, nn.Parameter)


class _Product(torch.autograd.Function):
    """x Wᵀ + b by oneDNN. Its first derivatives are computed so, too, and all others by operations of PyTorch."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return product_by_onednn(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = grads
        wanted = [*(is_wanted(node) for node, _ in ctx.next_functions), False]  # without a bias there is no third node
        if not (torch.is_grad_enabled() or is_forward_mode() or is_many(g)):
            return _gradients(ctx, g, wanted, product_by_onednn)
        with torch.autocast("cpu", enabled=False):
            return _gradients(ctx, g, wanted, _plainly)


def _gradients(
    ctx: Any, g: Float[Tensor, "N out"], wanted: Sequence[bool], product: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor | None, ...]:
    """The gradients of x, W and b, as far as they are wanted."""
    x, weight = ctx.saved_tensors
    return (
        product(g, weight.t()) if wanted[0] else None,
        product(g.t(), x.t()) if wanted[1] else None,
        g.sum(dim=0) if wanted[2] else None,
    )


def _plainly(a: Float[Tensor, "N in"], b: Float[Tensor, "out in"]) -> Float[Tensor, "N out"]:
    return a @ b.mT


def _compiled_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    return _gradients(ctx, g, ctx.needs_input_grad, lambda a, b: compiled_product(a, b, None))


compiled_product.register_autograd(_compiled_backward, setup_context=_Product.setup_context)
