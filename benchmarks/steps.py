"""Networks side by side: memory and time of a training step and of inference, on one segment, interleaved."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Collection
from typing import Any

import torch
from device import seconds
from torch import Tensor

from equilibria.layers.equilibrium import LayerOutput
from equilibria.lm.corpora import Segment
from equilibria.lm.model import LanguageModel, LanguageOutput
from equilibria.lm.model.modes import eval_mode
from equilibria.peak_memory import PeakMemory

MIB = 2**20


def compare(
    models: dict[str, LanguageModel],
    segment: Segment,
    past: Callable[[LanguageModel], Any],
    *,
    base: str,
    repeats: int,
    warm: Collection[str] = (),
) -> list[dict[str, Any]]:
    """One row per model, with its shares of what ``base`` needs.

    Args:
        models: by name.
        segment: what all of them read.
        past: gives each the memory of a segment before.
        base: the name of the model to which ratios and shares are.
        repeats: times that each is timed.
        warm: names of the models whose solves start from that memory.
    """
    calls = {name: _Call(model, segment, past(model), name in warm) for name, model in models.items()}
    rows = [_needs(name, call) for name, call in calls.items()]
    for repeat in range(repeats):
        for row, call in zip(rows, calls.values(), strict=True):
            _time_once(row, call, seed=repeat)
    first = next(row for row in rows if row["network"] == base)
    for row in rows:
        for kind in ("train_seconds", "inference_seconds"):
            row[kind] = statistics.median(row[kind])
    for row in rows:
        row |= {f"{kind}_share": row[f"{kind}_mib"] / first[f"{kind}_mib"] for kind in ("step", "layer")}
        row |= {f"{kind}_ratio": row[f"{kind}_seconds"] / first[f"{kind}_seconds"] for kind in ("train", "inference")}
    return rows


@dataclasses.dataclass(frozen=True)
class _Call:
    """A model, and what it is called with."""

    model: LanguageModel
    segment: Segment
    memory: Any
    warm: bool

    @property
    def device(self) -> torch.device:
        """Where it runs: where the segment is."""
        return self.segment.tokens.device

    def forward(self) -> LanguageOutput:
        """The nats of the segment."""
        return self.model(self.segment.tokens, self.segment.targets, self.memory, warm=self.warm)

    def training_step(self) -> LanguageOutput:
        """Forward and backward, with the loss of the training."""
        output = self.forward()
        loss = output.nll.mean()
        (loss if output.extra is None else loss + output.extra).backward()
        return output

    def layer_step(self, x: Tensor) -> LayerOutput:
        """The same of the layer alone, as the paper leaves embeddings out."""
        out = self.model.layer(x, self.memory, warm=self.warm)
        (out.output / out.output.numel()).sum().backward()
        return out


def _peak(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Peak MiB above what was live before, with the result held as training holds it."""
    with PeakMemory(device) as memory:
        result = work()
    return memory.peak / MIB, result


def _needs(name: str, call: _Call) -> dict[str, Any]:
    """A row with the memory of a step, and with what its solves took."""
    for parameter in call.model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # as from the second step on
    torch.manual_seed(0)
    step, output = _peak(call.training_step, call.device)
    row: dict[str, Any] = {"network": name, "step_mib": step, "train_seconds": [], "inference_seconds": []}
    if output.solution is not None:
        solves = [output.solution, *output.solution.adjoint[-1:]]
        row |= {"forward": solves[0].evals, "backward": sum(solve.evals for solve in solves[1:])}
        row["converged"] = float(torch.cat([solve.converged for solve in solves]).double().mean())
    del output
    with eval_mode(call.model):
        x = call.model.embedding(call.segment.tokens)
    torch.manual_seed(0)
    row["layer_mib"], _ = _peak(lambda: call.layer_step(x), call.device)
    print(row, flush=True)
    return row


def _time_once(row: dict[str, Any], call: _Call, *, seed: int) -> None:
    """One more time of each kind."""
    torch.manual_seed(seed)  # the same masks for all
    row["train_seconds"].append(seconds(call.training_step, call.device))
    with eval_mode(call.model):
        row["inference_seconds"].append(seconds(call.forward, call.device))
        if seed == 0:
            solution = call.forward().solution
            row["inference_evals"] = None if solution is None else solution.evals
    print(row["network"], row["train_seconds"][-1], row["inference_seconds"][-1], flush=True)


def table(rows: list[dict[str, Any]]) -> str:
    """For the documentation; ratios and shares are to the base."""
    lines = [
        "| network | evaluations forward + backward | training step | ratio | inference (evaluations) | ratio "
        "| memory of a step | share | of the layer alone | share |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        evals = f"{row['forward']} + {row['backward']}" if "forward" in row else "–"
        if row.get("converged", 1.0) < 1.0:
            evals += f" ({row['converged']:.0%} converged)"
        inference = f"{row['inference_seconds']:.2f} s"
        inference += "" if row["inference_evals"] is None else f" ({row['inference_evals']})"
        lines.append(
            f"| {row['network']} | {evals} | {row['train_seconds']:.2f} s | {row['train_ratio']:.2f} | {inference} "
            f"| {row['inference_ratio']:.2f} | {row['step_mib']:,.0f} MiB | {row['step_share']:.1%} "
            f"| {row['layer_mib']:,.0f} MiB | {row['layer_share']:.1%} |"
        )
    return "\n".join(lines)
