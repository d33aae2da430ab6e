"""A solver of your own: a frozen dataclass with two methods. Here Aitken's Δ² acceleration, one ratio per sample.

z ← f(z) + q/(1 − q)·r with r = f(z) − z and q = ⟨r, r_prev⟩/⟨r_prev, r_prev⟩: exact where one mode dominates.

python examples/solver.py    beside plain iteration, on a map with one slow mode
pytest examples/solver.py    the laws that every solver must keep
"""

import dataclasses

import torch

from equilibria import Picard, Solver, Stop, solve


@dataclasses.dataclass(frozen=True)
class Aitken(Solver):
    """Extrapolates along the last step; ``limit`` bounds the ratio q."""

    limit: float = 0.99

    def init(self, z):
        return None  # the history: the residual before the last step if that was plain, else None

    def step(self, f, at, history):
        if history is None:
            return at.fz, at.r
        ratio = (at.r * history).sum(1, keepdim=True) / (history * history).sum(1, keepdim=True).clamp_min(1e-30)
        ratio = ratio.clamp(-self.limit, self.limit)
        # Every other step is plain, so that the ratio is always measured on two plain residuals.
        return at.fz + ratio / (1 - ratio) * at.r, None


if __name__ == "__main__":
    torch.manual_seed(0)
    rates = torch.cat([torch.tensor([0.98]), torch.linspace(-0.3, 0.3, 31)])
    x = torch.randn(4, 32)
    for solver in (Picard(), Aitken()):
        print(solver, "|", solve(lambda z: rates * z + x, torch.zeros(4, 32), solver, Stop(max_evals=500)))
else:  # imported by pytest, which the suites need and the solver does not
    from equilibria.testing import SolverSuite

    class TestAitken(SolverSuite):
        """The laws of a solver. ``needs_contraction``: this one converges only where plain iteration does."""

        needs_contraction = True

        def make(self):
            return Aitken()
