"""Fused attention beside the exact form: time of f, of a VJP and of a training step, and the step's peak memory.

python benchmarks/attention.py             prints the table, writes results/attention.json and its part of
    docs/evidence/measured.md
    --rounds 5                             repetitions of each measurement
    --only copying                         the sizes whose name contains this; nothing is written

One thread, and the time of the process. The two forms have the same parameters and take turns, and each ratio is the
median over the rounds of fused / exact. A step is a forward and a backward solve of four evaluations each, with the
gradients of all parameters. The load of the machine at the beginning and the end of each row stands in the file.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from device import seconds
from machine import publish
from torch import Tensor

from equilibria import Anderson, Equilibrium, Implicit, Stop
from equilibria.cells import TransformerConfig
from equilibria.cells.transformer.fused import Form
from equilibria.peak_memory import PeakMemory

FORMS: tuple[Form, ...] = ("exact", "fused")


@dataclasses.dataclass(frozen=True)
class Size:
    """One row of the table."""

    batch: int
    time: int
    cell: TransformerConfig

    @property
    def words(self) -> str:
        """For the table."""
        cell = self.cell
        return f"{self.batch} × {self.time}, memory {cell.memory}, width {cell.width}, {cell.heads} heads"


COPYING = TransformerConfig(width=32, heads=4, inner=76, memory=0)
LONG = TransformerConfig(width=128, heads=4, inner=512, memory=0, window=1024)
SIZES = {
    "copying-400": Size(32, 420, COPYING),
    "copying-400, decay": Size(32, 420, dataclasses.replace(COPYING, positions="decay")),
    "copying-400, rotary": Size(32, 420, dataclasses.replace(COPYING, positions="rotary")),
    "copying": Size(32, 120, COPYING),
    "1024 positions, narrow": Size(8, 1024, dataclasses.replace(COPYING, window=1024)),
    "1024 positions": Size(4, 1024, LONG),
    "1024 positions, decay": Size(4, 1024, dataclasses.replace(LONG, positions="decay")),
    "1024 positions, rotary": Size(4, 1024, dataclasses.replace(LONG, positions="rotary")),
    "512 positions with memory": Size(4, 512, dataclasses.replace(LONG, memory=512)),
    "tiny": Size(8, 64, TransformerConfig(memory=64)),
    "ptb": Size(16, 70, TransformerConfig(width=200, heads=4, inner=800, memory=70, positions="decay")),
    "ptb, rotary": Size(16, 70, TransformerConfig(width=200, heads=4, inner=800, memory=70, positions="rotary")),
}


class Measured:
    """One form of one size: what can be timed."""

    def __init__(self, size: Size, form: Form, device: torch.device) -> None:
        torch.manual_seed(0)
        cell = dataclasses.replace(size.cell, attention=form).build().to(device)
        self.x = torch.randn(size.batch, size.time, size.cell.width).to(device)
        fixed = Stop(rtol=0, atol=0, max_evals=4, best=False)
        self.layer = Equilibrium(cell, Anderson(), fixed, Implicit(Anderson(), fixed))
        with torch.no_grad():
            self.memory = cell.remember(self.x, cell.prepare(self.x))
            self.values = cell.prepare(self.x, self.memory)
        self.z = torch.randn_like(self.x).requires_grad_()
        self.fz = cell(self.z, cell.prepare(self.x, self.memory))
        self.cell = cell

    def f(self) -> Tensor:
        """One evaluation without a graph."""
        with torch.no_grad():
            return self.cell(self.z, self.values)

    def vjp(self) -> Tensor:
        """One product of the adjoint solve."""
        return torch.autograd.grad(self.fz, self.z, self.x, retain_graph=True)[0]

    def step(self) -> Tensor:
        """Forward solve, adjoint solve and gradients."""
        z = self.layer(self.x, self.memory).z
        z.square().sum().backward()
        return z.detach()

    def peak(self) -> int:
        """Bytes of a step."""
        with PeakMemory(self.x.device) as measured:
            self.step()
        return measured.peak


def timed(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds: on a CPU of this process, which other processes of a busy machine do not lengthen much."""
    if device.type == "cuda":
        return seconds(call, device)
    began = time.process_time()
    call()
    return time.process_time() - began


def measure(name: str, size: Size, rounds: int, device: torch.device) -> dict[str, Any]:
    """One row."""
    row: dict[str, Any] = {"name": name, "size": size.words, "positions": size.cell.positions, "load": os.getloadavg()}
    forms = {form: Measured(size, form, device) for form in FORMS}
    row["difference"] = float((forms["fused"].f() - forms["exact"].f()).norm() / forms["exact"].f().norm())
    for what in ("f", "vjp", "step"):
        for form in FORMS:
            getattr(forms[form], what)()  # once before anything is timed
        pairs = [{form: timed(getattr(forms[form], what), device) for form in FORMS} for _ in range(rounds)]
        row |= {f"{what}, {form}": statistics.median(pair[form] for pair in pairs) for form in FORMS}
        row[f"{what}, ratio"] = statistics.median(pair["fused"] / pair["exact"] for pair in pairs)
    row |= {f"bytes, {form}": forms[form].peak() for form in FORMS}
    row["auto"] = "fused" if is_fused(size, device) else "exact"
    row["bytes, ratio"] = row["bytes, fused"] / row["bytes, exact"]
    row["load after"] = os.getloadavg()
    print(row, flush=True)
    return row


def is_fused(size: Size, device: torch.device) -> bool:
    """True if ``attention="auto"`` takes the fused form for this size."""
    cell = dataclasses.replace(size.cell, attention="auto").build().to(device)
    x = torch.zeros(size.batch, size.time, size.cell.width, device=device)
    return cell.prepare(x, cell.remember(x, cell.prepare(x))).shared.attention.fused is not None


def table(rows: list[dict[str, Any]]) -> str:
    """For the documentation."""
    lines = [
        "| | positions | f, exact | fused | ratio | VJP, ratio | step, exact | fused | ratio | memory of a step, exact "
        "| fused | ratio | auto |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        f, step = ([1e3 * row[f"{what}, {form}"] for form in FORMS] for what in ("f", "step"))
        size = [row[f"bytes, {form}"] / 2**20 for form in FORMS]
        lines.append(
            f"| {row['name']}: {row['size']} | {row['positions']} | {f[0]:.0f} ms | {f[1]:.0f} ms "
            f"| {row['f, ratio']:.2f} | {row['vjp, ratio']:.2f} | {step[0]:.0f} ms | {step[1]:.0f} ms "
            f"| {row['step, ratio']:.2f} | {size[0]:.0f} MiB | {size[1]:.0f} MiB | {row['bytes, ratio']:.2f} "
            f"| {row['auto']} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="")
    given = parser.parse_args()
    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    found = [measure(name, size, given.rounds, cpu) for name, size in SIZES.items() if given.only in name]
    if given.only:
        print(table(found))
    else:
        publish("attention", found, table(found), page="evidence/measured")
