"""Correction losses: an equilibrium network whose answer is right before its solve has converged.

The task is to tell two interleaved spirals apart. If a solve is cut off after a few evaluations, the head reads a state
for which it was never trained. A correction loss trains it for such states: the solve stores its states after a few
steps (``keep``), f is applied once to each of them with a graph, and the loss of the result is added. Each of these
phantom iterates costs one evaluation and one graph of f (Bai, Geng, Savani and Kolter, *Deep Equilibrium Optical Flow
Estimation*, 2022).

python examples/correction.py               a minute on one core
python examples/correction.py --steps 100 --seed 1
"""

import argparse

import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

from equilibria import Equilibrium, Implicit, Method, Stop

WIDTH, BATCH = 64, 256
KEEP, DISCOUNT = (1, 2, 4), 0.8
STOP = Stop(rtol=1e-3, max_evals=60)
BUDGETS = (2, 3, 4, 6, 8, 12, 60)


class Cell(nn.Module):
    """f(z, x) = tanh(z W + u(x)); W is free, so some samples may not converge. A contraction needs no correction."""

    def __init__(self) -> None:
        super().__init__()
        self.mixed = nn.Linear(WIDTH, WIDTH)
        self.own = nn.Sequential(nn.Linear(2, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
        nn.init.normal_(self.mixed.weight, std=0.5 / WIDTH**0.5)

    def forward(self, z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.mixed(z) + self.own(x))


def spirals(samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points [B, 2] on two spirals of one and a half turns, and the spiral of each point [B], 0 or 1."""
    radius, label = torch.rand(samples).sqrt(), torch.randint(2, (samples,)).float()
    angle = torch.pi * (3 * radius + label)
    return 2 * torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1), label


def trained(steps: int, *, corrected: bool) -> tuple[Equilibrium, nn.Linear]:
    """A layer with its head, trained with or without correction losses."""
    keep = KEEP if corrected else ()
    layer = Equilibrium(Cell(), stop=STOP, gradient=Implicit(stop=STOP), keep=keep, on_failure="ignore")
    head = nn.Linear(WIDTH, 1)
    optimiser = torch.optim.Adam([*layer.parameters(), *head.parameters()], lr=3e-3)
    for step in range(1, steps + 1):
        x, label = spirals(BATCH)
        out = layer(x, start=torch.zeros(BATCH, WIDTH))
        loss = binary_cross_entropy_with_logits(head(out.z)[:, 0], label)
        for place, z in enumerate(reversed(out.solution.iterates), 1):  # the earliest has the smallest weight
            near = head(out.f(z))[:, 0]
            loss = loss + DISCOUNT**place * binary_cross_entropy_with_logits(near, label)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step == steps:
            print(f"step {step}: {out.solution}")
    return layer, head


@torch.no_grad()
def accuracy(layer: Equilibrium, head: nn.Linear, budget: int) -> float:
    """The accuracy on new points, if the solve may take ``budget`` evaluations."""
    x, label = spirals(4000)
    method = Method(stop=Stop(rtol=1e-3, max_evals=budget), on_failure="ignore")
    z = layer(x, start=torch.zeros(4000, WIDTH), method=method).z
    return ((head(z)[:, 0] > 0) == (label > 0.5)).float().mean().item()


def main(steps: int = 600, seed: int = 0) -> dict[str, list[float]]:
    """Train both, and print their accuracy for each budget."""
    found = {}
    for name, corrected in (("without correction", False), ("with correction", True)):
        torch.manual_seed(seed)
        layer, head = trained(steps, corrected=corrected)
        found[name] = [accuracy(layer, head, budget) for budget in BUDGETS]
    print("evaluations allowed:", *(f"{budget:6d}" for budget in BUDGETS))
    for name, values in found.items():
        print(f"{name:>19}:", *(f"{value:6.1%}" for value in values))
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Correction losses on the way to an equilibrium")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    main(**vars(parser.parse_args()))
