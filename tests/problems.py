"""Maps with known fixed points, for the conformance suites."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from equilibria import Broyden, NewtonKrylov, Picard, Stop, solve
from equilibria.solvers import Anderson


def rows_times(z: Tensor, weight: Tensor) -> Tensor:
    """z Wᵀ with the same bits for a row whatever the other rows are (a matrix product changes its kernel with B)."""
    return (z[:, None, :] * weight).sum(dim=2)


@dataclass
class Problem:
    """One map with its exact fixed points, a row a sample."""

    name: str
    weight: Tensor
    x: Tensor
    exact: Tensor = field(init=False)
    contractive: bool = True

    def __post_init__(self):
        with torch.no_grad():
            tight = Stop(rtol=1e-14, atol=1e-14, max_evals=3000)
            f64 = self.on(torch.float64)
            self.exact = solve(f64, torch.zeros_like(self.x), Broyden(memory=200), tight).z
            assert (f64(self.exact) - self.exact).abs().max() < 1e-12, self.name

    def on(self, dtype: torch.dtype, rows: slice | list[int] = slice(None)):
        """f in ``dtype`` for some of the samples."""
        weight, x = self.weight.to(dtype), self.x[rows].to(dtype)
        return lambda z: self.apply(z, weight, x)

    def apply(self, z: Tensor, weight: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(rows_times(z, weight) + x)

    def start(self, dtype: torch.dtype, rows: slice | list[int] = slice(None)) -> Tensor:
        return torch.zeros_like(self.x[rows]).to(dtype)


class Linear(Problem):
    def apply(self, z, weight, x):
        return rows_times(z, weight) + x


def _gaussian(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _with_radius(matrix: Tensor, radius: float) -> Tensor:
    return matrix * (radius / torch.linalg.eigvals(matrix).abs().max())


def make() -> list[Problem]:
    """Easy, hard and expansive; samples of mixed difficulty within each."""
    n, batch = 24, 5
    mixed = torch.tensor([0.1, 0.5, 1.0, 2.0, 4.0], dtype=torch.float64)[:, None]
    rotation = torch.linalg.qr(_gaussian(n, n, seed=2))[0]
    expansive = _with_radius(_gaussian(n, n, seed=3), 1.4)
    return [
        Problem("tanh, radius 0.6", _with_radius(_gaussian(n, n, seed=0), 0.6), mixed * _gaussian(batch, n, seed=1)),
        Linear("rotation, radius 0.7", 0.7 * rotation, _gaussian(batch, n, seed=4)),
        Linear("linear, radius 1.4", expansive, _gaussian(batch, n, seed=5), contractive=False),
    ]


PROBLEMS = make()
SOLVERS = {
    "Picard": Picard(),
    "Anderson": Anderson(),
    "Broyden": Broyden(),
    "NewtonKrylov": NewtonKrylov(inner=24),
}


def tanh_map(n: int = 10, batch: int = 3, *, gain: float = 0.7, seed: int = 0):
    """Weight, input (both with gradient, float64) and the closure over them."""
    weight = (gain * _gaussian(n, n, seed=seed) / math.sqrt(n)).requires_grad_()
    x = _gaussian(batch, n, seed=seed + 1).requires_grad_()
    return weight, x, lambda z: torch.tanh(z @ weight.mT + x)
