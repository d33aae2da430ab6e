"""``fixed_point`` and ``implicit`` return differentiable fixed points; ``Method`` holds the settings of the solve."""

from __future__ import annotations

import contextlib
import dataclasses
import dis
import functools
import itertools
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch.distributed as dist
from torch import nn

from equilibria.checks import check_fields, check_keep, check_kind
from equilibria.core.failure import report
from equilibria.core.gradient import GradientRule
from equilibria.core.graph import recordable, refused_if_untracked, without_graph
from equilibria.core.maps import FunctionMap, Map, as_map
from equilibria.core.solve import Solution
from equilibria.core.solver import Solver
from equilibria.core.state import State, is_distributed
from equilibria.core.stop import OnFailure, Stop, is_heard
from equilibria.core.tracing import INSTEAD, untraced
from equilibria.gradients.implicit import Implicit
from equilibria.gradients.neumann import Neumann
from equilibria.gradients.phantom import Phantom
from equilibria.solvers.anderson import Anderson
from equilibria.solvers.picard import Picard
from equilibria.torch_private import without_forward_mode


@dataclasses.dataclass(frozen=True)
class Method:
    """The settings with which a fixed point is found and differentiated: one frozen value, passed along with a call."""

    solver: Solver = Anderson()
    """Proposes the iterates of the forward solve."""
    stop: Stop = Stop()
    """Tolerances and budget of the forward solve."""
    gradient: GradientRule = Implicit()
    """How the gradient gets through the solve."""
    coupled: bool = False
    """True if f mixes the samples of the batch (graph nodes along the batch axis, batch norm in training): the whole
    state is then one problem with one norm, and its leaves may have any shape."""
    on_failure: OnFailure = "warn"
    """The reaction to a forward or backward solve that does not converge: "warn", "raise" or "ignore". A solve whose
    stop has no tolerance never fails; the gradient of one that is unrolled may (see ``Unroll``)."""
    keep: tuple[int, ...] = ()
    """Numbers of steps after which the solve stores its state in ``Solution.iterates``."""
    keep_point: bool = False
    """True to keep z*, one more state, in ``Solution.point``, where a gradient rule returns f(z*) as ``Solution.z``."""

    def __post_init__(self) -> None:
        check_kind("solver", self.solver, Solver, "Anderson()")
        check_kind("stop", self.stop, Stop, "Stop(rtol=1e-3)")
        check_kind("gradient", self.gradient, GradientRule, "Implicit()")
        check_keep(self.keep)
        object.__setattr__(self, "keep", tuple(self.keep))
        check_fields(self)

    @untraced
    def run(self, f: Map, z0: State) -> Solution:
        """The solution of z = f(z) from z0; its ``z`` carries the gradient.

        Warns:
            ConvergenceWarning: some samples did not converge, or f mixes the samples although ``coupled`` is False, and
                ``on_failure`` is "warn". The adjoint solve warns in the backward pass.

        Raises:
            ConvergenceError: the same, if ``on_failure`` is "raise".
        """
        check_not_symbolic([z0])
        solution = self.gradient.run(f, recordable(z0), self)
        if is_heard(self.stop, self.on_failure):
            report(solution, self.stop, self.on_failure)
        given = solution.z, solution.iterates
        tracked = refused_if_untracked(given)
        return solution if tracked is given else dataclasses.replace(solution, z=tracked[0], iterates=tracked[1])

    def with_stop(self, stop: Stop | None) -> Method:
        """The method with another stop of the forward solve; the method itself for None."""
        return self if stop is None else dataclasses.replace(self, stop=stop)

    def with_budget(self, factor: int) -> Method:
        """The method with ``factor`` times the budget, forward and backward."""
        stop = dataclasses.replace(self.stop, max_evals=factor * self.stop.max_evals)
        return dataclasses.replace(self, stop=stop, gradient=self.gradient.with_budget(factor))


