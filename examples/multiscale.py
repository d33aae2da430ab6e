"""A multiscale equilibrium that reads handwritten digits: one state of three resolutions, solved together.

The state is a dict of tensors, {"fine": [B, C, 8, 8], "coarse": [B, C', 4, 4], "token": [B, D]}, and f is a plain
``nn.Module``: each scale is computed from itself and its neighbours, and the finest one from the picture as well (a
small version of Bai, Koltun and Kolter, *Multiscale Deep Equilibrium Models*, 2020). The classifier reads the token
alone. The digits are the 8×8 ones that come with scikit-learn; a quarter of them, always the same, is the test set.

python examples/multiscale.py                 a minute on one core; needs pip install scikit-learn matplotlib
python examples/multiscale.py --epochs 2 --seed 1 --picture residuals.png
"""

import argparse
import time
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn.functional import cross_entropy, interpolate
from torch.nn.utils.parametrizations import weight_norm

from equilibria import Equilibrium, Implicit, Stop

FINE, COARSE, TOKEN = 16, 32, 64  # channels of each scale
STOP = Stop(rtol=1e-3, max_evals=60, per_leaf=True)  # per_leaf: the small token has to converge as well


class Scales(nn.Module):
    """f(z, x). Only weights from fine to coarse are large at the start; the others are small, so f is a contraction.

    Group norm of the sums keeps each scale at one size, whatever the weights become. The larger the part of a sum that
    does not depend on z, the smaller the Jacobian: hence pictures with a standard deviation of 1.5.
    """

    def __init__(self, back: float = 0.1) -> None:
        super().__init__()
        self.picture = nn.Conv2d(1, FINE, 3, padding=1)
        self.fine = scaled(nn.Conv2d(FINE, FINE, 3, padding=1, bias=False), back)
        self.coarse = scaled(nn.Conv2d(COARSE, COARSE, 3, padding=1, bias=False), back)
        self.token = scaled(nn.Linear(TOKEN, TOKEN, bias=False), back)
        self.fine_to_coarse = scaled(nn.Conv2d(FINE, COARSE, 3, stride=2, padding=1, bias=False), 1.0)
        self.coarse_to_token = scaled(nn.Linear(16 * COARSE, TOKEN, bias=False), 1.0)
        self.coarse_to_fine = scaled(nn.Conv2d(COARSE, FINE, 1, bias=False), back)
        self.token_to_coarse = scaled(nn.Linear(TOKEN, COARSE, bias=False), back)
        self.norms = nn.ModuleList(nn.GroupNorm(4, channels) for channels in (FINE, COARSE, TOKEN))

    def forward(self, z: dict[str, torch.Tensor], x: torch.Tensor) -> dict[str, torch.Tensor]:
        fine, coarse, token = z["fine"], z["coarse"], z["token"]
        sums = {
            "fine": self.picture(x) + self.fine(fine) + interpolate(self.coarse_to_fine(coarse), scale_factor=2),
            "coarse": self.fine_to_coarse(fine) + self.coarse(coarse) + self.token_to_coarse(token)[:, :, None, None],
            "token": self.coarse_to_token(coarse.flatten(1)) + self.token(token),
        }
        return {scale: torch.relu(norm(sums[scale])) for scale, norm in zip(sums, self.norms, strict=True)}


def scaled(layer: nn.Module, factor: float) -> nn.Module:
    """The layer with weight norm, and its weights ``factor`` times as large as PyTorch draws them."""
    layer = weight_norm(layer)
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(factor)
    return layer


def zeros(batch: int) -> dict[str, torch.Tensor]:
    """The start of the solve, which is passed to the layer since a plain module cannot tell the shape of its state."""
    shapes = {"fine": (FINE, 8, 8), "coarse": (COARSE, 4, 4), "token": (TOKEN,)}
    return {scale: torch.zeros(batch, *shape) for scale, shape in shapes.items()}


def digits() -> list[torch.Tensor]:
    """Pictures [B, 1, 8, 8] for training and for testing, then their classes [B]."""
    data = load_digits()
    x, y = torch.tensor(data.images, dtype=torch.float32)[:, None] / 4 - 1.2, torch.tensor(data.target)
    return train_test_split(x, y, test_size=0.25, random_state=0, stratify=data.target)


def draw(trace: torch.Tensor, path: Path) -> None:
    """Plot the relative residual of some samples per evaluation; a line is level once its sample has converged."""
    from matplotlib.figure import Figure

    axes = Figure(figsize=(6, 4), layout="constrained").subplots()
    axes.semilogy(range(1, len(trace) + 1), trace, linewidth=1)
    axes.axhline(STOP.rtol, color="black", linestyle="--", linewidth=1, label="tolerance")
    axes.set(xlabel="evaluations of f", ylabel="relative residual", title="Convergence on test digits, after training")
    axes.legend()
    axes.figure.savefig(path, dpi=150)


def main(epochs: int = 6, seed: int = 0, picture: Path = Path("multiscale.png")) -> float:
    """Train, draw the residuals, and return the accuracy on the test set."""
    torch.manual_seed(seed)
    x, test_x, y, test_y = digits()
    layer = Equilibrium(Scales(), stop=STOP, gradient=Implicit(stop=STOP))
    head, began = nn.Linear(TOKEN, 10), time.perf_counter()
    optimiser = torch.optim.Adam([*layer.parameters(), *head.parameters()])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, epochs=epochs, steps_per_epoch=-(-len(x) // 32))
    for epoch in range(1, epochs + 1):
        solves = []
        for rows in torch.randperm(len(x)).split(32):
            out = layer(x[rows], start=zeros(len(rows)))
            optimiser.zero_grad()
            cross_entropy(head(out.z["token"]), y[rows]).backward()
            optimiser.step()
            schedule.step()
            solves.append((out.solution, out.solution.adjoint[0]))
        with torch.no_grad():
            test = layer(test_x, start=zeros(len(test_x)))
            accuracy = (head(test.z["token"]).argmax(1) == test_y).float().mean().item()
        forward, backward = (sum(s.evals for s in way) / len(way) for way in zip(*solves, strict=True))
        converged = torch.cat([s.converged for pair in [*solves, (test.solution,)] for s in pair]).float().mean()
        cost = f"mean evaluations forward {forward:.1f}, backward {backward:.1f}, {time.perf_counter() - began:.0f} s"
        print(f"epoch {epoch}: test accuracy {accuracy:.1%} | {converged:.2%} of all solves converged | {cost}")
    draw(test.solution.trace[:, :16], picture)
    return accuracy


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, default=Path("multiscale.png"))
    main(**vars(parser.parse_args()))
