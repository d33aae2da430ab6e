"""Memory and communication of a training step on many GPUs: an equilibrium beside explicit networks of the same cell.

python benchmarks/scaling.py         prints the tables, writes results/scaling.json and its part of
    docs/evidence/scaling.md

Measured: the bytes that two ranks exchange in a step (gloo, small cell), and the memory of a step of one device (the
layer of `wikitext103-v2`, rows of 150 words with a memory of 150). Computed from these, by the formulas of
docs/evidence/scaling.md: memory and traffic of a GPU among 1 to 512.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from machine import publish
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from equilibria import Anderson, Equilibrium, Implicit, Stop
from equilibria.cells import TransformerCell, TransformerConfig
from equilibria.layers.explicit import Stack, Unrolled
from equilibria.lm.ranks import Ranks
from equilibria.lm.recipes import RECIPES
from equilibria.peak_memory import PeakMemory

GIB = 2**30
LAYERS = 18
"""Of the explicit network, as of the Transformer-XL that the paper compares with."""
ROWS = 8
"""Of each GPU."""
RANKS = (1, 8, 64, 512)
SMALL = TransformerConfig(width=64, heads=4, inner=256, memory=0)


class Model(nn.Module):
    """A layer alone, as the paper counts it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """The output."""
        return self.layer(x).output


class Traffic(TorchDispatchMode):
    """Bytes of the largest tensor of every collective, by its kind."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            name = func.name().split("::")[1].strip("_").split(".")[0]
            size = max((tensor.nbytes for tensor in tensors), default=0)
            self.bytes[name] = self.bytes.get(name, 0) + size
        return func(*args, **(kwargs or {}))


def small_layers() -> dict[str, nn.Module]:
    """Networks of one small cell."""
    torch.manual_seed(0)
    solver, stop = Anderson(), Stop(rtol=1e-2, max_evals=30)
    cells = [TransformerCell(SMALL) for _ in range(LAYERS + 2)]
    return {
        "equilibrium": Equilibrium(cells[0], solver, stop, Implicit(solver, stop)),
        f"{LAYERS} layers, tied": Unrolled(cells[1], LAYERS),
        f"{LAYERS} layers, untied": Stack(cells[2:]),
    }


def worker(rank: int, store: str, results: Any, kind: str) -> None:
    """One of two ranks: the bytes of a step of each network, in units of the weights of one cell."""
    torch.set_num_threads(1)
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if kind == "cuda" else "gloo", init_method=f"file://{store}", rank=rank, world_size=2
    )
    found: list[dict[str, Any]] = []
    for parallel in ("ddp", "fsdp"):
        for name, layer in small_layers().items():
            unit = sum(p.nbytes for p in TransformerCell(SMALL).parameters())
            model = Model(layer.to(device))
            replica = Ranks(rank=rank, size=2, parallel=parallel).spread(model, bfloat16=False)
            x = torch.randn(4, 16, SMALL.width, device=device, requires_grad=True)
            reduced = [0]
            if parallel == "ddp":
                replica.register_comm_hook(reduced, counting)
            with Traffic() as traffic:
                replica(x).square().mean().backward()
            gathered = sum(size for kind, size in traffic.bytes.items() if "gather" in kind)
            scattered = sum(size for kind, size in traffic.bytes.items() if "reduce_scatter" in kind)
            row = {"parallel": parallel, "network": name, "gathered": gathered / unit}
            found.append(row | {"reduced": (scattered + reduced[0]) / unit, "kinds": sorted(traffic.bytes)})
    if rank == 0:
        results.put(found)
    dist.barrier()
    dist.destroy_process_group()


def counting(total, bucket):  # PyTorch looks at the annotations, and takes no text for them
    """DDP's own sum of gradients, counted."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    total[0] += bucket.buffer().nbytes
    return allreduce_hook(None, bucket)  # pyright: ignore


def exchanged(kind: str = "cpu") -> list[dict[str, Any]]:
    """What two ranks exchange: two processes by gloo, or two GPUs by NCCL ("cuda")."""
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        job = torch.multiprocessing.spawn(worker, (str(Path(folder) / "store"), results, kind), nprocs=2, join=False)
        while not job.join(timeout=1) and results.empty():
            pass  # an error in a worker is raised here
        found = results.get(timeout=10)
        while not job.join():
            pass
    return found


