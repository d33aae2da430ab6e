"""The gradient of the reversible iteration, by undoing it.

Letters: B batch, N flattened state.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from equilibria.core.capture import Constants, Substitution
from equilibria.core.gradient import GradientRule
from equilibria.core.graph import leaves_below
from equilibria.core.maps import Autocast, FunctionMap, Map
from equilibria.core.solve import Solution, solve_without_graph
from equilibria.core.solver import ForwardSolve
from equilibria.core.state import Layout, State
from equilibria.core.stop import Status, Stop, relative, row_norm
from equilibria.core.tracing import untraced
from equilibria.core.trees import tensors_in
from equilibria.gradients.linearise import differentiated_once
from equilibria.solvers.reversible import Reversible
from equilibria.torch_private import is_many, own_parametrizations

ACCURACY = 1e-3
"""Largest relative error of the reconstructed start that is accepted."""


@dataclasses.dataclass(frozen=True)
class ReversibleGradient(GradientRule):
    """The exact gradient of the iterate that ``Reversible`` returns, in memory that does not grow with its steps.

    Each step is inverted from its result and evaluated once more with graph, and its VJPs are added up: S. McCallum,
    K. Arora, J. Foster (2025). Undoing a step multiplies rounding errors by 1/|1 − β| at least, and by up to 1/(1 − β)²
    where J has eigenvalues near 1. So a dtype that cannot undo the budgeted number of steps even at the lower rate is
    refused beforehand, and a backward pass that misses its start by more than a relative 1e-3 raises an error instead
    of returning a wrong gradient. ``Stop.best`` is ignored: the last iterate is returned.
    """

    def run(self, f: Map, z0: State, method: ForwardSolve) -> Solution:
        """The solution; its z is the last iterate, with the gradient of all steps."""
        solver, stop = method.solver, method.stop
        if not isinstance(solver, Reversible):
            raise TypeError(
                f"ReversibleGradient() got the solver {solver}; only Reversible(…) can be undone: use "
                "solver=Reversible(0.8), or another gradient rule such as Implicit() or Unroll(checkpoint=True)."
            )
        layout = Layout.of(z0, coupled=method.coupled)
        _check_budget(
            solver, stop, max((leaf.dtype for leaf in layout.leaves), key=lambda dtype: torch.finfo(dtype).eps)
        )
        f = f.eager()  # compiled code hides the tensors that it reads
        constants, last = Constants(), dataclasses.replace(stop, best=False)
        solution = solve_without_graph(FunctionMap(constants.of(f)), z0, method, stop=last, keep_history=True)
        if not torch.is_grad_enabled():
            return solution
        if not constants.found:
            solution = dataclasses.replace(solution, evals=solution.evals + _check_hidden(f, solution.z))
        path = _Path(
            f=f.pinned(),
            layout=layout,
            relaxation=solver.relaxation,
            y=solution.history,
            steps=solution.steps[:, None],
            status=solution.status[:, None],
            autocast=Autocast(layout.device.type),
            constants=tuple(constants.found.values()),
        )
        # A view is seen by the function modes around this solve, such as that of another reversible solve.
        read = [c.view_as(c) if c.layout is torch.strided else c for c in constants.found.values()]
        z = _Undo.apply(path, layout.pack(solution.z), layout.pack(z0), *read)
        return dataclasses.replace(solution, z=layout.unpack(z), history=None, point=None)  # pyright: ignore


def _check_budget(solver: Reversible, stop: Stop, dtype: torch.dtype) -> None:
    loss, eps = -math.log10(abs(1 - solver.relaxation)), torch.finfo(dtype).eps  # digits that are lost per step
    allowed = math.log10(ACCURACY / eps) / loss if eps < ACCURACY else 0
    steps = (stop.max_evals - 1) // 2
    if steps > allowed:
        ways = [] if dtype == torch.float64 else [f"a float64 state (f may compute in {dtype})"]
        ways += [f"max_evals={2 * int(allowed) + 1} at most and less where J is large"] if allowed >= 1 else []
        ways += ["a smaller relaxation"] if eps < ACCURACY else ["another rule, such as Implicit()"]
        raise ValueError(
            f"ReversibleGradient cannot undo {steps} steps of {solver} in {dtype}: rounding would grow to "
            f"1e{math.log10(eps) + steps * loss:+.0f} of the state ({ACCURACY:.0e} is allowed). Use "
            f"{', '.join(ways[:-1])}{', or ' if ways[1:] else ''}{ways[-1]}."
        )


def _check_hidden(f: Map, z: State) -> int:
    """Raise a RuntimeError if f reads a tensor that requires a gradient, although no constant was seen.

    Returns the number of evaluations: one, unless the first has a graph.
    """
    hidden = _Hidden()
    with torch.enable_grad(), own_parametrizations():
        return 2 if hidden.check(tensors_in(f(z)), known=()) and hidden.check(tensors_in(f(z)), known=()) else 1


@dataclasses.dataclass(frozen=True, eq=False)
class _Path:
    """The data for walking the iteration backwards."""

    f: Map
    layout: Layout
    relaxation: float
    y: Float[Tensor, "B N"]
    steps: Int[Tensor, "B 1"]
    status: Int[Tensor, "B 1"]
    autocast: Autocast
    constants: tuple[Tensor, ...]
    """The tensors that f reads, as f knows them."""

    @property
    def depth(self) -> int:
        """The number of steps to undo; 0 for an empty batch."""
        return int(self.steps.max()) if self.steps.numel() else 0


class _Undo(torch.autograd.Function):
    """Identity on z_N forward; backward walks the iteration from (y_N, z_N) to its start."""

    @staticmethod
    def forward(ctx: Any, path: _Path, z: Tensor, z0: Tensor, *constants: Tensor) -> Tensor:
        ctx.path = path
        ctx.save_for_backward(z, z0, *constants)
        return z.view_as(z)

    @staticmethod
    @untraced
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        path, (z, z0, *constants) = ctx.path, ctx.saved_tensors
        if is_many(cotangents[0]):
            raise RuntimeError(
                "ReversibleGradient() does not take many cotangents at once (is_grads_batched=True, vectorize=True): "
                "take them one by one, or use gradient=Implicit()."
            )
        broken = path.status == Status.NONFINITE
        with torch.no_grad():
            found, z_bar, sums = _walk_back(path, z, torch.where(broken, torch.nan, cotangents[0]), constants)
            _check_arrival(torch.where(broken, 0.0, found - z0), torch.where(broken, 0.0, z), path)
        behind = [t for t in (cotangents[0], z0, *constants) if t.requires_grad]
        return None, None, *differentiated_once([z_bar, *sums], behind=behind)


def _walk_back(path: _Path, z: Tensor, z_bar: Tensor, constants: list[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The reconstructed start, its gradient and the gradients of the constants, from the gradient of z_N."""
    beta, y = path.relaxation, path.y
    y_bar, sums, hidden = torch.zeros_like(z_bar), [torch.zeros_like(c) for c in constants], _Hidden()
    for n in reversed(range(path.depth)):
        # A sample that had stopped before step n keeps its values: its seed is zero and its state stays.
        live = path.steps > n
        f_y, at_y = _value_and_vjp(path, y, torch.where(live, beta * z_bar, 0.0), constants, sums, hidden)
        z = torch.where(live, (z - beta * f_y) / (1 - beta), z)
        y_bar = y_bar + at_y
        f_z, at_z = _value_and_vjp(path, z, torch.where(live, beta * y_bar, 0.0), constants, sums, hidden)
        y = torch.where(live, (y - beta * f_z) / (1 - beta), y)
        z_bar = torch.where(live, (1 - beta) * z_bar + at_z, z_bar)
        y_bar = torch.where(live, (1 - beta) * y_bar, y_bar)
    return z, z_bar + y_bar, sums