@untraced
def fixed_point(
    f: Map | Callable[..., State],
    z0: State,
    *operands: Any,
    solver: Solver = Method.solver,
    stop: Stop = Method.stop,
    gradient: GradientRule = Method.gradient,
    coupled: bool = Method.coupled,
    on_failure: OnFailure = Method.on_failure,
    keep: tuple[int, ...] = Method.keep,
    keep_point: bool = Method.keep_point,
) -> Solution:
    """The solution of z = f(z, *operands) for each sample; its ``z`` carries the gradient to everything that f uses.

    Args:
        f: any function of a state that returns a state of the same structure, with the same bits when called twice (no
            fresh dropout masks inside). It treats samples independently unless ``coupled`` is True. Parameters and
            inputs that it closes over receive gradients, and so do operands.
        z0: the start, usually zeros: a tensor ``[B *shape]``, or a dict, tuple or list of such tensors.
        operands: further arguments of f, constant during the solve.
        solver: proposes the iterates.
        stop: tolerances and the budget in evaluations of f.
        gradient: how the gradient gets through the solve.
        coupled: f mixes the samples, so that the whole state is one problem; its leaves may have any shape.
        on_failure: "warn", "raise" or "ignore" when a solve, forward or backward, does not converge.
        keep: numbers of steps after which the solve stores its state in ``Solution.iterates``.
        keep_point: keep z*, one more state, in ``Solution.point``; ``Solution.z`` is f(z*) by most rules.

    Warns:
        ConvergenceWarning: a solve did not converge, or samples are coupled without ``coupled=True``.

    Raises:
        ValueError, TypeError: z0 has no batch axis, is empty or not finite; f changes structure, shape, dtype or
            device, or is of a module that is sharded over processes.
    """
    method = Method(
        solver=solver,
        stop=stop,
        gradient=gradient,
        coupled=coupled,
        on_failure=on_failure,
        keep=keep,
        keep_point=keep_point,
    )
    check_gathered(f)
    return method.run(_with_operands(as_map(f), operands), z0)


def implicit(
    f: Callable[..., State],
    *,
    gradient: GradientRule = Method.gradient,
    stop: Stop = Method.stop,
    coupled: bool = Method.coupled,
    on_failure: OnFailure = Method.on_failure,
) -> Callable[[Callable[..., State]], Callable[..., State]]:
    """A decorator for any procedure that finds z = f(z, *operands): its result gets the gradient of a fixed point.

    The procedure is called with the operands and without a graph. Its result z is the start of ``fixed_point``, which
    evaluates f there for its residual, once more with graph if a gradient is wanted, and returns f(z).

    Args:
        f: the map whose fixed point the procedure finds, a function of the state and the operands.
        gradient: a rule around one f(z*), such as ``Implicit`` or ``Neumann``.
        stop: its tolerances bound the residual of the procedure's result; its budget is not used.
        coupled: f mixes the samples.
        on_failure: "warn", "raise" or "ignore" when the result misses the tolerance, or the adjoint solve fails.

    Raises:
        ValueError: the rule differentiates the steps of a solver, and a procedure has no such steps.
        TypeError: f cannot be called, or ``stop`` is no ``Stop``.
    """
    if not isinstance(gradient, Implicit | Neumann | Phantom):
        raise ValueError(
            f"implicit(f, gradient={gradient}): there are no steps of a solver to differentiate; use Implicit(), "
            "Neumann(terms) or Phantom(steps)."
        )
    check_kind("stop", stop, Stop, "Stop(rtol=1e-3)")
    once = dataclasses.replace(stop, max_evals=1)
    method = Method(Picard(), once, gradient, coupled=coupled, on_failure=on_failure)
    mapped = as_map(f)

    def decorate(procedure: Callable[..., State]) -> Callable[..., State]:
        @untraced
        @functools.wraps(procedure)
        def differentiable(*operands: Any, **options: Any) -> State:
            with without_graph(), without_forward_mode():
                z = procedure(*operands, **options)
            return method.run(_with_operands(mapped, operands), z).z

        return differentiable

    return decorate


