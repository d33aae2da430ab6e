"""The Arnoldi iteration: an orthonormal basis of a Krylov space, and the eigenvalues that it shows.

Letters: B batch, N flattened state, W dimensions of the Krylov space.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from equilibria.core.stop import row_norm
from equilibria.solvers.history import combine, inner, small_dtype

KRYLOV = 20
"""Dimensions of the Krylov space in which the spectral radius is looked for, and vectors that are stored for it."""
INVARIANT = 100
"""A vector counts as a combination of the basis if at most so many eps of it are left."""


def orthogonalised(w: Float[Tensor, "B N"], basis: Float[Tensor, "B W N"]) -> tuple[Tensor, Tensor]:
    """The vector w without its components in the basis, and those components; Gram–Schmidt is done twice."""
    first = inner(basis, w)
    w = w - combine(first, basis)
    second = inner(basis, w)
    return w - combine(second, basis), first + second


def unit(v: Float[Tensor, "B N"]) -> Float[Tensor, "B N"]:
    """v with length 1, or 0 where it is 0."""
    size = row_norm(v)
    return v / torch.where(size > 0, size, 1.0)[:, None]


def largest_modulus(
    product: Callable[[Float[Tensor, "B N"]], Float[Tensor, "B N"]], v: Float[Tensor, "B N"], *, size: int
) -> Float[Tensor, " B"]:
    """The largest modulus of the ``ritz_values`` that are not spurious; 0 if there is none.

    A Ritz value is off by about its residual; where A is not normal, one may lie outside the spectrum by that much. It
    is spurious if a value with less than a tenth of its relative residual lies within that distance, or above it.
    """
    if not size:
        return v.new_zeros(len(v))
    values, residuals = ritz_values(product, v, size=size)
    modulus = values.abs()
    doubt = residuals / torch.where(modulus > 0, modulus, 1.0)
    least = modulus * (1 - doubt)
    belied = (modulus[:, None] >= least[:, :, None]) & (doubt[:, None] < 0.1 * doubt[:, :, None])
    return torch.where(belied.any(dim=2), 0.0, modulus).amax(dim=1)


def ritz_values(
    product: Callable[[Float[Tensor, "B N"]], Float[Tensor, "B N"]], v: Float[Tensor, "B N"], *, size: int
) -> tuple[Complex[Tensor, "B W"], Float[Tensor, "B W"]]:
    """The eigenvalues θ of A in the Krylov space of v, Av, A²v, … with W = ``size`` ≤ N dimensions: W products.

    W. E. Arnoldi (Quart. Appl. Math. 9, 1951). Where the space is invariant after fewer steps, its eigenvalues are
    those of A, and the others are 0. NaN where a product is not finite.

    Returns:
        The values θ, and the residuals ‖A y − θ y‖ of their vectors y of length 1.
    """
    basis = torch.zeros(len(v), size, v.shape[1], dtype=v.dtype, device=v.device)
    hessenberg = torch.zeros(len(v), size + 1, size, dtype=small_dtype(v), device=v.device)
    basis[:, 0] = unit(v)
    for k in range(size):
        image = product(basis[:, k])
        w, column = orthogonalised(image, basis[:, : k + 1])
        length = row_norm(w)
        grows = length > INVARIANT * torch.finfo(v.dtype).eps * row_norm(image)
        hessenberg[:, : k + 1, k] = column.to(hessenberg.dtype)
        hessenberg[:, k + 1, k] = torch.where(grows, length, 0.0).to(hessenberg.dtype)
        if k + 1 < size:
            basis[:, k + 1] = torch.where(grows[:, None], unit(w), 0.0)
    finite = hessenberg.isfinite().all(dim=2).all(dim=1)
    # eig raises on NaN.
    found, vectors = torch.linalg.eig(torch.where(finite[:, None, None], hessenberg[:, :-1], 0.0))
    return torch.where(finite[:, None], found, torch.nan), hessenberg[:, -1, -1:] * vectors[:, -1].abs()
