"""Equilibrium: a cell, a solver, a stopping rule and a gradient rule make a layer."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn

from equilibria.core.checks import check_kind
from equilibria.core.gradient import GradientRule
from equilibria.core.solver import Solver
from equilibria.core.state import State
from equilibria.core.stop import OnFailure, Stop
from equilibria.core.tracing import untraced
from equilibria.fixed_point import Method
from equilibria.layers.cell import Buffers, CellMap, as_cell, check_rows
from equilibria.layers.layer import Layer, LayerOutput
from equilibria.layers.sequence import sequence_cell


def check_gathered(cell: nn.Module) -> None:
    """Raise a ValueError if parameters inside f are sharded: processes may need different numbers of evaluations."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    for name, parameter in cell.named_parameters():
        if hasattr(parameter, "full_tensor"):  # a DTensor
            raise ValueError(
                f"The parameter {name} inside f is sharded over {dist.get_world_size()} processes: each evaluation of "
                "f would gather it, and processes that need different numbers of evaluations would wait for each other "
                "for ever. Shard the whole layer, fully_shard(layer, reshard_after_forward=False), not a module in it."
            )


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
            ValueError: ``start`` has another shape than the state, or is not finite.
            TypeError: the cell cannot tell its first iterate, and ``start`` is None.
        """
        check_gathered(self.cell)
        prepared = self.cell.prepare(*inputs, **options)
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
            memory=self.cell.remember(solution.z, prepared),
        )

    @property
    def evaluation_method(self) -> Method:
        """The method of ``eval()`` mode."""
        return self.method.with_stop(self.eval_stop)

    def cache(self, batch: int, **choices: Any) -> Any:
        """A memory for generation; see ``SequenceCell.cache``."""
        return sequence_cell(self.cell).cache(batch, **choices)

    def extra_repr(self) -> str:
        """Solver, stopping rule and gradient rule, and every other setting that differs from its default."""
        method = self.method
        said = f"solver={method.solver}, stop={method.stop}, gradient={method.gradient}, eval_stop={self.eval_stop}"
        more = {name: getattr(method, name) for name in ("coupled", "on_failure", "keep", "keep_point")}
        return said + "".join(f", {name}={value!r}" for name, value in more.items() if value != getattr(Method, name))
