"""A user's whole model under torch.compile, and a layer under torch.utils.checkpoint: what they cost beside eager code.

The model is a linear layer, an equilibrium of a block or a language model, and a linear layer or a loss. It says how
many graphs are compiled, how long the first training step takes (with an empty cache on disk), and the time of later
steps relative to those of the eager model, interleaved with them: the median of the ratios. Times are processor times
of one thread, that of the C++ compiler included. For a checkpoint it counts the evaluations of f of one training step.

python benchmarks/compile.py [--steps N]   prints the tables, writes results/compile.json and its part of
                                           docs/howto/speed.md
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

# Before torch reads them: a first step compiles everything, in this process.
os.environ |= {"TORCHINDUCTOR_CACHE_DIR": tempfile.mkdtemp(), "TORCHINDUCTOR_COMPILE_THREADS": "1"}

import torch
from machine import publish
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from equilibria import Equilibrium, Implicit, Method, Stop
from equilibria.cells import TransformerConfig
from equilibria.lm.model import LanguageConfig

FIXED = Stop(rtol=0, atol=0, max_evals=12)
METHOD = Method(stop=FIXED, gradient=Implicit(stop=FIXED))
WIDTH = 128


class Block(nn.Module):
    """tanh(W z / 2 + U x)."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent, self.inject = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(0.5 * self.recurrent(z) + self.inject(x))


class Vision(nn.Module):
    """A model of vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 10)
        self.layer = Equilibrium(Block(), **vars(METHOD))

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.layer(torch.relu(self.before(x))).output).square().mean()

    def batch(self) -> Tensor:
        return torch.randn(256, WIDTH)


class Language(nn.Module):
    """A DEQ-Transformer in a user's model."""

    def __init__(self) -> None:
        super().__init__()
        cell = TransformerConfig(width=64, heads=4, inner=128, memory=0)
        self.model = LanguageConfig(cell=cell).build(500, method=METHOD)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens[:, :-1], tokens[:, 1:]).nll.mean()

    def batch(self) -> Tensor:
        return torch.randint(0, 500, (8, 65))


def processor_time() -> float:
    """Seconds of this process and of those that it has waited for."""
    return time.process_time() + sum(os.times()[2:4])


def timed(model: nn.Module, batch: Tensor) -> float:
    begin = processor_time()
    model.zero_grad()
    model(batch).backward()
    return processor_time() - begin


def compiled(kind: Callable[[], Any], backend: str, steps: int) -> dict[str, Any]:
    """Graphs, seconds of the first step, and the ratio of later steps."""
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    eager = kind()
    model: Any = torch.compile(copy.deepcopy(eager), backend=backend)
    batch = eager.batch()
    timed(eager, batch)
    first, _ = timed(model, batch), timed(model, batch)
    pairs = [(timed(model, batch), timed(eager, batch)) for _ in range(steps)]
    return {
        "model": kind.__name__,
        "backend": backend,
        "graphs": counters["stats"]["unique_graphs"],
        "first step, seconds": first,
        "later steps to eager": statistics.median(a / b for a, b in pairs),
    }


def checkpointed(how: bool | None) -> dict[str, Any]:
    """The evaluations of f in one training step with a checkpoint around the layer."""
    torch.manual_seed(0)
    model, evals = Vision(), [0]
    model.layer.cell.register_forward_pre_hook(lambda *_: evals.__setitem__(0, evals[0] + 1))
    x = model.batch().requires_grad_()

    def region(x: Tensor) -> Tensor:
        return model.layer(x).output

    value = region(x) if how is None else checkpoint(region, x, use_reentrant=how)
    value.square().mean().backward()
    names = {None: "none", False: "use_reentrant=False", True: "use_reentrant=True"}
    return {"checkpoint": names[how], "evaluations": evals[0]}


def text(rows: dict[str, Any]) -> str:
    """The two tables of the documentation."""
    lines = ["| model | backend | graphs | first step | later steps / eager ones |", "|---|---|---:|---:|---:|"]
    for row in rows["models"]:
        first, later = row["first step, seconds"], row["later steps to eager"]
        lines.append(f"| {row['model']} | {row['backend']} | {row['graphs']} | {first:.1f} s | {later:.2f} |")
    lines += ["", "| checkpoint around the layer | evaluations of f in a training step |", "|---|---:|"]
    lines += [f"| {row['checkpoint']} | {row['evaluations']} |" for row in rows["checkpoints"]]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=21, help="number of steps that are compared")
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    cases = [(kind, backend) for kind in (Vision, Language) for backend in ("eager", "inductor")]
    models = [compiled(kind, backend, steps) for kind, backend in cases]
    checkpoints = [checkpointed(how) for how in (None, False, True)]
    rows = {"models": models, "checkpoints": checkpoints}
    publish("compile", rows, text(rows), page="howto/speed")


if __name__ == "__main__":
    main()
