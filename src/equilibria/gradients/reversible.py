"""The gradient of the reversible iteration, by undoing it.

Letters: B batch, N flattened state.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from equilibria.equilibrium import GradientRule, without_graph
from equilibria.gradients.adjoint import differentiated_once, leaves_below
from equilibria.solve import Autocast, CompilableMap, Map, Solution, Solver, Status, Stop, row_norm
from equilibria.solvers import Reversible

ACCURACY = 1e-3
"""Largest relative error of the reconstructed start that is accepted."""


@dataclasses.dataclass(frozen=True)
class ReversibleGradient(GradientRule):
    """The exact gradient of the iterate that ``Reversible`` returns, in memory that does not grow with its steps.

    Each step is inverted from its result, evaluated once more with graph, and its products accumulated: S. McCallum,
    K. Arora, J. Foster (2025). Undoing a step multiplies rounding errors by 1/|1 − β| at least, and by up to 1/(1 − β)²
    where J has eigenvalues near 1. So a dtype in which the budgeted number of steps cannot be undone even at the lower
    rate is refused beforehand; and a backward pass that does not arrive at the start it came from, to a relative 1e-3,
    is an error and never a wrong gradient. ``Stop.best`` is ignored: the last iterate is returned.
    """

    def run(self, f: Map, z0: Float[Tensor, "B *state"], solver: Solver, stop: Stop) -> Solution:
        """The solution; its z is the last iterate, with the gradient of all steps."""
        if not isinstance(solver, Reversible):
            raise TypeError(
                f"ReversibleGradient() got the solver {solver}; only Reversible(…) can be undone: use "
                "solver=Reversible(0.8), or another gradient rule such as Implicit() or Unroll(checkpoint=True)."
            )
        _check_budget(solver, stop, z0.dtype)
        f = f.eager() if isinstance(f, CompilableMap) else f  # compiled code does not say what it reads
        constants = _Constants()
        solution = without_graph(constants.of(f), z0, solver, dataclasses.replace(stop, best=False), keep_history=True)
        if not torch.is_grad_enabled():
            return solution
        y = solution.history.to(z0.dtype).view_as(solution.z)
        path = _Path(
            f=f,
            relaxation=solver.relaxation,
            y=y,
            steps=solution.steps,
            status=solution.status,
            autocast=Autocast(z0.device.type),
            known=tuple(constants.found),
        )
        z = _Undo.apply(path, solution.z, z0, *constants.found.values())
        return dataclasses.replace(solution, z=z, history=None)


def _check_budget(solver: Reversible, stop: Stop, dtype: torch.dtype) -> None:
    loss, eps = math.log(1 / abs(1 - solver.relaxation)), torch.finfo(dtype).eps
    allowed = math.inf if loss <= 0 else math.log(ACCURACY / eps) / loss if eps < ACCURACY else 0
    steps = (stop.max_evals - 1) // 2
    if steps > allowed:
        raise ValueError(
            f"ReversibleGradient cannot undo {steps} steps of {solver} in {dtype}: rounding would grow to "
            f"{eps * math.exp(min(steps * loss, 200)):.0e} of the state ({ACCURACY:.0e} is allowed). Use a float64 "
            f"state (f may compute in {dtype}), max_evals={max(1, 2 * int(allowed) + 1)} at most and less where J is "
            "large, or a smaller relaxation."
        )


class _Constants(TorchFunctionMode):
    """Finds the tensors with gradient that f reads: without graph, nothing that f itself makes requires one."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, Tensor] = {}
        self._complete = False

    def of(self, f: Map) -> Map:
        """f, watched during its first evaluation."""

        def watched(z: Tensor) -> Tensor:
            if self._complete:
                return f(z)
            self._complete = True
            with self:
                return f(z)

        return watched

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                self.found[id(leaf)] = leaf
        return func(*args, **(kwargs or {}))


class _Instead(TorchFunctionMode):
    """Gives f other tensors for its constants: leaves, so that their gradients are partial ones.

    One constant may be made of another, as keys of the past are of weights; what leads from one to the other was
    recorded once, outside f, and is gone through once, after the walk.
    """

    def __init__(self, known: tuple[int, ...], constants: Sequence[Tensor]) -> None:
        super().__init__()
        self.leaves = [constant.detach().requires_grad_() for constant in constants]
        self._of = dict(zip(known, self.leaves, strict=True))

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(lambda value: self._of.get(id(value), value), (args, kwargs or {}))
        return func(*args, **kwargs)


