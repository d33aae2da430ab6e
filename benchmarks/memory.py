"""Peak memory of one training step against depth: the equilibrium beside the same cell unrolled.

The cell is that of the recipe `tiny` (width 128, 4 heads, inner 512, batch 8 × 64, memory 64). The equilibrium runs a
fixed number of evaluations forward and backward, so that the flat line is a property of the code, not of convergence.

python benchmarks/memory.py          prints the table, writes results/memory.json and docs/pictures/memory.png
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
from machine import PICTURES, keep

from equilibria import Anderson, Implicit, Method, Picard, Stop, Unroll
from equilibria.lm.recipes import RECIPES
from equilibria.peak_memory import PeakMemory

DEPTHS = (2, 4, 8, 16, 32, 64)


class Work:
    """A training step, forward and backward, of a recipe's model on random tokens.

    Args:
        recipe: the name of the recipe.
        batch: streams; None for those of the recipe.
        length: positions of a segment; None for those of the recipe.
        words: size of the vocabulary.
        device: where it runs.
    """

    def __init__(
        self,
        recipe: str = "tiny",
        *,
        batch: int | None = None,
        length: int | None = None,
        words: int = 100,
        device: torch.device | str = "cpu",
    ) -> None:
        torch.manual_seed(0)
        experiment = RECIPES[recipe]()
        batches = experiment.training.batches
        self.device = torch.device(device)
        self.model = experiment.model.build(words).to(device)
        shape = (batch or batches.batch_size, length or batches.segment_length)
        self.tokens = torch.randint(words, shape).to(device)

    def step(self, method: Method) -> Callable[[], None]:
        """Forward and backward, with the memory of a segment before."""
        with torch.no_grad():
            memory = self.model(self.tokens, self.tokens, method=method).memory

        def step() -> None:
            self.model(self.tokens, self.tokens, memory, method=method).nll.mean().backward()

        return step

    def peak(self, method: Method) -> int:
        """Bytes of one step, above what the model, its gradients and the memory need."""
        step = self.step(method)
        step()  # the gradients themselves are there from now on
        with PeakMemory(self.device) as measured:
            step()
        return measured.peak


def peak(method: Method) -> int:
    """Bytes of one training step of the recipe `tiny`."""
    return Work().peak(method)


def methods(depth: int) -> dict[str, Method]:
    """The networks by name, each with so many evaluations."""
    fixed = Stop(rtol=0, atol=0, max_evals=depth, best=False)
    solver = Anderson()
    unrolled = dataclasses.replace(fixed, max_evals=depth + 1)
    return {
        "equilibrium": Method(solver, fixed, Implicit(solver, fixed)),
        "unrolled": Method(Picard(), unrolled, Unroll()),
        "unrolled, checkpointed": Method(Picard(), unrolled, Unroll(checkpoint=True)),
    }


def rows(depths: Sequence[int] = DEPTHS) -> Iterator[dict[str, object]]:
    """One row per network and depth."""
    for depth in depths:
        for network, method in methods(depth).items():
            yield {"network": network, "depth": depth, "bytes": peak(method)}


def plot(found: list[dict[str, object]]) -> None:
    """Memory against depth."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for network, style in (("unrolled", "C1o-"), ("unrolled, checkpointed", "C7s--"), ("equilibrium", "C0o-")):
        points = [(row["depth"], row["bytes"] / 2**20) for row in found if row["network"] == network]
        axes.plot(*zip(*points, strict=True), style, label=network)
    axes.set(
        xlabel="evaluations of the cell",
        ylabel="peak memory of a training step (MiB)",
        xscale="log",
        xticks=DEPTHS,
        xticklabels=DEPTHS,
        ylim=(0, None),
    )
    axes.minorticks_off()
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(PICTURES / "memory.png", dpi=160)


if __name__ == "__main__":
    table = list(rows())
    for row in table:
        print(f"{row['network']:<24} depth {row['depth']:>3}   {row['bytes'] / 2**20:8.1f} MiB")
    print(keep("memory", table))
    plot(table)
