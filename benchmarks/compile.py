"""A user's whole model under torch.compile, and a layer under torch.utils.checkpoint: what they cost beside eager code.

The model is a linear layer, an equilibrium of a block or a language model, and a linear layer or a loss. "Without" is
the same model with the identity in place of the equilibrium, and "a break" has there the identity in a function that
torch.compile leaves out: what the library adds is the difference. Each row has a process and empty caches of its own.
There, an example of one operator, x.sin(), is compiled first: it pays what PyTorch does once (it asks the compiler what
the processor can do, and compiles PyTorch's own headers). Then comes the first training step of the model; a second
process with the same caches repeats it without the example. Later steps are interleaved with those of the eager model,
in random order: the medians of the ratios and of the differences. Times are processor times of one thread, that of the
C++ compiler included. For a checkpoint it counts the evaluations of f of one training step.

python benchmarks/compile.py [--steps N]   prints the tables, writes results/compile.json and its part of
                                           docs/howto/speed.md
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import torch
from machine import publish
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from equilibria import Equilibrium, Implicit, Method, Stop
from equilibria.cells import TransformerConfig
from equilibria.core.maps import FunctionMap
from equilibria.layers.equilibrium import Layer, LayerOutput
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


class Without(Layer):
    """The identity."""

    def forward(self, x: Tensor, *_: Any, **options: Any) -> LayerOutput:
        del options
        return LayerOutput(output=x, z=x, f=IDENTITY, solution=None)


class Break(Without):
    """The identity, which torch.compile leaves out."""

    @torch.compiler.disable
    def forward(self, x: Tensor, *_: Any, **options: Any) -> LayerOutput:
        return super().forward(x)


IDENTITY = FunctionMap(lambda z: z)
MODELS, INSTEAD = {kind.__name__: kind for kind in (Vision, Language)}, {"without": Without, "a break": Break}


def built(model: str, instead: str) -> Any:
    """The model, with another layer in place of its equilibrium unless ``instead`` is empty."""
    torch.manual_seed(0)
    whole = MODELS[model]()
    if instead:
        holder = whole if isinstance(whole, Vision) else whole.model
        holder.layer = INSTEAD[instead]()
    return whole


def processor_time() -> float:
    """Seconds of this process and of those that it has waited for."""
    return time.process_time() + sum(os.times()[2:4])


def timed(model: nn.Module, batch: Tensor) -> float:
    begin = processor_time()
    model.zero_grad()
    model(batch).backward()
    return processor_time() - begin


def example(backend: str) -> float:
    """Seconds of the first compilation of a process, of one operator and its gradient."""
    begin, x = processor_time(), torch.randn(8, requires_grad=True)
    torch.compile(lambda x: x.sin(), backend=backend)(x).sum().backward()
    return processor_time() - begin


def one(model: str, instead: str, backend: str, steps: int) -> dict[str, Any]:
    """Graphs and seconds of the first step, after the example; without ``steps`` there is neither it nor more."""
    eager = built(model, instead)
    batch, found = eager.batch(), {"example": example(backend)} if steps else {}
    compiled: Any = torch.compile(copy.deepcopy(eager), backend=backend)
    timed(eager, batch)
    counters.clear()
    found |= {"first": timed(compiled, batch), "graphs": counters["stats"]["unique_graphs"]}
    pairs = []
    for _ in range(steps):
        times = {}
        for which in random.sample((compiled, eager), 2):
            times[which is compiled] = timed(which, batch)
        pairs.append((times[True], times[False]))
    if pairs:
        found["ratio"] = statistics.median(a / b for a, b in pairs)
        found["added"] = statistics.median(a - b for a, b in pairs)
    return found


def in_processes(model: str, instead: str, backend: str, steps: int) -> dict[str, Any]:
    """One row: a process with empty caches, then one with what the first has left there."""
    with tempfile.TemporaryDirectory() as caches:
        own = {"TMPDIR": caches, "TORCHINDUCTOR_CACHE_DIR": f"{caches}/own", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        found = []
        for count in (steps, 0):
            case = json.dumps([model, instead, backend, count])
            command = [sys.executable, __file__, "--case", case]
            done = subprocess.run(command, env=os.environ | own, capture_output=True, text=True, check=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
    row = {"model": model, "instead": instead, "backend": backend, **found[0], "again": found[1]["first"]}
    print(row, flush=True)
    return row


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
    lines = [
        "| model | backend | graphs | x.sin(), once | first step | in the next process | later steps / eager | added |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows["models"]:
        name = ", ".join(filter(None, (row["model"], row["instead"])))
        seconds = " | ".join(f"{row[key]:.1f} s" for key in ("example", "first", "again"))
        later = f"{row['ratio']:.2f} | {1e3 * row['added']:.1f} ms"
        lines.append(f"| {name} | {row['backend']} | {row['graphs']} | {seconds} | {later} |")
    lines += ["", "| checkpoint around the layer | evaluations of f in a training step |", "|---|---:|"]
    lines += [f"| {row['checkpoint']} | {row['evaluations']} |" for row in rows["checkpoints"]]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=41, help="number of steps that are compared")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.case is not None:
        print(json.dumps(one(*json.loads(given.case))))
        return
    cases = [(model, instead, "inductor") for model in MODELS for instead in ("", *INSTEAD)]
    cases += [(model, "", "eager") for model in MODELS]
    models = [in_processes(*case, given.steps) for case in cases]
    checkpoints = [checkpointed(how) for how in (None, False, True)]
    rows = {"models": models, "checkpoints": checkpoints}
    publish("compile", rows, text(rows), page="howto/speed")


if __name__ == "__main__":
    main()