def _with_operands(f: Map, operands: tuple[Any, ...]) -> Map:
    if not operands:
        return f
    if not isinstance(f, FunctionMap):
        raise TypeError(f"a {type(f).__name__} is a map of the state alone and takes no operands; give a function.")
    return FunctionMap(f.function, operands)


def check_not_symbolic(values: Iterable[Any]) -> None:
    """Raise a RuntimeError if one of the values is a symbol of ``torch.fx``, which holds no numbers."""
    fx = sys.modules.get("torch.fx")
    if fx is not None and any(isinstance(value, fx.Proxy) for value in values):
        raise RuntimeError(
            "torch.fx traces without numbers, and a solve decides by numbers: keep the layer whole in the graph, by a "
            f"Tracer whose is_leaf_module returns True for an Equilibrium, or {INSTEAD}, with its start."
        )


_FOR_EVER = "processes that need different numbers of evaluations would wait for each other for ever"


def check_gathered(f: Any) -> None:
    """Raise a ValueError if f communicates: its parameters are sharded, or its batch norm is one over processes.

    Args:
        f: a module, or a function whose modules are found where it is a method, a closure or a partial function.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    for module in _modules_of(f):
        for name, parameter in module.named_parameters():
            if is_distributed(parameter):
                raise ValueError(
                    f"The parameter {name} inside f is sharded over {dist.get_world_size()} processes: each evaluation "
                    f"of f would gather it, and {_FOR_EVER}. Shard the whole layer, fully_shard(layer, "
                    "reshard_after_forward=False), or the module that calls fixed_point, not a module inside f."
                )
        for name, part in module.named_modules():
            if isinstance(part, nn.SyncBatchNorm) and part.training and dist.get_world_size(part.process_group) > 1:
                raise ValueError(
                    f"The SyncBatchNorm{name and f' {name}'} inside f averages over {dist.get_world_size()} processes "
                    f"in each evaluation of f, and {_FOR_EVER}. Use layer or group norm in f, or move the batch norm."
                )


def _modules_of(f: Any) -> Iterator[nn.Module]:
    """The modules that f is, or that it calls as far as can be seen without calling it."""
    if isinstance(f, nn.Module):
        yield f
    elif isinstance(f, functools.partial):
        for part in (f.func, *f.args, *f.keywords.values()):
            yield from _modules_of(part)
    elif isinstance(f, types.MethodType) and isinstance(f.__func__, types.FunctionType):
        yield from _read_by(f.__func__, dict(zip(f.__func__.__code__.co_varnames[:1], [f.__self__], strict=False)))
    elif isinstance(f, types.FunctionType):
        yield from _read_by(f, {})


def _read_by(f: types.FunctionType, own: dict[str, Any]) -> Iterator[nn.Module]:
    """The modules around a function that it reads; where it reads self.cell, the cell and not all of self.

    Args:
        f: the function.
        own: its first argument by name, if it is a method.
    """
    around = {**_closed_over(f), **own}
    places = {"LOAD_GLOBAL": f.__globals__, "LOAD_DEREF": around, "LOAD_FAST": own, "STORE_FAST_LOAD_FAST": own}
    unseen = {*f.__code__.co_freevars, *f.__code__.co_cellvars}  # what functions inside f read
    for step, then in itertools.pairwise(dis.get_instructions(f)):
        place = next((place for opname, place in places.items() if step.opname.startswith(opname)), None)
        if place is None:
            continue
        # Python 3.13 has LOAD_FAST_LOAD_FAST for two variables; other endings are LOAD_FAST_CHECK and LOAD_FAST_BORROW.
        for name in step.argval if isinstance(step.argval, tuple) else (step.argval,):
            if isinstance(value := place.get(name), nn.Module):
                unseen.discard(name)
                parts = dict(value.named_children()) if then.opname in ("LOAD_ATTR", "LOAD_METHOD") else {}
                yield parts.get(then.argval, value)
    yield from (around[name] for name in unseen if isinstance(around.get(name), nn.Module))


def _closed_over(f: types.FunctionType) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, cell in zip(f.__code__.co_freevars, f.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # a name that is not bound yet
            found[name] = cell.cell_contents
    return found
