"""A graph equilibrium network: nodes exchange messages until nothing changes, so news travels any distance.

The task has a known answer. Ten nodes in random order form a chain, and each carries +1 or −1; one end of the chain is
marked, and every node has to output the number of that end. An explicit network of three layers sees two edges far: it
can be right at three nodes of ten and has to guess at seven, which makes 65 %. The equilibrium of the same module has
no such horizon (Gu et al., *Implicit Graph Neural Networks*, 2020).

Each graph can be one sample of the batch, with an axis for its nodes. Or the nodes of all graphs are the batch axis, as
in most libraries for graphs, with one sparse adjacency matrix. Then f mixes the samples of the batch, and the layer
needs ``coupled=True``. Without it each node is solved as a problem of its own, the gradient is wrong, and a
``ConvergenceWarning`` says so; ``--untold`` shows it.

python examples/graph.py                      a minute on one core; needs pip install matplotlib
python examples/graph.py --untold             the nodes as batch axis, once more without coupled=True
python examples/graph.py --steps 60 --seed 1 --picture distance.png
"""

import argparse
import time
import warnings
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.nn.utils.parametrizations import orthogonal

from equilibria import ConvergenceWarning, Equilibrium, Implicit, Layer, LayerOutput, Stop, Unrolled

NODES, WIDTH = 10, 32
STOP = Stop(rtol=1e-3, max_evals=100)


class Listen(nn.Module):
    """f(z, x, A) = tanh(0.9 A z Q + u(x)).

    It stays a contraction during training, since Q is orthogonal and no eigenvalue of A exceeds 1 in magnitude.
    """

    def __init__(self) -> None:
        super().__init__()
        self.neighbours = orthogonal(nn.Linear(WIDTH, WIDTH, bias=False), orthogonal_map="cayley")
        self.own = nn.Sequential(nn.Linear(2, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH, bias=False))

    def forward(self, z: torch.Tensor, x: torch.Tensor, adjacency: torch.Tensor) -> torch.Tensor:
        """f(z) [… N, W] of z [… N, W], x [… N, 2] and A [… N, N], which may be sparse."""
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


def joined(adjacency: torch.Tensor) -> torch.Tensor:
    """The adjacency matrix [B·N, B·N] of all graphs as one graph: sparse, with one block per graph."""
    graph, target, source = adjacency.nonzero(as_tuple=True)
    first, total = NODES * graph, NODES * len(adjacency)
    place = torch.stack([first + target, first + source])
    return torch.sparse_coo_tensor(place, adjacency[graph, target, source], (total, total), check_invariants=False)


def applied(layer: Layer, x: torch.Tensor, adjacency: torch.Tensor, *, by_node: bool) -> LayerOutput:
    """The output of the layer, with the graphs or with all of their nodes as batch axis."""
    if by_node:
        x, adjacency = x.flatten(0, 1), joined(adjacency)
    return layer(x, adjacency, start=torch.zeros(*x.shape[:-1], WIDTH))


def train(name: str, layer: Layer, steps: int, *, by_node: bool = False) -> list[float]:
    """Train the layer with a head; return the accuracy at each distance, on new graphs."""
    head, began = nn.Linear(WIDTH, 1), time.perf_counter()
    optimiser = torch.optim.Adam([*layer.parameters(), *head.parameters()])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-2, total_steps=steps)
    for step in range(1, steps + 1):
        x, adjacency, label, _ = chains(64)
        out = applied(layer, x, adjacency, by_node=by_node)
        loss = binary_cross_entropy_with_logits(head(out.z).view_as(label), label)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % 50 == 0 and out.solution is not None:
            print(f"step {step}: forward {out.solution} | backward {out.solution.adjoint[0]}")
    x, adjacency, label, distance = chains(1000)
    with torch.no_grad():
        out = applied(layer, x, adjacency, by_node=by_node)
        right = (head(out.z).view_as(label) > 0) == (label > 0.5)
    solved = "" if out.solution is None else f" | {out.solution}"
    print(f"{name}: test accuracy {right.float().mean():.1%}, {time.perf_counter() - began:.0f} s{solved}")
    return [right[distance == d].float().mean().item() for d in range(NODES)]


def draw(accuracies: dict[str, list[float]], path: Path) -> None:
    """Plot accuracy against distance, one line per network."""
    from matplotlib.figure import Figure

    axes = Figure(figsize=(6, 4), layout="constrained").subplots()
    for name, accuracy in accuracies.items():
        axes.plot(accuracy, marker="o", label=name)
    axes.axhline(0.5, color="black", linestyle="--", linewidth=1, label="guessing")
    axes.set(xlabel="edges between the node and the marked end", ylabel="test accuracy", ylim=(0.4, 1.03))
    axes.legend()
    axes.figure.savefig(path, dpi=150)


def main(steps: int = 200, seed: int = 0, picture: Path = Path("graph.png"), untold: bool = False) -> dict[str, float]:
    """Train the networks, draw their accuracies, and return the means."""
    gradient = Implicit(stop=STOP)
    accuracies = {}
    torch.manual_seed(seed)
    accuracies["equilibrium"] = train("equilibrium", Equilibrium(Listen(), stop=STOP, gradient=gradient), steps)
    torch.manual_seed(seed)
    nodes = Equilibrium(Listen(), stop=STOP, gradient=gradient, coupled=True)
    accuracies["nodes as batch axis"] = train("nodes as batch axis", nodes, steps, by_node=True)
    if untold:
        torch.manual_seed(seed)
        nodes = Equilibrium(Listen(), stop=STOP, gradient=gradient)
        with warnings.catch_warnings(record=True, action="always", category=ConvergenceWarning) as heard:
            accuracies["without coupled=True"] = train("without coupled=True", nodes, steps, by_node=True)
        print(f"without coupled=True: {len(heard)} warnings, of which the first is: {heard[0].message}")
    torch.manual_seed(seed)
    accuracies["three layers"] = train("three layers", Unrolled(Listen(), 3), steps)
    draw(accuracies, picture)
    return {name: sum(accuracy) / NODES for name, accuracy in accuracies.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, default=Path("graph.png"))
    parser.add_argument("--untold", action="store_true", help="the nodes as batch axis without coupled=True, too")
    main(**vars(parser.parse_args()))
