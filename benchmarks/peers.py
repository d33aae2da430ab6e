"""A whole training step beside the same model written on torchdeq 0.1.0 (``get_deq``): time, memory, evaluations.

pip install --no-deps torchdeq==0.1.0
python benchmarks/peers.py           prints the table, writes results/peers.json and its part of docs/reproducing.md

Embedding, cell, head, loss, tolerance (relative, 1e-3) and gradient rule (implicit) are the same, the rounds are
interleaved. torchdeq has its own stopping test, over the whole batch, and its defaults where a number is not given.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from typing import Any

import torch
from block import Counted
from machine import publish
from torch import Tensor, nn
from torchdeq import get_deq

from equilibria import Anderson, Broyden, Cell, Implicit, Solver, Stop
from equilibria.cells import TransformerShape
from equilibria.equilibrium import LayerOutput
from equilibria.language import LanguageModel, LanguageShape
from equilibria.recipes import RECIPES
from equilibria.training import PeakMemory

RTOL, LIMIT = 1e-3, 60
SOLVERS: dict[str, Solver] = {"anderson": Anderson(window=6), "broyden": Broyden(memory=20)}


class Peer(nn.Module):
    """The layer as a user of torchdeq writes it."""

    def __init__(self, cell: Cell, solver: str) -> None:
        super().__init__()
        self.cell = cell
        numbers = {"max_iter": LIMIT, "tol": RTOL, "stop_mode": "rel", "solver": solver}
        both = {f"{way}_{name}": value for way in ("f", "b") for name, value in numbers.items()}
        self.deq = get_deq(core="indexing", ift=True, **both)

    def forward(self, x: Tensor, memory: Any = None) -> LayerOutput:
        """The equilibrium by torchdeq."""
        context = self.cell.prepare(x, memory)

        def f(z: Tensor) -> Tensor:
            return self.cell(z, context)

        z = self.deq(f, self.cell.start(context))[0][0]
        return LayerOutput(z=z, memory=self.cell.remember(z, context), f=f, solution=None, output=self.cell.output(z))


@dataclasses.dataclass(frozen=True)
class Setting:
    """A model and its batch."""

    name: str
    shape: LanguageShape
    words: int
    batch: int
    length: int


def settings() -> list[Setting]:
    """The model of the recipe `tiny`, and a word-level one of width 512."""
    tiny, ptb = RECIPES["tiny"](), RECIPES["ptb"]()
    wide = TransformerShape(width=512, heads=8, inner=2_048, memory=64, positions="decay")
    return [
        Setting("`tiny`, width 128", tiny.model, 103, tiny.training.batch_size, tiny.training.segment_length),
        Setting("words, width 512", dataclasses.replace(ptb.model, cell=wide, dropout=0.0), 10_000, 8, 64),
    ]


def step(model: LanguageModel, tokens: Tensor, memory: Any) -> None:
    """Forward and backward."""
    model(tokens, tokens.roll(-1, 1), memory).nats.mean().backward()


def measure(rounds: int) -> list[dict[str, Any]]:
    """A row a model and solver."""
    rows = []
    for setting in settings():
        for name, solver in SOLVERS.items():
            stop = Stop(rtol=RTOL, atol=0, max_evals=LIMIT)
            torch.manual_seed(0)
            parts = {"solver": solver, "stop": stop, "gradient": Implicit(solver, stop)}
            mine = setting.shape.build(setting.words, **parts).train()
            peer = LanguageModel(mine.embedding, Peer(mine.layer.cell, name), mine.head).train()  # the same weights
            tokens = torch.randint(setting.words, (setting.batch, setting.length))
            with torch.no_grad():
                memory = mine(tokens, tokens).memory
            row: dict[str, Any] = {"model": setting.name, "solver": name}
            for who, model in (("ours", mine), ("theirs", peer)):
                cell = mine.layer.cell
                forward = Counted(cell.forward)
                cell.forward = forward
                step(model, tokens, memory)
                with PeakMemory() as peak:
                    step(model, tokens, memory)
                row[who] = {"calls": forward.calls / 2, "mib": peak.peak / 2**20, "seconds": []}
                cell.forward = forward.f
            for _ in range(rounds):
                for who, model in (("ours", mine), ("theirs", peer)):
                    began = time.perf_counter()
                    step(model, tokens, memory)
                    row[who]["seconds"].append(time.perf_counter() - began)
            for who in ("ours", "theirs"):
                row[who]["seconds"] = statistics.median(row[who]["seconds"])
            row["ratio"] = row["ours"]["seconds"] / row["theirs"]["seconds"]
            print(row, flush=True)
            rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """For the documentation."""
    lines = [
        "| model | solver | training step | torchdeq's | ratio | calls of f | torchdeq's | memory of a step "
        "| torchdeq's |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row['model']} | {row['solver']} | {row['ours']['seconds']:.2f} s | {row['theirs']['seconds']:.2f} s "
        f"| {row['ratio']:.2f} | {row['ours']['calls']:.0f} | {row['theirs']['calls']:.0f} "
        f"| {row['ours']['mib']:.0f} MiB | {row['theirs']['mib']:.0f} MiB |"
        for row in rows
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    measured = measure(parser.parse_args().rounds)
    publish("peers", measured, table(measured))