def _check_arrival(miss: Tensor, z: Tensor, path: _Path) -> None:
    """Raise a RuntimeError if the reverse pass misses the start, since the gradient is then as inaccurate."""
    lost = relative(row_norm(miss), row_norm(z)).nan_to_num(nan=math.inf)
    if (lost > ACCURACY).any():
        raise RuntimeError(
            f"ReversibleGradient undid {path.depth} steps and missed the start by {float(lost.max()):.0e} of the state "
            f"({ACCURACY:.0e} is allowed), so the gradient would be wrong: lower max_evals or the relaxation "
            f"{path.relaxation}, or use Implicit() or Unroll(checkpoint=True)."
        )


def _value_and_vjp(
    path: _Path, point: Tensor, seed: Tensor, constants: list[Tensor], sums: list[Tensor], hidden: _Hidden
) -> tuple[Tensor, Tensor]:
    """f(point) and Jᵀ·seed there; the VJPs of the constants are added to ``sums``."""
    instead, layout = Substitution(path.constants, constants), path.layout
    with torch.enable_grad(), path.autocast.on(), own_parametrizations():
        leaf = point.detach().requires_grad_()
        state = layout.unpack(leaf)
        with instead:
            value = path.f(state)
        value = layout.pack(layout.aligned(instead.replaced(value)))
    hidden.check([value], known=instead.leaves)
    if not value.requires_grad:
        return value, torch.zeros_like(point)
    products = torch.autograd.grad(value, [leaf, *instead.leaves], seed, allow_unused=True)
    for total, product in zip(sums, products[1:], strict=True):
        if product is not None:
            total += product
    at_point = torch.zeros_like(point) if products[0] is None else products[0]
    return value.detach(), at_point


class _Hidden:
    """Looks for tensors that f reads although no function mode saw them: their gradients would be lost.

    They are leaves that two evaluations of f have in common, while each evaluation has its own point, and its own
    tensors that f makes for itself.
    """

    def __init__(self) -> None:
        self._before: dict[int, Tensor] | None = None

    def check(self, values: Sequence[Tensor], known: Sequence[Tensor]) -> bool:
        """Raise a RuntimeError if a leaf below f(z) was below the last one, too; True if there is any leaf.

        Args:
            values: the tensors of f(z).
            known: leaves that are not hidden.
        """
        own = {id(tensor) for tensor in known}
        leaves = {id(leaf): leaf for leaf in leaves_below(values) if id(leaf) not in own}
        for name, leaf in leaves.items():
            if self._before is not None and name in self._before:
                raise RuntimeError(
                    f"ReversibleGradient cannot see a tensor of shape {tuple(leaf.shape)} that f uses (a compiled "
                    "function, a custom autograd.Function or a full backward hook hides it, or it was unfrozen after "
                    "the forward pass); call f without these, or use Unroll(checkpoint=True)."
                )
        self._before = leaves
        return bool(leaves)
