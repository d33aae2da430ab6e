r"""A whole training step beside the same model written on torchdeq 0.1.0 (``get_deq``): time, memory, evaluations.

pip install --no-deps torchdeq==0.1.0
equilibria train ptb --data FOLDER --out ptb --stages.0.steps 400 --stages.1.steps 250
equilibria train ptb --data FOLDER --out wide --model.cell.width 512 --model.cell.heads 8 --model.cell.inner 2048 \
    --training.batch-size 8 --stages.0.steps 200 --stages.1.steps 60
python benchmarks/peers.py tiny ptb wide --data FOLDER          (`tiny` is the model that comes with the library)
    prints the table, writes results/peers.json, docs/pictures/peers.png and its part of docs/evidence/reproducing.md

Weights (of those runs), embedding, cell, head, loss, masks, tolerance (relative, 1e-3) and gradient rule (implicit) are
the same, the rounds are interleaved. torchdeq has its own stopping test, over the whole batch, and its defaults where a
number is not given.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from block import Counted
from device import seconds
from machine import PICTURES, publish
from matplotlib.figure import Figure
from torch import Tensor
from torchdeq import get_deq

from equilibria import Anderson, Broyden, Cell, Implicit, Layer, LayerOutput, Method, Solver, Stop
from equilibria.core.maps import as_map
from equilibria.layers.equilibrium import check_no_method
from equilibria.lm.corpora import Segment, Segments, Stream
from equilibria.lm.device import device_of, to
from equilibria.lm.model import LanguageModel
from equilibria.lm.model.modes import eval_mode
from equilibria.lm.runs.trained import Trained, load
from equilibria.peak_memory import PeakMemory

RTOL, LIMIT = 1e-3, 60
SOLVERS: dict[str, Solver] = {"anderson": Anderson(window=6), "broyden": Broyden(rank=20)}


class Peer(Layer):
    """The layer as a user of torchdeq writes it."""

    def __init__(self, cell: Cell, solver: str) -> None:
        super().__init__()
        self.cell = cell
        numbers = {"max_iter": LIMIT, "tol": RTOL, "stop_mode": "rel", "solver": solver}
        both = {f"{way}_{name}": value for way in ("f", "b") for name, value in numbers.items()}
        self.deq = get_deq(core="indexing", ift=True, **both)

    def forward(self, *inputs: Any, method: Method | None = None, **options: Any) -> LayerOutput:
        """The equilibrium by torchdeq."""
        check_no_method(self, method)
        prepared = self.cell.prepare(*inputs, **options)

        def f(z: Tensor) -> Tensor:
            return self.cell(z, prepared)

        z = self.deq(f, self.cell.start(prepared))[0][0]
        memory = self.cell.remember(z, prepared)
        return LayerOutput(output=self.cell.output(z), z=z, f=as_map(f), solution=None, memory=memory)


def step(model: LanguageModel, segment: Segment, memory: Any) -> float:
    """Seconds of a forward and a backward pass, with the same masks whoever computes."""
    torch.manual_seed(0)
    return seconds(lambda: model(segment.tokens, segment.targets, memory).nll.mean().backward(), device_of(model))


def measure(runs: list[Path], data: Path, rounds: int) -> list[dict[str, Any]]:
    """One row per run and solver."""
    rows = []
    for run in runs:
        loaded = load(run, data=None if run.name == "tiny" else data)
        for name in SOLVERS:
            rows.append({"model": run.name, **compare(loaded, name, loaded.corpus.train, rounds)})
            print(rows[-1], flush=True)
    return rows


def compare(loaded: Trained, name: str, stream: Stream, rounds: int, batch: int | None = None) -> dict[str, Any]:
    """One row: the second segment of a text, with the memory of the first, on the device of the model.

    Args:
        loaded: a trained model.
        name: the solver, as torchdeq calls it.
        stream: the text.
        rounds: times that each is timed.
        batch: streams; None for those of the training.
    """
    training, device = loaded.experiment.training.batches, device_of(loaded.model)
    segments = Segments(stream, batch_size=batch or training.batch_size, length=training.segment_length)
    first, segment = (to(segments.at(index), device) for index in (0, 1))
    with eval_mode(loaded.model):
        memory = loaded.model(first.tokens, first.targets).memory
    stop = Stop(rtol=RTOL, atol=0, max_evals=LIMIT)
    method = Method(SOLVERS[name], stop, Implicit(SOLVERS[name], stop))
    mine = loaded.experiment.model.build(loaded.model.vocabulary_size, method=method).to(device).train()
    mine.load_state_dict(loaded.model.state_dict())
    cell = mine.layer.cell
    peer = LanguageModel(mine.embedding, Peer(cell, name), mine.head).train()  # the same weights
    models = {"ours": mine, "theirs": peer}
    row: dict[str, Any] = {"width": loaded.experiment.model.cell.width, "solver": name}
    gradients: dict[str, Tensor] = {}
    for who, model in models.items():
        forward, products = Counted(cell.forward), Counted(torch.autograd.grad)
        cell.forward, torch.autograd.grad = forward, products
        step(model, segment, memory)
        cell.forward, torch.autograd.grad = forward.f, products.f
        mine.zero_grad(set_to_none=False)
        with PeakMemory(device) as peak:
            step(model, segment, memory)
        row[who] = {"calls": forward.calls, "products": products.calls, "mib": peak.peak / 2**20, "seconds": []}
        gradients[who] = torch.cat([p.grad.flatten() for p in mine.parameters() if p.grad is not None])
        mine.zero_grad(set_to_none=False)
    row["difference"] = float((gradients["ours"] - gradients["theirs"]).norm() / gradients["ours"].norm())
    for _ in range(rounds):
        for who, model in models.items():
            row[who]["seconds"].append(step(model, segment, memory))
    for who in models:
        row[who]["seconds"] = statistics.median(row[who]["seconds"])
    row["ratio"] = row["ours"]["seconds"] / row["theirs"]["seconds"]
    return row


def draw(rows: list[dict[str, Any]]) -> Path:
    """Two bars per row: seconds of a training step."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    places = range(len(rows))
    for who, name, shift, colour in (("theirs", "torchdeq 0.1.0", 0.2, "C7"), ("ours", "equilibria", -0.2, "C0")):
        shares = [row[who]["seconds"] / row["theirs"]["seconds"] for row in rows]
        bars = axes.barh([place + shift for place in places], shares, height=0.38, color=colour, label=name)
        axes.bar_label(bars, [f"{row[who]['seconds']:.2f} s" for row in rows], padding=3, fontsize=8)
    axes.set_yticks(list(places), [f"{row['model']}, width {row['width']}\n{row['solver'].title()}" for row in rows])
    axes.set(xlabel="time of a training step, relative to torchdeq's", xlim=(0, 1.18))
    axes.invert_yaxis()
    axes.legend(loc="upper center", bbox_to_anchor=(0.4, 1.13), ncols=2, frameon=False)
    path = PICTURES / "peers.png"
    figure.savefig(path, dpi=120)
    return path


def table(rows: list[dict[str, Any]]) -> str:
    """For the documentation."""
    lines = [
        "| model | solver | training step | torchdeq's | ratio | calls of f + VJPs | torchdeq's | memory of a step "
        "| torchdeq's | difference of the gradients |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        mine, other = row["ours"], row["theirs"]
        lines.append(
            f"| `{row['model']}`, width {row['width']} | {row['solver']} | {mine['seconds']:.2f} s "
            f"| {other['seconds']:.2f} s | {row['ratio']:.2f} | {mine['calls']} + {mine['products']} "
            f"| {other['calls']} + {other['products']} | {mine['mib']:.0f} MiB | {other['mib']:.0f} MiB "
            f"| {row['difference']:.1%} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    measured = measure(given.runs, given.data, given.rounds)
    print(draw(measured))
    publish("peers", measured, table(measured))
