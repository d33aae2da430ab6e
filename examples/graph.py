"""A graph equilibrium network: each node listens to its neighbours until nothing changes, so news travels any distance.

The task has a known answer. Ten nodes in random order form a chain, and each carries +1 or −1; one end of the chain is
marked, and every node is to tell the number that stands there. An explicit network of three layers sees two edges far:
it can be right at three nodes of ten and has to guess at seven, which makes 65 %. The equilibrium of the same module
has no such horizon (Gu et al., *Implicit Graph Neural Networks*, 2020). Each graph is one sample of the batch.

python examples/graph.py                      half a minute on one core; needs pip install matplotlib
python examples/graph.py --steps 60 --seed 1 --picture distance.png
"""

import argparse
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.nn.utils.parametrizations import orthogonal

from equilibria import Equilibrium, Implicit, Layer, Stop, Unrolled

NODES, WIDTH = 10, 32
STOP = Stop(rtol=1e-3, max_evals=100)


class Listen(nn.Module):
    """f(z, x, A) = tanh(0.9 A z Q + u(x)).

    It stays a contraction whatever it learns, since Q is orthogonal and no eigenvalue of A exceeds 1 in magnitude.
    """

    def __init__(self) -> None:
        super().__init__()
        self.neighbours = orthogonal(nn.Linear(WIDTH, WIDTH, bias=False), orthogonal_map="cayley")
        self.own = nn.Sequential(nn.Linear(2, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH, bias=False))

    def forward(self, z: torch.Tensor, x: torch.Tensor, adjacency: torch.Tensor) -> torch.Tensor:
        return torch.tanh(0.9 * self.neighbours(adjacency @ z) + self.own(x))


def chains(batch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs [B, N, 2], adjacency matrices [B, N, N], labels [B, N], and edges from each node to the marked end [B, N].

    Each entry of the adjacency is divided by the square roots of its two degrees: all eigenvalues lie in [−1, 1].
    """
    distance = torch.rand(batch, NODES).argsort(dim=1)
    edges = ((distance[:, :, None] - distance[:, None, :]).abs() == 1).float()
    root = edges.sum(dim=2).sqrt()
    sign, marked = torch.randint(2, (batch, NODES)).float(), distance == 0
    x = torch.stack([2 * sign - 1, marked.float()], dim=2)
    return x, edges / (root[:, :, None] * root[:, None, :]), sign[marked][:, None].expand(batch, NODES), distance


def train(layer: Layer, steps: int) -> list[float]:
    """Trains the layer with a head; returns the accuracy at each distance, on new graphs."""
    head, began = nn.Linear(WIDTH, 1), time.perf_counter()
    optimiser = torch.optim.Adam([*layer.parameters(), *head.parameters()])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-2, total_steps=steps)
    for step in range(1, steps + 1):
        x, adjacency, label, _ = chains(64)
        out = layer(x, adjacency, start=torch.zeros(64, NODES, WIDTH))
        loss = binary_cross_entropy_with_logits(head(out.z)[..., 0], label)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % 50 == 0 and out.solution is not None:
            print(f"step {step}: forward {out.solution} | backward {out.solution.adjoint[0]}")
    x, adjacency, label, distance = chains(1000)
    with torch.no_grad():
        out = layer(x, adjacency, start=torch.zeros(1000, NODES, WIDTH))
        right = (head(out.z)[..., 0] > 0) == (label > 0.5)
    name, solved = ("three layers", "") if out.solution is None else ("equilibrium", f" | {out.solution}")
    print(f"{name}: test accuracy {right.float().mean():.1%}, {time.perf_counter() - began:.0f} s{solved}")
    return [right[distance == d].float().mean().item() for d in range(NODES)]


def draw(accuracies: dict[str, list[float]], path: Path) -> None:
    """Accuracy against distance, a line per network."""
    from matplotlib.figure import Figure

    axes = Figure(figsize=(6, 4), layout="constrained").subplots()
    for name, accuracy in accuracies.items():
        axes.plot(accuracy, marker="o", label=name)
    axes.axhline(0.5, color="black", linestyle="--", linewidth=1, label="guessing")
    axes.set(xlabel="edges between the node and the marked end", ylabel="test accuracy", ylim=(0.4, 1.03))
    axes.legend()
    axes.figure.savefig(path, dpi=150)


def main(steps: int = 200, seed: int = 0, picture: Path = Path("graph.png")) -> dict[str, float]:
    """Trains both networks, draws their accuracies, and returns the means."""
    torch.manual_seed(seed)
    networks = {
        "equilibrium": Equilibrium(Listen(), stop=STOP, gradient=Implicit(stop=STOP)),
        "three layers": Unrolled(Listen(), 3),
    }
    accuracies = {name: train(network, steps) for name, network in networks.items()}
    draw(accuracies, picture)
    return {name: sum(accuracy) / NODES for name, accuracy in accuracies.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, default=Path("graph.png"))
    main(**vars(parser.parse_args()))
