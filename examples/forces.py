"""A force field that is an equilibrium, trained on forces: the loss is a derivative of a derivative.

Atoms exchange messages until nothing changes; the energy is read off the fixed point and the force is −dE/dx, so that
training needs the gradient of a gradient. ``Implicit`` computes it by one more linear solve, and stores no steps of any
solve. The data come from a Morse chain, whose forces are known in closed form. The same loss through 300 unrolled steps
has the same gradient: the program prints by how much the two differ, and the time that each takes.

python examples/forces.py                     two minutes on one core
python examples/forces.py --steps 20
"""

import argparse
import time

import torch
from torch import nn

from equilibria import Anderson, Implicit, Stop, fixed_point

ATOMS, WIDTH = 4, 16
STOP = Stop(rtol=1e-8, max_evals=60)


class Field(nn.Module):
    """The energy of each chain of atoms, from the equilibrium of their features."""

    def __init__(self) -> None:
        super().__init__()
        self.distances = nn.Sequential(nn.Linear(1, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
        self.mixing = nn.Linear(WIDTH, WIDTH)
        self.readout = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1))

    def f(self, z: torch.Tensor, near: torch.Tensor) -> torch.Tensor:
        """tanh of the sum of each atom's messages from its neighbours and of its distance features ``near``."""
        heard = torch.zeros_like(z)
        heard[:, 1:] = z[:, :-1]
        heard[:, :-1] = heard[:, :-1] + z[:, 1:]
        return torch.tanh(0.3 * self.mixing(heard) + near)

    def forward(self, x: torch.Tensor, unrolled: int | None = None) -> torch.Tensor:
        """E [B] of positions x [B, ATOMS]."""
        bonds = self.distances((x[:, 1:] - x[:, :-1]).unsqueeze(2))
        zero = torch.zeros_like(bonds[:, :1])
        near = torch.cat([bonds, zero], 1) + torch.cat([zero, bonds], 1)
        z = torch.zeros_like(near)
        if unrolled is None:
            rule = Implicit(Anderson(), STOP)
            self.solution = fixed_point(self.f, z, near, solver=Anderson(), stop=STOP, gradient=rule)
            z = self.solution.z
        else:
            for _ in range(unrolled):
                z = self.f(z, near)
        return self.readout(z).sum((1, 2))


def morse(x: torch.Tensor) -> torch.Tensor:
    """The true energy: (1 − exp(1 − d))² of each distance d between neighbours."""
    return (1 - torch.exp(1 - (x[:, 1:] - x[:, :-1]))).square().sum(1)


def forces(energy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """−dE/dx, differentiable."""
    return -torch.autograd.grad(energy.sum(), x, create_graph=True)[0]


def draw(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions, and the true forces there."""
    x = (torch.arange(ATOMS) * 1.1 + 0.2 * torch.randn(batch, ATOMS)).double().requires_grad_()
    return x, forces(morse(x), x).detach()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    field, (x, target) = Field().double(), draw(32)
    gradients, seconds = [], []
    for unrolled in (None, 300):
        began = time.perf_counter()
        loss = (forces(field(x, unrolled), x) - target).square().mean()
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(field.mixing.parameters()))]))
        seconds.append(time.perf_counter() - began)
    difference = float((gradients[0] - gradients[1]).norm() / gradients[1].norm())
    print(f"gradient of the force loss: differs from that of 300 unrolled steps by {difference:.1e}")
    print(f"implicit {seconds[0]:.2f} s, unrolled {seconds[1]:.2f} s")
    optimiser = torch.optim.Adam(field.parameters(), 5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-2, total_steps=steps)
    for step in range(1, steps + 1):
        x, target = draw(32)
        loss = (forces(field(x), x) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % max(1, steps // 5) == 0:
            print(f"step {step}: force error {float(loss.detach()):.4f}")
    print(field.solution)
    x, target = draw(500)
    error = (forces(field(x), x) - target).square().mean() / target.square().mean()
    print(f"on new positions the forces are wrong by {100 * float(error.detach()) ** 0.5:.1f} % of their size")


if __name__ == "__main__":
    main()
