"""Windows of past vectors, and the small systems over them that the quasi-Newton solvers solve.

Letters: B batch, N flattened state, W window.
"""

from __future__ import annotations

import functools
import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from equilibria.torch_private import is_forward_mode


def empty_window(z: Float[Tensor, "B N"], size: int, *, dtype: torch.dtype | None) -> Float[Tensor, "B W N"]:
    """A zeroed window of ``size`` vectors per sample, rows contiguous, in ``dtype`` or else in z's."""
    return torch.zeros(len(z), size, z.shape[1], dtype=dtype or z.dtype, device=z.device)


def is_derived(*tensors: Tensor) -> bool:
    """True if what is computed from these tensors gets a graph or, in forward mode, may get a tangent."""
    return is_forward_mode() or (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))


def stored(window: Float[Tensor, "B W N"], slot: int, row: Float[Tensor, "B N"]) -> Float[Tensor, "B W N"]:
    """The window with ``row`` at ``slot``: in place, but a new tensor where a derivative needs the old one."""
    if is_derived(window, row):
        return torch.cat([window[:, :slot], row[:, None].to(window.dtype), window[:, slot + 1 :]], dim=1)
    window[:, slot] = row
    return window


def vector_at(window: Float[Tensor, "B W N"], slot: int, dtype: torch.dtype) -> Float[Tensor, "B N"]:
    """The vector at ``slot``."""
    vector = window.select(1, slot)
    return vector if vector.dtype == dtype else vector.to(dtype)


def stored_difference(
    window: Float[Tensor, "B W N"], slot: int, x: Float[Tensor, "B N"], y: Float[Tensor, "B N"]
) -> Float[Tensor, "B W N"]:
    """The window with x − y at ``slot``, like ``stored``, but without a temporary for x − y."""
    if is_derived(window, x, y):
        return stored(window, slot, x - y)
    torch.sub(x, y, out=window.select(1, slot))
    return window


