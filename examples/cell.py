"""A cell of your own: three methods. Everything that does not depend on z is computed once, in ``prepare``.

A network over a set, in which each element sees itself and the mean of all. The task is to tell whether an element lies
above the mean of the others by more than half a standard deviation.

python examples/cell.py    trains it, in seconds
pytest examples/cell.py    the laws that every cell must keep
"""

import torch
from torch import nn

from equilibria import Broyden, Cell, Equilibrium, Prepared, Stop


class SetCell(Cell):
    """f(z)_t = tanh(½ A z_t + ½ B mean(z) + (U x_t + b)): the factors make it a contraction at the start."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.own = nn.Linear(width, width, bias=False)
        self.mean = nn.Linear(width, width, bias=False)
        self.input = nn.Linear(1, width)

    def prepare(self, x):
        return Prepared(rows=self.input(x))  # rows: converged samples can leave the batch

    def start(self, prepared):
        return torch.zeros_like(prepared.rows)

    def forward(self, z, prepared):
        return torch.tanh(0.5 * self.own(z) + 0.5 * self.mean(z.mean(dim=1, keepdim=True)) + prepared.rows)


def wanted(x):
    """1 where x_t > mean of the others + half their standard deviation."""
    others = [torch.cat([x[:, :t], x[:, t + 1 :]], dim=1) for t in range(x.shape[1])]
    return torch.stack([(x[:, t] > o.mean(1) + 0.5 * o.std(1)).float() for t, o in enumerate(others)], dim=1)[..., 0]


def main(steps: int = 250) -> float:
    """Train; return the share of right answers on new data."""
    torch.manual_seed(0)
    layer = Equilibrium(SetCell(32), Broyden(rank=40), Stop(max_evals=400))
    head = nn.Linear(32, 1)
    optimiser = torch.optim.Adam([*layer.parameters(), *head.parameters()], lr=2e-3)
    for step in range(steps):
        x = torch.randn(64, 5, 1)
        out = layer(x)
        loss = nn.functional.binary_cross_entropy_with_logits(head(out.z)[..., 0], wanted(x))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.3f} | {out.solution} | adjoint {out.solution.adjoint[0].evals}")
    with torch.no_grad():
        x = torch.randn(2000, 5, 1)
        right = (head(layer(x).z)[..., 0] > 0) == wanted(x).bool()
    return right.float().mean().item()


if __name__ == "__main__":
    print(f"right answers: {main():.1%}")
else:  # imported by pytest, which the suites need and the cell does not
    from equilibria.testing import CellSuite

    class TestSetCell(CellSuite):
        """The laws of a cell: pure, same bits twice, independent samples, right gradients of every parameter, …"""

        def make(self):
            return SetCell(6).double()

        def inputs(self, batch):
            return (torch.randn(batch, 5, 1, dtype=torch.float64),)
