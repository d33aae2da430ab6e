"""Checks that f gives the same value when a rule evaluates it once more after a solve.

They are nearly free, since the rule needs that evaluation anyway. They detect an f that mixes samples without
``coupled=True``, or that draws random numbers. Each is called only where a failure is heard.

Letters: B batch, N flattened state. Cotangent ``g``, adjoint solution ``u``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from equilibria.core.diagnosis import ADJOINT, FORWARD, Message, Solve
from equilibria.core.failure import tell
from equilibria.core.maps import Linearised, rounding_unit
from equilibria.core.solve import Solution
from equilibria.core.solver import ForwardSolve
from equilibria.core.state import Layout, State
from equilibria.core.stop import OnFailure, Stop, relative, row_norm
from equilibria.core.tracing import untraced
from equilibria.core.trees import map_tensors, tensors_in, with_tensors
from equilibria.torch_private import is_transformed, will_run


def check_value(again: State, solution: Solution, method: ForwardSolve, layout: Layout) -> None:
    """Report if f(z*), evaluated ``again`` after the solve, differs from its value there."""
    solved = dataclasses.replace(solution, z=layout.pack(solution.z), fz=layout.pack(solution.fz))
    with torch.no_grad():
        check_again(method, _change(layout.pack(again), solved, method.stop, layout), again)


def check_again(method: ForwardSolve, changed: Float[Tensor, " B"], state: State) -> None:
    """Report if f(z*), evaluated once more after the solve, has ``changed`` relative to its norm there."""
    eps = rounding_unit(tensors_in(state))
    _check(changed, method.stop, method.on_failure, eps=eps, advice=_advice(coupled=method.coupled), of=FORWARD)


def check_unchanged(
    there: Linearised, z: Float[Tensor, "B N"], residual: Float[Tensor, " B"], method: ForwardSolve, layout: Layout
) -> None:
    """Report if f is no longer that of the forward pass, in a backward pass that evaluates it again, ``there``.

    Args:
        there: f linearised at z.
        z: f(z*), as rows. Even the same f moves it by J·r.
        residual: the relative residual ‖r‖/‖f(z*)‖; ``SPREAD`` times as much is allowed.
        method: settings of the forward solve.
        layout: the layout of the state.
    """
    with torch.no_grad():
        again, z = layout.pack(map_tensors(Tensor.detach, there.value)), z.detach()
        moved = relative(method.stop.norms(again - z, layout), method.stop.norms(again, layout))
    eps = rounding_unit(tensors_in(there.value), there.autocast)
    _check(moved - SPREAD * residual, method.stop, method.on_failure, eps=eps, advice=_CHANGED, of=_AGAIN)


SPREAD = 10
"""Largest ‖J·r‖ / ‖r‖ that is expected of a map whose fixed point was found."""


def check_arrival(
    linearised: Linearised,
    g: Float[Tensor, "B N"],
    solved: Solution,
    layout: Layout,
    *,
    stop: Stop,
    on_failure: OnFailure,
    of: Solve,
) -> None:
    """At the end of the backward pass, when Jᵀu arrives, report if Jᵀu + g differs from its value in the solve."""
    # Detached, since a graph kept here would keep itself alive in a cycle if no backward pass ever arrived.
    value, g, wide = map_tensors(Tensor.detach, linearised.value), g.detach(), layout.widened()

    def check(products: tuple[Tensor | None, ...]) -> None:
        values = tensors_in(value)
        with torch.no_grad():
            given = [torch.zeros_like(v) if p is None else p.detach() for v, p in zip(values, products, strict=True)]
            changed = _change(layout.pack(with_tensors(value, given)) + g, solved, stop, wide)
        eps = rounding_unit(values, linearised.autocast)
        _check(changed, stop, on_failure, eps=eps, advice=_advice(coupled=layout.coupled), of=of)

    begin = linearised.start[0].node
    if will_run(begin):
        linearised.arrival.awaited = check
    else:  # torch.autograd.grad for other tensors, or a compiled f: Jᵀu does not arrive, and takes one more VJP
        check(tuple(tensors_in(linearised.vjp(layout.unpack(solved.z)))))


class Checkpoints:
    """Compares the values of f that checkpoints compute in a backward pass with those of the forward pass."""

    def __init__(self, stop: Stop, on_failure: OnFailure, *, coupled: bool = False) -> None:
        self._stop, self._coupled, self._told = stop, coupled, False
        self._on_failure: OnFailure = on_failure

    def call(self, f: Callable[[State], State], z: State) -> State:
        """f(z); only z is kept for the backward pass, which evaluates f again.

        Raises:
            RuntimeError: f uses torch.func itself, beside which torch has no checkpoints.
        """
        try:
            return checkpoint(self.watched(f), z, use_reentrant=False)
        except RuntimeError as error:
            if "saved tensor hooks" not in str(error):
                raise
            raise RuntimeError(
                "f uses torch.func itself (grad, vjp, jacrev or hessian), and torch has no checkpoints around these: "
                "leave checkpoint=True out, or use gradient=Implicit(), which keeps one evaluation of f."
            ) from None

    def watched(self, f: Callable[[State], State]) -> Callable[[State], State]:
        """f for one checkpoint; the first value that has changed is reported, and no other."""
        if self._on_failure == "ignore" or is_transformed() or torch.compiler.is_compiling():
            return f
        first: list[Summary] = []  # of the leaves in the forward pass

        def look(leaves: Sequence[Tensor]) -> None:
            now = [Summary.of(leaf, coupled=self._coupled) for leaf in leaves]
            if not first:
                first.extend(now)
            elif not self._told:
                changed = [x.changed(y) for x, y in zip(now, first, strict=True)]
                worst, eps = torch.stack(changed).amax(dim=0), rounding_unit(leaves)
                differs = _check(worst, self._stop, self._on_failure, eps=eps, advice=_CHANGED, of=_RECOMPUTED)
                self._told = not differs.is_cuda and bool(differs.any())  # a GPU is not waited for

        def value(z: State) -> State:
            fz = f(z)
            return with_tensors(fz, _Seen.apply(look, *tensors_in(fz)))  # pyright: ignore

        return value


@dataclasses.dataclass(frozen=True, eq=False)
class Summary:
    """The norm of each sample of a leaf and a few sums. If the leaf changes, one of these numbers does."""

    norm: Float[Tensor, " B"]
    sums: Float[Tensor, "B pieces"]
    """The sums of ``PIECES`` pieces: another leaf of the same norm has other sums."""

    @classmethod
    def of(cls, leaf: Tensor, *, coupled: bool) -> Summary:
        """The numbers of a leaf, which is one sample if ``coupled``."""
        leaf = leaf.detach()[None] if coupled else leaf.detach()
        rows = leaf.reshape(len(leaf), math.prod(leaf.shape[1:]))
        wide = torch.promote_types(rows.dtype, torch.float32)
        sums = [piece.sum(dim=1, dtype=wide) for piece in rows.tensor_split(PIECES, dim=1)]
        return cls(norm=torch.linalg.vector_norm(rows, dim=1, dtype=wide), sums=torch.stack(sums, dim=1))

    def changed(self, before: Summary) -> Float[Tensor, " B"]:
        """The change since ``before``, relative to the norm; of random numbers about the norm of their difference."""
        moved = torch.linalg.vector_norm(self.sums - before.sums, dim=1)
        return relative(torch.maximum(moved, (self.norm - before.norm).abs()), before.norm)


PIECES = 8
"""In half precision, where only a change of a fifth of the norm is told from rounding, the sums of a new batch are as
near as that once in a million times."""


class _Seen(torch.autograd.Function):
    """Identity on the leaves of f(z), which shows them to ``look`` in every evaluation of a checkpoint."""

    @staticmethod
    def forward(ctx: Any, look: Callable[[Sequence[Tensor]], None], *leaves: Tensor) -> tuple[Tensor, ...]:
        look(leaves)
        ctx.save_for_backward(leaves[0].new_empty(0))  # a checkpoint repeats f up to the last tensor that was saved
        ctx.set_materialize_grads(False)
        return tuple(leaf.view_as(leaf) for leaf in leaves)

    @staticmethod
    @untraced
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *cotangents

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if tangent is None else tangent.view_as(tangent) for tangent in tangents[1:])


def _change(again: Float[Tensor, "B N"], solved: Solution, stop: Stop, layout: Layout) -> Float[Tensor, " B"]:
    """How much f(z), evaluated ``again``, differs from a solve of rows, in value or in residual, relative to ‖f(z)‖.

    Both are needed: a sample's recorded value is from the last evaluation, and its residual from the evaluation at
    which it was done.
    """
    value = relative(row_norm(again - solved.fz), row_norm(solved.fz))
    residual = relative(stop.norms(again - solved.z, layout), stop.norms(again, layout))
    return torch.maximum(value, (residual - solved.residual).abs())


def _advice(*, coupled: bool) -> str:
    return _RANDOM if coupled else _COUPLED


_COUPLED = (
    "Either f mixes the samples of the batch (attention over the batch, batch norm in training, a graph whose nodes "
    "are the batch axis): pass coupled=True. Or f does not give the same bits twice (dropout inside it): draw "
    "its masks before the solve. Or f differs without gradients (nn.TransformerEncoder at padding): call "
    "torch.backends.mha.set_fastpath_enabled(False)."
)
_CHANGED = (
    "What f reads was changed between the two passes (an input or a weight in place, train() and eval(), a number in a "
    "closure): with create_graph=True or checkpoint=True, change it after the backward pass."
)
_AGAIN = dataclasses.replace(ADJOINT, name="The backward pass with create_graph=True")
_RECOMPUTED = dataclasses.replace(ADJOINT, name="The backward pass of a checkpoint")
_RANDOM = "f does not give the same bits twice (dropout inside it?): draw what is random before the solve."


def _check(
    change: Float[Tensor, " B"],
    stop: Stop,
    on_failure: OnFailure,
    *,
    eps: float,
    advice: str,
    of: Solve,
) -> Bool[Tensor, " B"]:
    """Report a change of f. The result is True for the samples whose value of f has changed.

    Args:
        change: the change of the value, relative to its norm; NaN for samples that are not finite anyway.
        stop: the stop of the solve; a change of rtol/10 is allowed.
        on_failure: warn or raise.
        eps: the rounding unit of f; a change of 30·eps is allowed on top.
        advice: the likeliest cause, and what to do.
        of: which solve it was, for the message.
    """
    differs = change > 0.1 * stop.rtol + 30 * eps

    def message() -> Message:
        worst = float(torch.where(differs, change, 0.0).max())
        what = (
            f"{of.name}: f was evaluated once more at the end, and its value has changed in {int(differs.sum())} of "
            f"{len(differs)} samples, by up to {worst:.1e} of its norm, so the result is wrong by about that much"
        )
        return Message(what, advice, kind=f"{of.name}, {advice}")

    tell(differs, message, on_failure)
    return differs