def single_device() -> dict[str, float]:
    """Bytes on one device: weights of the cell, and what a step needs, divided into a fixed part and one per row."""
    experiment = RECIPES["wikitext103-v2"]()
    config, method = experiment.model.cell, experiment.stages[-1].method
    torch.manual_seed(0)
    cell = config.build()
    short = Stop(rtol=0, atol=0, max_evals=8, best=False)  # the memory of a solver's window is there after so many
    layer = Equilibrium(cell, method.solver, short, Implicit(method.gradient.solver, short))
    networks = {"equilibrium": layer, "two": Unrolled(cell, 2), "four": Unrolled(cell, 4)}
    found = {}
    for rows in (1, 2):
        x = torch.randn(rows, experiment.training.batches.segment_length, config.width)
        memory = layer(x).memory
        found |= {(name, rows): peak(network, x, memory) for name, network in networks.items()}
    row = found["equilibrium", 2] - found["equilibrium", 1]
    return {
        "weights": float(sum(p.nbytes for p in cell.parameters())),
        "fixed": found["equilibrium", 1] - row,
        "row": row,
        "layer row": (found["four", 2] - found["two", 2] - found["four", 1] + found["two", 1]) / 2,
    }


def peak(layer: nn.Module, x: Tensor, memory: Any) -> float:
    """Of one step, gradients of the weights not counted."""
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with PeakMemory() as found:
        layer(x, memory).output.square().mean().backward()
    return float(found.peak)


def computed(measured: dict[str, float]) -> list[dict[str, Any]]:
    """Memory and traffic of one GPU, in GiB; the formulas stand in docs/evidence/scaling.md."""
    rows = []
    weights = measured["weights"]
    for ranks in RANKS:
        part = (ranks - 1) / ranks
        for name, cells, activations in (
            ("equilibrium", 1, ROWS * measured["row"]),
            (f"{LAYERS} layers, untied", LAYERS, ROWS * LAYERS * measured["layer row"]),
        ):
            ddp = {"memory": 4 * cells * weights, "traffic": 2 * part * cells * weights}
            sharded = 4 * cells * weights / ranks + (2 * weights if ranks > 1 else 0)
            passes = 2 if cells == 1 else 3  # gathered once for both directions, or once for each
            fsdp = {"memory": sharded, "traffic": passes * part * cells * weights}
            for parallel, values in (("ddp", ddp), ("fsdp", fsdp)):
                memory = values["memory"] + measured["fixed"] + activations
                row = {"ranks": ranks, "network": name, "parallel": parallel, "memory_gib": memory / GIB}
                rows.append(row | {"traffic_gib": values["traffic"] / GIB})
    return rows


def text_of(found: list[dict[str, Any]], measured: dict[str, float], rows: list[dict[str, Any]]) -> str:
    """For the documentation."""
    lines = ["| two ranks, measured | weights gathered | gradients summed |", "|---|---:|---:|"]
    lines += [
        f"| {row['network']}, {row['parallel'].upper()} | {row['gathered']:.2f} | {row['reduced']:.2f} |"
        for row in found
    ]
    lines += ["", "| one device, measured | MiB |", "|---|---:|"]
    for name, key in (
        ("weights of the cell", "weights"),
        ("step of the equilibrium, beside weights and gradients: fixed", "fixed"),
        ("per sample, more", "row"),
        ("per sample and layer of an explicit network, more", "layer row"),
    ):
        lines.append(f"| {name} | {measured[key] / 2**20:,.0f} |")
    heads = " | ".join(f"{ranks} GPU{'s' if ranks > 1 else ''}" for ranks in RANKS)
    lines += [
        "",
        f"| computed, {ROWS} samples per GPU: memory, traffic per step in GiB | {heads} |",
        "|---|" + "---:|" * len(RANKS),
    ]
    for network, parallel in dict.fromkeys((row["network"], row["parallel"]) for row in rows):
        cells = [
            f"{row['memory_gib']:.1f}, {row['traffic_gib']:.2f}"
            for row in rows
            if (row["network"], row["parallel"]) == (network, parallel)
        ]
        lines.append(f"| {network}, {parallel.upper()} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    traffic, device = exchanged(), single_device()
    table = computed(device)
    publish(
        "scaling",
        {"exchanged": traffic, "device": device, "computed": table},
        text_of(traffic, device, table),
        "evidence/scaling",
    )
