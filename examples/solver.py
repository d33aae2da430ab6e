"""A solver of one's own is a frozen dataclass with two methods: here, Aitken's Δ² acceleration, one ratio a sample.

z ← f(z) + r/(1 − r)·(f(z) − z) with r = <g, g_prev>/<g_prev, g_prev>, g = f(z) − z: exact where one mode dominates.

python examples/solver.py
"""

import dataclasses

import torch

from equilibria import Picard, Solver, Stop, solve


@dataclasses.dataclass(frozen=True)
class Aitken(Solver):
    """Extrapolates along the last step; ``limit`` bounds the ratio r."""

    limit: float = 0.99

    def init(self, z):
        return None

    def step(self, f, z, fz, history):
        g = fz - z
        if history is None:
            return fz, g
        ratio = (g * history).sum(1, keepdim=True) / (history * history).sum(1, keepdim=True).clamp_min(1e-30)
        ratio = ratio.clamp(-self.limit, self.limit)
        # Every other step is plain, so that the ratio is always measured on two plain residuals.
        return fz + ratio / (1 - ratio) * g, None


if __name__ == "__main__":
    torch.manual_seed(0)
    rates = torch.cat([torch.tensor([0.98]), torch.linspace(-0.3, 0.3, 31)])
    x = torch.randn(4, 32)
    for solver in (Picard(), Aitken()):
        print(solver, "|", solve(lambda z: rates * z + x, torch.zeros(4, 32), solver, Stop(max_evals=500)))
