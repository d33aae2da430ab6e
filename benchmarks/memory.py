"""Peak memory of one training step against depth: the equilibrium beside the same cell unrolled.

The cell is that of the recipe `tiny` (width 128, 4 heads, inner 512, batch 8 × 64, memory 64). The equilibrium runs a
fixed number of evaluations forward and backward, so that the flat line is a property of the code, not of convergence.

python benchmarks/memory.py          prints the table, writes results/memory.json and docs/pictures/memory.png
"""

from __future__ import annotations

import dataclasses

import torch
from machine import PICTURES, keep

from equilibria import Anderson, Implicit, Method, Picard, Stop, Unroll
from equilibria.lm.recipes import RECIPES
from equilibria.peak_memory import PeakMemory

DEPTHS = (2, 4, 8, 16, 32, 64)


def peak(method: Method) -> int:
    """Bytes of one training step: forward, backward, on random tokens."""
    torch.manual_seed(0)
    experiment = RECIPES["tiny"]()
    model = experiment.model.build(100, method=method)
    tokens = torch.randint(100, (experiment.training.batches.batch_size, experiment.training.batches.segment_length))
    with torch.no_grad():
        memory = model(tokens, tokens).memory
    model(tokens, tokens, memory).nll.mean().backward()  # the gradients themselves are there from now on
    with PeakMemory() as measured:
        model(tokens, tokens, memory).nll.mean().backward()
    return measured.peak


def rows() -> list[dict[str, object]]:
    """One row per network and depth."""
    found: list[dict[str, object]] = []
    for depth in DEPTHS:
        fixed = Stop(rtol=0, atol=0, max_evals=depth, best=False)
        solver = Anderson()
        unrolled = dataclasses.replace(fixed, max_evals=depth + 1)
        found += [
            {"network": network, "depth": depth, "bytes": peak(method)}
            for network, method in (
                ("equilibrium", Method(solver, fixed, Implicit(solver, fixed))),
                ("unrolled", Method(Picard(), unrolled, Unroll())),
                ("unrolled, checkpointed", Method(Picard(), unrolled, Unroll(checkpoint=True))),
            )
        ]
    return found


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
    table = rows()
    for row in table:
        print(f"{row['network']:<24} depth {row['depth']:>3}   {row['bytes'] / 2**20:8.1f} MiB")
    print(keep("memory", table))
    plot(table)
