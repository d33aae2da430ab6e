"""Equilibrium: a cell, a solver, a stopping rule and a gradient rule make a layer; and the interface of every layer."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import nn

from equilibria.checks import check_kind
from equilibria.core.gradient import GradientRule
from equilibria.core.graph import refused_if_untracked
from equilibria.core.maps import Map
from equilibria.core.solve import Solution
from equilibria.core.solver import Solver
from equilibria.core.state import State
from equilibria.core.stop import OnFailure, Stop
from equilibria.core.tracing import untraced
from equilibria.core.trees import tensors_in
from equilibria.fixed_point import Method, check_gathered, check_not_symbolic
from equilibria.layers.cell import Buffers, Cell, CellMap, Prepared, as_cell, check_rows
from equilibria.layers.linear import with_own_weights
from equilibria.layers.sequence import sequence_cell


@dataclasses.dataclass(frozen=True, eq=False)
class LayerOutput:
    """The result of a layer, equilibrium or explicit."""

    output: Any
    """The part of z that later layers read; it carries the gradient."""
    z: State
    """The state, which carries the gradient. It and ``output`` may share numbers with the solution, so change a clone:
    after a layer take ``nn.ReLU()`` and not ``nn.ReLU(inplace=True)``."""
    f: Map
    """The map whose fixed point was sought (Stack: the last layer's), for stability measures. It reads the weights that
    the module has when it is called: after ``torch.func.functional_call`` its own ones again."""
    solution: Solution | None
    """The result of the solve; None from a layer that solves nothing."""
    memory: Any = None
    """The memory for the next segment of the same streams; None from a cell that remembers nothing."""
    auxiliary: tuple[Any, ...] = ()
    """Outputs of intermediate layers for auxiliary losses (``Unrolled(auxiliary_every=…)``); empty otherwise."""

    def __post_init__(self) -> None:
        for name in ("output", "z", "auxiliary", "f"):  # memories have no graph anyway
            object.__setattr__(self, name, refused_if_untracked(getattr(self, name)))

    def __getattr__(self, name: str) -> Any:
        """Called for a name that is not there, such as a method of a tensor in ``nn.Sequential``."""
        if name.startswith("__"):
            raise AttributeError(name)
        raise AttributeError(
            f"a LayerOutput has no {name!r}: it is the result of a layer, whose tensor is .output (or .z, the state); "
            f"write layer(x).output.{name}."
        )


class Layer(nn.Module, ABC):
    """A module that turns inputs into a state: an equilibrium, an explicit network, or one of your own."""

    @abstractmethod
    def forward(self, *inputs: Any, method: Method | None = None, **options: Any) -> LayerOutput:
        """The state under ``inputs``.

        Args:
            inputs: the inputs of the layer's cell; for a sequence cell x and the memory of the previous segment.
            method: the method of this call; None for the layer's own. A layer that solves nothing accepts none.
            options: options of the cell's ``prepare``.
        """

    def cache(
        self, batch: int, *, length: int | None = None, padding: Any = None, memory: Any = None, warm: bool = False
    ) -> Any:
        """A memory for generation; see ``SequenceCell.cache``. By default a TypeError: the layer keeps no past."""
        raise TypeError(
            f"{type(self).__name__} keeps no past position by position, so it has no cache for generation; use a layer "
            "around a SequenceCell, such as TransformerCell or TrellisCell."
        )


def check_no_method(layer: nn.Module, method: Method | None) -> None:
    """Raise a TypeError if a method is given to a layer that solves nothing."""
    if method is not None:
        raise TypeError(f"{type(layer).__name__} solves nothing, so it has no use for method={method}; leave it out.")


def prepared_by(cell: Cell, *inputs: Any, **options: Any) -> Prepared:
    """``cell.prepare(*inputs, **options)`` with the weights of this moment; every layer calls it through here.

    Raises:
        ValueError: parameters of the cell are on the meta device, and its inputs are not.
    """
    if type(cell).prepare is not Cell.prepare:  # a call of the cell does it for all that f itself reads
        with_own_weights(cell)
    try:
        return cell.prepare(*inputs, **options)
    except RuntimeError as error:
        empty = [name for name, parameter in cell.named_parameters() if parameter.is_meta]
        if not empty or all(tensor.is_meta for tensor in tensors_in(inputs)):
            raise
        raise ValueError(
            f"The parameter {empty[0]} of the {type(cell).__name__} is on the meta device, whose tensors hold no "
            "numbers, and prepare reads it: load the weights, model.to_empty(device=…) and then load_state_dict. If a "
            "library moves weights to the device only while their own module is called (cpu_offload), keep the whole "
            "layer on the device."
        ) from error


def cache_of(cell: Cell, batch: int, **choices: Any) -> Any:
    """``cell.cache(batch, **choices)`` with the weights of this moment; a TypeError if the cell keeps no past."""
    remembering = sequence_cell(cell)
    with torch.no_grad():
        with_own_weights(cell)
    return remembering.cache(batch, **choices)


class Equilibrium(Layer):
    """z* = f(z*; inputs): the fixed point of one weight-tied cell (Bai, Kolter, Koltun 2019, eq. 3).

    Args:
        cell: the map f: a ``Cell``, or any ``nn.Module`` f(z, *inputs).
        solver: proposes iterates.
        stop: tolerances and budget of the forward solve.
        gradient: how the gradient gets through the solve.
        eval_stop: tolerances and budget in ``eval()`` mode; ``stop`` if None.
        coupled: the cell mixes the samples of the batch, so that the whole state is one problem.
        on_failure: "warn", "raise" or "ignore" when a solve, forward or backward, does not converge.
        keep: numbers of steps after which the solve stores its state in ``Solution.iterates``.
        keep_point: keep z*, one more state, in ``Solution.point``; ``Solution.z`` is f(z*) by most rules.
    """

    def __init__(
        self,
        cell: nn.Module,
        solver: Solver = Method.solver,
        stop: Stop = Method.stop,
        gradient: GradientRule = Method.gradient,
        eval_stop: Stop | None = None,
        *,
        coupled: bool = Method.coupled,
        on_failure: OnFailure = Method.on_failure,
        keep: tuple[int, ...] = Method.keep,
        keep_point: bool = Method.keep_point,
    ) -> None:
        super().__init__()
        self.cell = as_cell(cell)
        self.method = Method(
            solver=solver,
            stop=stop,
            gradient=gradient,
            coupled=coupled,
            on_failure=on_failure,
            keep=keep,
            keep_point=keep_point,
        )
        if eval_stop is not None:
            check_kind("eval_stop", eval_stop, Stop, "Stop(rtol=1e-3)")
        self.eval_stop = eval_stop

    @untraced
    def forward(
        self, *inputs: Any, start: State | None = None, method: Method | None = None, **options: Any
    ) -> LayerOutput:
        """The equilibrium under ``inputs``.

        Args:
            inputs: arguments of the cell's ``prepare``, or of the module after z.
            start: the first iterate, such as the equilibrium of a similar input; if there is only one equilibrium, it
                affects the cost alone. None for the cell's own.
            method: the method of this call, in training and in evaluation alike; None for the layer's own.
            options: options of the cell's ``prepare``.

        Raises:
            ValueError: ``start`` has another shape than f returns, or is not finite. Where the shape is an error within
                a module, that error comes, with a note about the start.
            TypeError: ``start`` is None and the cell has no first iterate of its own, or ``method`` is no ``Method``.
        """
        check_gathered(self.cell)
        check_not_symbolic(inputs)
        if not isinstance(method, Method | None):
            check_kind("method", method, Method, "Method(Anderson())")
        prepared = prepared_by(self.cell, *inputs, **options)
        buffers = Buffers.of(self.cell)
        f = CellMap(self.cell, prepared, buffers)
        chosen = method or (self.method if self.training else self.evaluation_method)
        z0 = self.cell.begin(prepared, start)
        if not chosen.coupled:
            check_rows(prepared, z0)
        solution = chosen.run(f, z0)
        if buffers is not None:
            buffers.keep()
        return LayerOutput(
            output=self.cell.output(solution.z),
            z=solution.z,
            f=f,
            solution=solution,
            memory=self.cell.remembered(solution.z, prepared),
        )

    @property
    def evaluation_method(self) -> Method:
        """The method of ``eval()`` mode."""
        return self.method.with_stop(self.eval_stop)

    def cache(self, batch: int, **choices: Any) -> Any:
        """A memory for generation; see ``SequenceCell.cache``."""
        return cache_of(self.cell, batch, **choices)

    def extra_repr(self) -> str:
        """Solver, stopping rule and gradient rule, and every other setting that differs from its default."""
        method = self.method
        said = f"solver={method.solver}, stop={method.stop}, gradient={method.gradient}, eval_stop={self.eval_stop}"
        more = {name: getattr(method, name) for name in ("coupled", "on_failure", "keep", "keep_point")}
        return said + "".join(f", {name}={value!r}" for name, value in more.items() if value != getattr(Method, name))
