"""Maps with known fixed points, for the conformance suites: easy, hard, expansive, and one whose state is a tree.

Letters: B batch, R chosen samples, N width.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from equilibria.core.maps import Map, as_map
from equilibria.core.solve import solve
from equilibria.core.state import Layout, State
from equilibria.core.stop import Stop
from equilibria.core.trees import map_tensors
from equilibria.solvers.broyden import Broyden

Rows = slice | list[int]
ALL = slice(None)


class Problem(ABC):
    """One map with its fixed points, one per sample."""

    name: str
    contractive: bool
    """True if plain iteration converges."""

    @abstractmethod
    def map(self, dtype: torch.dtype = torch.float64, rows: Rows = ALL) -> Callable[[State], State]:
        """f in ``dtype`` for the samples ``rows``."""

    @abstractmethod
    def start(self, dtype: torch.dtype = torch.float64, rows: Rows = ALL) -> State:
        """Zeros."""

    @abstractmethod
    def poisoned(self, sample: int) -> Problem:
        """The same problem with NaN in the input of one sample."""

    @property
    @abstractmethod
    def batch(self) -> int:
        """Number of samples."""

    @functools.cached_property
    def exact(self) -> State:
        """The fixed points, found in float64 to about 1e-13."""
        f = self.map()
        tight = Stop(rtol=1e-14, atol=1e-14, max_evals=3000)
        with torch.no_grad():
            z = solve(f, self.start(), Broyden(rank=200), tight).z
            layout = Layout.of(z)
            error = (layout.pack(layout.aligned(f(z))) - layout.pack(z)).abs().max()
        assert error < 1e-12, self.name
        return z


def rows_times(z: Float[Tensor, "B N"], weight: Float[Tensor, "M N"]) -> Float[Tensor, "B M"]:
    """z Wᵀ, where the bits of a row do not depend on the batch (a matrix product changes its kernel with B)."""
    return (z[:, None, :] * weight).sum(dim=2)


@dataclasses.dataclass
class MatrixProblem(Problem):
    """z ↦ tanh(W z + x), or without the tanh."""

    name: str
    weight: Float[Tensor, "N N"]
    x: Float[Tensor, "B N"]
    contractive: bool = True
    linear: bool = False

    def map(self, dtype: torch.dtype = torch.float64, rows: Rows = ALL) -> Callable[[State], State]:
        """f in ``dtype`` for the samples ``rows``."""
        weight, x = self.weight.to(dtype), self.x[rows].to(dtype)
        if self.linear:
            return lambda z: rows_times(z, weight) + x
        return lambda z: torch.tanh(rows_times(z, weight) + x)

    def start(self, dtype: torch.dtype = torch.float64, rows: Rows = ALL) -> State:
        """Zeros."""
        return torch.zeros_like(self.x[rows]).to(dtype)

    def poisoned(self, sample: int) -> Problem:
        """The same problem with NaN in the input of one sample."""
        x = self.x.clone()
        x[sample] = torch.nan
        return dataclasses.replace(self, x=x)

    @property
    def batch(self) -> int:
        """Number of samples."""
        return len(self.x)


@dataclasses.dataclass
class TreeProblem(Problem):
    """Three coupled scales: {"fine": [B 8 8 8], "coarse": [B 16 4 4], "token": [B 32]}.

        fine'   = tanh(A fine + up(B coarse) + C token + x_fine)
        coarse' = tanh(D coarse + down(E fine) + x_coarse)
        token'  = tanh(F token + G mean(coarse) + x_token)

    The matrices act on the channels.
    """

    weights: dict[str, Tensor]
    x: dict[str, Tensor]
    name: str = "three scales"
    contractive: bool = True

    SHAPES = {"fine": (8, 8, 8), "coarse": (16, 4, 4), "token": (32,)}  # noqa: RUF012

    @classmethod
    def make(cls, batch: int = 3) -> TreeProblem:
        """The problem with fixed random weights."""
        sizes = {"A": (8, 8), "B": (8, 16), "C": (8, 32), "D": (16, 16), "E": (16, 8), "F": (32, 32), "G": (32, 16)}
        weights = {
            name: 0.35 * _gaussian(*size, seed=20 + place) / math.sqrt(size[1])
            for place, (name, size) in enumerate(sizes.items())
        }
        x = {name: _gaussian(batch, *size, seed=40 + place) for place, (name, size) in enumerate(cls.SHAPES.items())}
        return cls(weights=weights, x=x)

    def map(self, dtype: torch.dtype = torch.float64, rows: Rows = ALL) -> Callable[[State], State]:
        """f in ``dtype`` for the samples ``rows``."""
        return self.mapped({name: w.to(dtype) for name, w in self.weights.items()}, self._input(dtype, rows))

    @staticmethod
    def mapped(w: dict[str, Tensor], x: dict[str, Tensor]) -> Callable[[State], State]:
        """f with these weights and inputs; every leaf is computed in the dtype of its own input."""

        def f(z: State) -> State:
            dtype = w["A"].dtype
            fine, coarse, token = (z[name].to(dtype) for name in ("fine", "coarse", "token"))
            up = _channels(w["B"], coarse).repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
            down = torch.nn.functional.avg_pool2d(_channels(w["E"], fine), 2)
            found = {
                "token": rows_times(token, w["F"]) + rows_times(coarse.mean(dim=(2, 3)), w["G"]) + x["token"],
                "fine": _channels(w["A"], fine) + up + rows_times(token, w["C"])[:, :, None, None] + x["fine"],
                "coarse": _channels(w["D"], coarse) + down + x["coarse"],
            }
            return {name: torch.tanh(value).to(z[name].dtype) for name, value in found.items()}

        return f

    def start(self, dtype: torch.dtype = torch.float64, rows: Rows = ALL) -> State:
        """Zeros."""
        return map_tensors(torch.zeros_like, self._input(dtype, rows))

    def _input(self, dtype: torch.dtype, rows: Rows) -> dict[str, Tensor]:
        return {name: x[rows].to(dtype) for name, x in self.x.items()}

    def poisoned(self, sample: int) -> Problem:
        """The same problem with NaN in the input of one sample."""
        x = {name: value.clone() for name, value in self.x.items()}
        x["coarse"][sample] = torch.nan
        return dataclasses.replace(self, x=x)

    @property
    def batch(self) -> int:
        """Number of samples."""
        return len(self.x["token"])


def _channels(weight: Float[Tensor, "M N"], image: Float[Tensor, "B N H W"]) -> Float[Tensor, "B M H W"]:
    return torch.einsum("mn,bnhw->bmhw", weight, image)


def _gaussian(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _with_radius(matrix: Float[Tensor, "N N"], radius: float) -> Float[Tensor, "N N"]:
    return matrix * (radius / torch.linalg.eigvals(matrix).abs().max())


@functools.cache
def problems() -> dict[str, Problem]:
    """All problems by name; each has samples of mixed difficulty."""
    n, batch = 24, 5
    mixed = torch.tensor([0.1, 0.5, 1.0, 2.0, 4.0], dtype=torch.float64)[:, None]
    rotation = torch.linalg.qr(_gaussian(n, n, seed=2))[0]
    expansive = _with_radius(_gaussian(n, n, seed=3), 1.4)
    found: Sequence[Problem] = (
        MatrixProblem(
            "tanh, radius 0.6", _with_radius(_gaussian(n, n, seed=0), 0.6), mixed * _gaussian(batch, n, seed=1)
        ),
        MatrixProblem("rotation, radius 0.7", 0.7 * rotation, _gaussian(batch, n, seed=4), linear=True),
        MatrixProblem("linear, radius 1.4", expansive, _gaussian(batch, n, seed=5), linear=True, contractive=False),
        TreeProblem.make(),
    )
    return {problem.name: problem for problem in found}


NAMES = ("tanh, radius 0.6", "rotation, radius 0.7", "linear, radius 1.4", "three scales")
"""The keys of ``problems()``, for parametrised tests."""


@dataclasses.dataclass(frozen=True, eq=False)
class Divisible(Map):
    """The map of a problem that can drop samples."""

    problem: Problem
    samples: tuple[int, ...]

    @classmethod
    def of(cls, problem: Problem) -> Divisible:
        """The map of all samples, in float64."""
        return cls(problem, tuple(range(problem.batch)))

    def __call__(self, z: State) -> State:
        """f of these samples."""
        return self.problem.map(rows=list(self.samples))(z)

    def rows(self, index: Int[Tensor, " R"]) -> Divisible:
        """The map of these samples alone."""
        return Divisible(self.problem, tuple(self.samples[place] for place in index.tolist()))


def flat(z: State) -> Float[Tensor, "B N"]:
    """A state as rows."""
    return Layout.of(z).pack(z)


def same_rows(f: Callable[[State], State], z: State) -> tuple[Float[Tensor, "B N"], Float[Tensor, "B N"]]:
    """f(z) and z as rows, the entries of f's dicts in the order of z."""
    layout = Layout.of(z)
    return layout.pack(layout.aligned(as_map(f)(z))), layout.pack(z)


def tanh_map(
    n: int = 10, batch: int = 3, *, gain: float = 0.7, seed: int = 0
) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """Weight and input, both float64 with gradient, and the closure z ↦ tanh(z Wᵀ + x) over them."""
    weight = (gain * _gaussian(n, n, seed=seed) / math.sqrt(n)).requires_grad_()
    x = _gaussian(batch, n, seed=seed + 1).requires_grad_()
    return weight, x, lambda z: torch.tanh(z @ weight.mT + x)
