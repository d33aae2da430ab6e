"""Newton–Krylov: Newton's method with GMRES on Jacobian–vector products.

Letters: B batch, N flattened state, W inner iterations.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from equilibria.checks import check_fields
from equilibria.core.evaluator import Evaluator
from equilibria.core.products import JVP
from equilibria.core.solver import Iterate, Solver
from equilibria.core.stop import row_norm
from equilibria.solvers.arnoldi import orthogonalised
from equilibria.solvers.history import combine, ridge_solve, small_dtype


@dataclasses.dataclass(frozen=True)
class NewtonKrylov(Solver):
    """z ← z + d,  (I − J(z)) d = f(z) − z solved by GMRES to a relative accuracy η.

    D. A. Knoll and D. E. Keyes (J. Comput. Phys. 193, 2004); GMRES of Y. Saad and M. H. Schultz (1986). Products with J
    come from ``Map.jvp`` and count as evaluations; every step is charged ``min(inner, N) + 1`` of them, needed or not,
    so that no sample's budget depends on its batch. Deviations: (1) each sample stops its own inner iteration; (2)
    Gram–Schmidt is classical and done twice; (3) the small least-squares problem is solved again at every inner
    iteration instead of by Givens rotations; (4) no restart and no line search.
    """

    inner: int = 10
    """Largest number of GMRES iterations per Newton step, at most N for a state of N numbers; one state more than these
    is stored."""
    forcing: float = 0.1
    """η in (0, 1): relative accuracy of each linear solve."""
    jvp: JVP = "auto"
    """How J·v is computed: "forward" mode, "double" backward, finite "differences" (accurate to about √eps), or "auto"
    for the first of them that works for f."""
    cost: ClassVar[int] = 2

    def __post_init__(self) -> None:
        check_fields(self)
        if self.inner < 1:
            raise ValueError(f"NewtonKrylov(inner={self.inner}): at least 1 inner iteration is needed; try 10.")
        if not 0 < self.forcing < 1:
            raise ValueError(f"NewtonKrylov(forcing={self.forcing}): the forcing term lies in (0, 1); try 0.1.")

    def init(self, z: Float[Tensor, "B N"]) -> None:
        """No history: each Newton step stands alone."""

    def step(self, f: Evaluator, at: Iterate, history: None) -> tuple[Tensor, None]:
        """z + d."""
        iterations = min(self.inner, at.z.shape[1], f.remaining - 1)  # N of them solve the system exactly
        before = f.evals
        d = _gmres(f, at, iterations=iterations, forcing=self.forcing, how=self.jvp)
        f.forfeit(iterations - (f.evals - before))
        return at.z + d, None


def _gmres(f: Evaluator, at: Iterate, *, iterations: int, forcing: float, how: JVP) -> Tensor:
    """The d in the Krylov space of I − J(z) and r that minimises ‖(I − J)d − r‖."""
    z, r = at.z, at.r
    size = row_norm(r)
    searching = at.active & (size > 0)
    basis = [torch.where(searching[:, None], r / torch.where(searching, size, 1.0)[:, None], 0.0)]
    hessenberg = torch.zeros(len(z), iterations + 1, iterations, dtype=small_dtype(z), device=z.device)
    y = size.new_zeros(len(size), 1)
    for k in range(iterations):
        w = basis[k] - f.jvp(z, basis[k], fz=at.fz, how=how)
        w, column = orthogonalised(w, torch.stack(basis, dim=1))
        length = row_norm(w)
        # A sample whose inner solve is done adds zero columns and zero vectors, so its answer no longer changes.
        column = torch.cat([column, length[:, None]], dim=1) * searching[:, None]
        hessenberg = _with_column(hessenberg, k, column)
        y, misfit = _least_squares(hessenberg[:, : k + 2, : k + 1], size)
        grows = searching & (length > torch.finfo(z.dtype).eps * row_norm(column))
        searching = grows & (misfit > forcing * size)
        basis.append(torch.where(searching[:, None], w / torch.where(searching, length, 1.0)[:, None], 0.0))
        if not searching.any():
            break
    return combine(y, torch.stack(basis[: y.shape[1]], dim=1))


def _with_column(hessenberg: Tensor, k: int, column: Float[Tensor, "B rows"]) -> Tensor:
    hessenberg = hessenberg.clone()
    hessenberg[:, : column.shape[1], k] = column.to(hessenberg.dtype)
    return hessenberg


def _least_squares(hessenberg: Float[Tensor, "B rows W"], size: Float[Tensor, " B"]) -> tuple[Tensor, Tensor]:
    """argmin over y of ‖size·e₁ − H y‖, and that minimum."""
    target = torch.zeros_like(hessenberg[:, :, 0])
    target[:, 0] = size.to(target.dtype)
    gram = torch.bmm(hessenberg.mT, hessenberg)
    y = ridge_solve(gram, torch.bmm(hessenberg.mT, target[:, :, None])[:, :, 0], ridge=1e-14)
    misfit = row_norm(target - torch.bmm(hessenberg, y[:, :, None])[:, :, 0])
    return y.to(size.dtype), misfit.to(size.dtype)