@dataclasses.dataclass(frozen=True, eq=False)
class _Path:
    """What is needed to walk the iteration backwards."""

    f: Map
    relaxation: float
    y: Float[Tensor, "B *state"]
    steps: Int[Tensor, " B"]
    status: Int[Tensor, " B"]
    autocast: Autocast
    known: tuple[int, ...]
    """The identities of the constants, in their order."""


class _Undo(torch.autograd.Function):
    """Identity on z_N forward; backward walks the iteration from (y_N, z_N) to its start."""

    @staticmethod
    def forward(ctx: Any, path: _Path, z: Tensor, z0: Tensor, *constants: Tensor) -> Tensor:
        ctx.path = path
        ctx.save_for_backward(z, z0, *constants)
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        path, (z, z0, *constants) = ctx.path, ctx.saved_tensors
        broken = (path.status == Status.NONFINITE).view(-1, *[1] * (z.ndim - 1))
        with torch.no_grad():
            found, z_bar, sums = _walk_back(path, z, torch.where(broken, torch.nan, cotangents[0]), constants)
            _check_arrival(torch.where(broken, 0.0, found - z0), torch.where(broken, 0.0, z), path)
        behind = [t for t in (z0, *constants) if t.requires_grad]
        return None, None, *differentiated_once([z_bar, *sums], behind=behind)


def _walk_back(path: _Path, z: Tensor, z_bar: Tensor, constants: list[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The start as it was reconstructed, its gradient and those of the constants, from that of z_N."""
    beta, y = path.relaxation, path.y
    y_bar, sums = torch.zeros_like(z_bar), [torch.zeros_like(c) for c in constants]
    for n in reversed(range(int(path.steps.max()))):
        # A sample that had stopped before step n keeps its values: its seed is zero and its state stays.
        live = (path.steps > n).view(-1, *[1] * (z.ndim - 1))
        f_y, at_y = _products(path, y, torch.where(live, beta * z_bar, 0.0), constants, sums)
        z = torch.where(live, (z - beta * f_y) / (1 - beta), z)
        y_bar = y_bar + at_y
        f_z, at_z = _products(path, z, torch.where(live, beta * y_bar, 0.0), constants, sums)
        y = torch.where(live, (y - beta * f_z) / (1 - beta), y)
        z_bar = torch.where(live, (1 - beta) * z_bar + at_z, z_bar)
        y_bar = torch.where(live, (1 - beta) * y_bar, y_bar)
    return z, z_bar + y_bar, sums


def _check_arrival(gap: Tensor, z: Tensor, path: _Path) -> None:
    """The way back must end where the way forth began; what it lost, the gradient has lost too."""
    lost = float((row_norm(gap.flatten(1)) / row_norm(z.flatten(1)).clamp_min(1e-30)).nan_to_num(nan=math.inf).max())
    if lost > ACCURACY:
        raise RuntimeError(
            f"ReversibleGradient undid {int(path.steps.max())} steps and missed the start by {lost:.0e} of the state "
            f"({ACCURACY:.0e} is allowed), so the gradient would be wrong: lower max_evals or the relaxation "
            f"{path.relaxation}, or use Implicit() or Unroll(checkpoint=True)."
        )


def _products(
    path: _Path, point: Tensor, seed: Tensor, constants: list[Tensor], sums: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """f(point) and Jᵀ·seed there; the constants' products are added to ``sums``."""
    instead = _Instead(path.known, constants)
    with torch.enable_grad(), path.autocast.on():
        leaf = point.detach().requires_grad_()
        with instead:
            value = path.f(leaf).to(point.dtype)
    _check_seen(value, instead.leaves)
    products = torch.autograd.grad(value, [leaf, *instead.leaves], seed, allow_unused=True)
    for total, product in zip(sums, products[1:], strict=True):
        if product is not None:
            total += product
    at_point = torch.zeros_like(point) if products[0] is None else products[0]
    return value.detach(), at_point


def _check_seen(value: Tensor, constants: list[Tensor]) -> None:
    """Every leaf below ``value`` must be one of these, or its gradient would be lost without a word."""
    found = {id(constant) for constant in constants}
    for leaf in leaves_below(value):
        # Only the point itself is a leaf that is no constant, and it is no parameter.
        if id(leaf) not in found and isinstance(leaf, torch.nn.Parameter):
            raise RuntimeError(
                f"ReversibleGradient cannot see a parameter of shape {tuple(leaf.shape)} that f uses (a compiled "
                "function or a custom autograd.Function hides it); call f uncompiled, or use Unroll(checkpoint=True)."
            )
