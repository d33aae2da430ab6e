"""The only loop of the library: iterate a solver until every sample has reached its fixed point.

Letters: B batch, R samples that are still evaluated, N flattened state, K evaluations of f. State ``z``, map ``f``,
residual ``r``.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd import forward_ad

from equilibria.checks import check_flag, check_keep, check_kind
from equilibria.core.batch import batch_of
from equilibria.core.caller import caller
from equilibria.core.evaluator import Evaluator
from equilibria.core.graph import kept, without_graph
from equilibria.core.heap import keep_freed_memory
from equilibria.core.maps import Map, as_map
from equilibria.core.outcome import Residuals
from equilibria.core.solver import ForwardSolve, History, Solver
from equilibria.core.state import Layout, State, check_finite
from equilibria.core.stop import Status, Stop
from equilibria.core.tracing import INSTEAD, untraced
from equilibria.core.trees import map_tensors, tensors_in
from equilibria.torch_private import is_forward_mode, is_in_make_fx, is_transformed, without_forward_mode

keep_freed_memory()


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Solution:
    """The result of a solve. Per-sample fields have the batch as first axis."""

    z: State
    """The solution; differentiable if it comes from a gradient rule."""
    fz: State
    """f at the iterate that the loop returned; it may share its memory with z."""
    residual: Float[Tensor, " B"]
    """‖f(z) − z‖ / ‖f(z)‖ at the iterate that was returned."""
    status: Int[Tensor, " B"]
    """One ``Status`` per sample."""
    steps: Int[Tensor, " B"]
    """Number of steps that each sample took before it was done."""
    evals: int
    """Number of evaluations of f (NFE), J·v products included; a gradient rule adds its evaluations with graph."""
    residuals: tuple[tuple[Residuals, ...], ...]
    """The rows of ``trace``, in parts, which ``trace`` puts together."""
    history: History = None
    """The solver's last history (Shine reads Broyden's inverse from it). If samples were dropped during the solve, it
    covers only those still active at the end."""
    iterates: tuple[State, ...] = ()
    """The states after the numbers of steps in ``keep``; only ``Unroll`` gives them a gradient."""
    adjoint: list[Solution] = dataclasses.field(default_factory=lambda: Adjoints())
    """Each backward pass appends the solution of its adjoint solve; ``dataclasses.replace`` shares the list."""
    point: State | None = None
    """z*, the iterate that the loop returned, without graph, if a gradient rule has replaced z by f(z*) and
    ``Method(keep_point=True)`` asked for it; else None."""

    @property
    def converged(self) -> Bool[Tensor, " B"]:
        """True for the samples that met the tolerance."""
        return self.status == Status.CONVERGED

    @property
    def trace(self) -> Float[Tensor, "K B"]:
        """Relative residual after each evaluation; a sample that is done repeats its last value."""
        rows = [functools.reduce(lambda x, part: part.put_into(x), parts, self.residual) for parts in self.residuals]
        return torch.stack(rows)

    def __str__(self) -> str:
        """Counts, cost, worst residual (of the samples that did not converge, if any), advice of the worst status."""
        total, done = self.status.numel(), int(self.converged.sum())
        if total == 0:
            return "no samples, nothing to solve"
        worst = Status(int(self.status.max()))
        residual = (self.residual if done == total else self.residual[~self.converged]).max()
        line = f"{done} of {total} samples converged, {self.evals} evaluations, worst residual {residual:.1e}"
        return line if worst is Status.CONVERGED else f"{line}. {worst.name}: {worst.advice}"

    __repr__ = __str__


class Adjoints(list[Solution]):
    """The adjoint solutions of a fixed point, in the order of the backward passes."""

    def __getitem__(self, index: Any) -> Any:
        if not self and not isinstance(index, slice):
            raise IndexError("Solution.adjoint is empty: each backward pass through Implicit() or Neumann() adds one.")
        return super().__getitem__(index)


@untraced
def solve(
    f: Map | Callable[[State], State],
    z0: State,
    solver: Solver,
    stop: Stop,
    *,
    coupled: bool = False,
    keep: Sequence[int] = (),
    drop_converged: bool = True,
) -> Solution:
    """The fixed point z = f(z) of each sample, found by ``solver`` from ``z0``, without a gradient rule.

    Unless ``coupled``, every sample is its own problem: it has its own residual, status and step count, is never moved
    again once it is done, and gets the same answer alone as in any batch. Autograd records all steps if gradients are
    enabled, as anywhere in PyTorch; to avoid that, call it under ``torch.no_grad()`` or through a gradient rule.

    Args:
        f: the map; it must give the same bits when called twice, and treat samples independently unless ``coupled``.
        z0: the start, finite: a tensor ``[B *shape]`` or a tree of such tensors.
        solver: proposes the iterates.
        stop: tolerances and budget.
        coupled: f mixes the samples, so that the whole state is one problem: one residual, status and step count, in
            fields of length 1. No part is frozen before the whole is done, and the leaves of z0 may have any shape.
        keep: numbers of steps after which the state is stored in ``Solution.iterates``; a sample that was done before
            has its last state there.
        drop_converged: if f supports it (``Map.rows``), converged samples leave the batch once at least a quarter of
            it has converged. False keeps all of them, so that the history covers the whole batch; so does ``keep``.

    Warns:
        RuntimeWarning: f computes in half precision, and the tolerance is below its rounding.

    Raises:
        ValueError, TypeError: z0 has no batch axis, is empty or not finite; f changes structure, shape, dtype or
            device.
    """
    check_kind("solver", solver, Solver, "Anderson()")
    check_kind("stop", stop, Stop, "Stop(rtol=1e-3)")
    check_keep(keep)
    check_flag("solve", coupled=coupled, drop_converged=drop_converged)
    return solve_from([z0], f, solver, stop, coupled=coupled, keep=keep, drop_converged=drop_converged)


@untraced
def solve_from(
    start: list[State],
    f: Map | Callable[[State], State],
    solver: Solver,
    stop: Stop,
    *,
    coupled: bool = False,
    keep: Sequence[int] = (),
    drop_converged: bool = True,
) -> Solution:
    """``solve`` from the state that the list holds, which is taken out of it. The caller has checked the settings.

    A start that nothing else holds is free after the first step; an argument would be held by every caller's frame.
    """
    _check_not_exported()
    z0 = start.pop()
    layout = Layout.of(z0, coupled=coupled)
    check_finite(z0, coupled=coupled)
    evaluate = Evaluator(as_map(f), layout, stop.max_evals)
    _warn_of_rounding(evaluate, stop)
    z = layout.pack(z0)
    del z0
    with evaluate.autocast.off():
        batch = batch_of(z, solver, stop, layout, evaluate, may_drop=drop_converged)
        may_drop, kept, step = drop_converged and not keep, [], 0
        while True:
            fz = evaluate(z)
            last = evaluate.remaining < solver.cost or not z.numel()
            batch.update(z, fz, last=last)
            if last or not batch.moving:
                break
            del z, fz  # free both states before f is evaluated again
            if may_drop:
                batch.drop_converged()
            z = batch.step()
            step += 1
            if step in keep:
                kept.append(layout.unpack(z))
    found = batch.outcome()
    return Solution(
        z=layout.unpack(found.z),
        fz=layout.unpack(found.fz),
        residual=found.residual,
        status=found.status,
        steps=found.steps,
        evals=evaluate.evals,
        residuals=batch.residuals(),
        history=batch.history,
        iterates=(*kept, *[layout.unpack(found.z)] * (len(keep) - len(kept))),
    )


def _check_not_exported() -> None:
    """Raise a RuntimeError inside torch.export and torch.jit.trace, which would record the steps of one batch."""
    if torch.compiler.is_exporting() or torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        raise RuntimeError(
            "A solve cannot be exported or traced, since its number of evaluations of f depends on the data; "
            f"{INSTEAD}, and export that."
        )
    if is_in_make_fx():
        raise RuntimeError(
            "A solve cannot be recorded by torch.func.linearize or make_fx, since its number of evaluations of f "
            f"depends on the data: use torch.func.jvp, or {INSTEAD}."
        )


def _warn_of_rounding(evaluate: Evaluator, stop: Stop) -> None:
    around = ", with torch.autocast(…, enabled=False) around the solve" if evaluate.autocast.enabled else ""
    for dtype in (torch.bfloat16, torch.float16):
        level = torch.finfo(dtype).eps / 2
        # Beside wider leaves a half-precision leaf may be small, so only a state of one dtype is warned about.
        if set(evaluate.computes_in) == {dtype} and 0 < stop.rtol < level:
            warnings.warn(
                f"Stop(rtol={stop.rtol:g}) is below what {str(dtype)[6:]} resolves: residuals of an f that computes in "
                f"it stay at {level / 4:.0e} to {level:.0e}, so solves may spend their budget; give "
                f"rtol={4 * level:.0e}, or let f compute in float32{around}.",
                RuntimeWarning,
                stacklevel=caller()[1],
            )


def solve_without_graph(
    f: Map,
    z0: State,
    method: ForwardSolve,
    *,
    solver: Solver | None = None,
    stop: Stop | None = None,
    keep_history: bool = False,
    forward_mode: bool = False,
) -> Solution:
    """``solve`` with gradients off: the first half of every rule that does not unroll.

    Args:
        f: the map.
        z0: the start.
        method: settings of the solve.
        solver: replaces the method's solver.
        stop: replaces the method's stop.
        keep_history: keep all samples in the batch to the end, and return the solver's history of them.
        forward_mode: True if the rule handles tangents that f reads; otherwise they raise a RuntimeError.
    """
    if solver is not None:
        check_kind("solver", solver, Solver, "Anderson()")
    if stop is not None:
        check_kind("stop", stop, Stop, "Stop(rtol=1e-3)")
    _check_no_transform()
    if not forward_mode:
        _check_no_tangent(f, z0)
    with without_graph(), without_forward_mode(), kept():
        solution = solve_from(
            [map_tensors(torch.Tensor.detach, z0)],
            f,
            method.solver if solver is None else solver,
            method.stop if stop is None else stop,
            coupled=method.coupled,
            keep=method.keep,
            drop_converged=not keep_history,
        )
    history = solution.history if keep_history else None  # many states, and the backward pass needs the memory
    return dataclasses.replace(solution, history=history, point=solution.z if method.keep_point else None)


_UNSUPPORTED = (
    "This gradient rule cannot be differentiated in forward mode or transformed by torch.func: the result would be "
    "wrong. Use gradient=Implicit(), or autograd (loss.backward(), torch.autograd.grad)."
)


def _check_no_transform() -> None:
    """Raise a RuntimeError inside torch.func.grad, vjp, jvp, vmap and their compositions."""
    if is_transformed():
        raise RuntimeError(_UNSUPPORTED)


def _check_no_tangent(f: Map, z0: State) -> None:
    """Raise a RuntimeError if f reads a dual tensor; inside a ``dual_level`` the check costs one evaluation of f."""
    if not is_forward_mode():
        return
    with without_graph():
        values = tensors_in(f(map_tensors(lambda leaf: forward_ad.unpack_dual(leaf).primal, z0)))
    if any(forward_ad.unpack_dual(leaf).tangent is not None for leaf in values):
        raise RuntimeError(_UNSUPPORTED)