def check_history_dtype(owner: str, dtype: torch.dtype | None) -> None:
    """Raise a ValueError unless ``dtype`` can hold the vectors of a history."""
    if dtype not in (None, torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(
            f"{owner}(history_dtype={dtype}): a history is kept in torch.bfloat16, torch.float32 or torch.float64, or "
            "with None in the dtype of the algebra; float16 would overflow."
        )


def selected(window: Float[Tensor, "B W N"], rows: Int[Tensor, " R"]) -> Float[Tensor, "R W N"]:
    """The vectors of these samples, in ascending order: moved to the front in place, so that little is allocated."""
    together = max(1, MOVED // max(1, window[:1].numel()))
    for start in range(0, len(rows), together):
        chosen = rows[start : start + together]
        window[start : start + len(chosen)] = window[chosen]  # no later row comes from a place before its own
    return window[: len(rows)]


MOVED = 1 << 17
"""Numbers that are moved at a time, if a sample has not more."""


def inner(window: Float[Tensor, "B W N"], x: Float[Tensor, "B N"]) -> Float[Tensor, "B W"]:
    """Inner product of each vector of the window with x, in x's dtype."""
    if window.dtype != x.dtype:  # a product of two bfloat16 vectors would come out in bfloat16
        return torch.stack([dot(row.to(x.dtype), x) for row in window.unbind(1)], dim=1)
    # Row times transposed window: on a CPU ten times faster than window times column, and a sample's bits do not
    # depend on the size of its batch.
    return torch.bmm(x.unsqueeze(1), window.mT).select(1, 0)


def combine(
    weights: Float[Tensor, "B W"], window: Float[Tensor, "B W N"], *, onto: Float[Tensor, "B N"] | None = None
) -> Float[Tensor, "B N"]:
    """Σ_i weights_i · window_i + ``onto``, in the dtype of ``onto`` if it is given, else of the window."""
    if onto is not None and onto.dtype != window.dtype:
        out = None if torch.is_grad_enabled() or is_forward_mode() else torch.empty_like(onto)
        for weight, row in zip(weights.to(onto.dtype).unbind(1), window.unbind(1), strict=True):
            onto = torch.addcmul(onto, row, weight[:, None], out=out)
        return onto
    rows = (weights if weights.dtype == window.dtype else weights.to(window.dtype)).unsqueeze(1)
    product = torch.bmm(rows, window) if onto is None else torch.baddbmm(onto.unsqueeze(1), rows, window)
    return product.select(1, 0)


def dot(x: Float[Tensor, "B N"], y: Float[Tensor, "B N"]) -> Float[Tensor, " B"]:
    """Inner product of each sample."""
    return torch.linalg.vecdot(x, y)


def small_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the W×W systems: float64 where the device has it."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def bordered(gram: Float[Tensor, "B W W"], slot: int, row: Float[Tensor, "B used"]) -> Float[Tensor, "B W W"]:
    """The Gram matrix after the vector at ``slot`` was replaced by one whose inner products are ``row``."""
    gram, row = gram.clone(), row.to(gram.dtype)
    gram[:, slot, : row.shape[1]] = row
    gram[:, : row.shape[1], slot] = row
    return gram


def ridge_solve(
    gram: Float[Tensor, "B W W"], target: Float[Tensor, "B W"], *, ridge: float, tiny: bool = False
) -> Float[Tensor, "B W"]:
    """argmin over c of cᵀGc − 2cᵀt + λ Σ_i G_ii c_i², for each sample; zero in empty columns.

    The system is scaled to a unit diagonal first, so that the ridge λ acts on every column alike, whatever its length.
    ``tiny`` systems are solved by elimination, in a few operations over the whole batch.
    """
    diagonal = gram.diagonal(dim1=1, dim2=2)
    if gram.device.type == "cpu" and not is_derived(gram, target):
        solution = _if_regular(gram, diagonal, target, ridge=ridge, tiny=tiny)
        if solution is not None:
            return solution
    filled = diagonal > 0
    scale = torch.where(filled, diagonal, 1.0).rsqrt()  # finite, and so is its gradient, even for an empty column
    regular = gram * scale[:, :, None] * scale[:, None, :]
    regular = regular + torch.diag_embed(torch.where(filled, ridge, 1.0).to(gram.dtype))
    if tiny:
        solution = eliminated(regular, target * scale)
        usable = torch.isfinite(solution).all(dim=1)
    else:
        solution, info = torch.linalg.solve_ex(regular, target * scale)
        usable = (info == 0) & torch.isfinite(solution).all(dim=1)
    if is_derived(gram, target) and (usable.is_cuda or not usable.all()):  # a GPU is not waited for
        # The ``where`` below would turn the derivative of an infinite solution into NaN: solve once more without it.
        regular = torch.where(usable[:, None, None], regular, torch.eye(len(regular[0])).to(regular))
        target = torch.where(usable[:, None], target, 0.0)
        solution = eliminated(regular, target * scale) if tiny else torch.linalg.solve(regular, target * scale)
    return torch.where(usable[:, None], solution * scale, 0.0)


def _if_regular(
    gram: Float[Tensor, "B W W"],
    diagonal: Float[Tensor, "B W"],
    target: Float[Tensor, "B W"],
    *,
    ridge: float,
    tiny: bool,
) -> Float[Tensor, "B W"] | None:
    """The bits that ``ridge_solve`` returns, by half as many operators, if every system of the batch is regular.

    None if a column is empty, a system is singular or a solution is infinite. These three tests read from the device.
    """
    if not (diagonal.numel() and diagonal.amin() > 0):
        return None
    scale = diagonal.rsqrt()
    regular = (gram * scale.unsqueeze(2)).mul_(scale.unsqueeze(1))
    regular.diagonal(dim1=1, dim2=2).add_(in_float32(ridge))
    if tiny:
        solution = eliminated(regular, target * scale)
    else:
        solution, info = torch.linalg.solve_ex(regular, target * scale)
        if info.any():
            return None
    return solution.mul_(scale) if math.isfinite(solution.sum()) else None


@functools.cache
def in_float32(ridge: float) -> float:
    """The ridge as ``torch.where`` rounds it."""
    return float(torch.where(torch.tensor(True), ridge, 1.0))


TINY = 4
"""A sample of at most this many numbers is tiny: a ``solve`` per sample would take most of the time of a step."""


def eliminated(system: Float[Tensor, "B W W"], target: Float[Tensor, "B W"]) -> Float[Tensor, "B W"]:
    """The solution of each sample's system by elimination without pivots; not finite where a pivot is 0."""
    size = system.shape[1]
    rows = [[*row.unbind(1), last] for row, last in zip(system.unbind(1), target.unbind(1), strict=True)]
    for i, pivot in enumerate(rows):
        for row in rows[i + 1 :]:
            factor = row[i] / pivot[i]
            row[i + 1 :] = [x - factor * y for x, y in zip(row[i + 1 :], pivot[i + 1 :], strict=True)]
    solution: list[Tensor] = []
    for i in reversed(range(size)):
        rest = rows[i][-1]
        for x, known in zip(rows[i][i + 1 : size], solution, strict=True):
            rest = rest - x * known
        solution.insert(0, rest / rows[i][i])
    return torch.stack(solution, dim=1)


def quotient(x: Tensor, y: Tensor) -> Tensor:
    """x / y, and 0 where y is 0."""
    if is_derived(x, y):
        zero = y == 0
        return torch.where(zero, 0.0, x / torch.where(zero, 1.0, y))  # the inner ``where`` keeps derivatives finite
    return torch.nan_to_num_(x / y, nan=0.0, posinf=0.0, neginf=0.0)
