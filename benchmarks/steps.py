"""Networks side by side: memory and time of a training step and of inference, on one segment, interleaved."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from equilibria.corpora import Segment
from equilibria.language import LanguageModel
from equilibria.language.modes import evaluating
from equilibria.training import PeakMemory

MIB = 2**20


def compare(
    models: dict[str, LanguageModel],
    segment: Segment,
    past: Callable[[LanguageModel], Any],
    *,
    base: str,
    repeats: int,
) -> list[dict[str, Any]]:
    """One row a model, with its shares of what ``base`` needs; ``past`` gives each the memory of a segment before."""
    memories = {name: past(model) for name, model in models.items()}
    rows = [_needs(name, model, segment, memories[name]) for name, model in models.items()]
    for repeat in range(repeats):
        for row, (name, model) in zip(rows, models.items(), strict=True):
            _time_once(row, model, segment, memories[name], seed=repeat)
    first = next(row for row in rows if row["network"] == base)
    for row in rows:
        for kind in ("train_seconds", "inference_seconds"):
            row[kind] = statistics.median(row[kind])
    for row in rows:
        row |= {f"{kind}_share": row[f"{kind}_mib"] / first[f"{kind}_mib"] for kind in ("step", "layer")}
        row |= {f"{kind}_ratio": row[f"{kind}_seconds"] / first[f"{kind}_seconds"] for kind in ("train", "inference")}
    return rows


def training_step(model: LanguageModel, segment: Segment, memory: Any) -> Any:
    """Forward and backward, with the loss of the training."""
    output = model(segment.tokens, segment.targets, memory)
    loss = output.nats.mean()
    (loss if output.extra is None else loss + output.extra).backward()
    return output


def _layer_step(model: LanguageModel, x: Tensor, memory: Any) -> Any:
    """The same of the layer alone, as the paper leaves embeddings out."""
    out = model.layer(x, memory)
    (out.output / out.output.numel()).sum().backward()
    return out


def _seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _peak(work: Callable[[], Any]) -> tuple[float, Any]:
    """Peak MiB above what was live before, with the result held as training holds it."""
    with PeakMemory() as memory:
        result = work()
    return memory.peak / MIB, result


def _needs(name: str, model: LanguageModel, segment: Segment, memory: Any) -> dict[str, Any]:
    """A row with the memory of a step, and with what its solves took."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # as from the second step on
    torch.manual_seed(0)
    step, output = _peak(lambda: training_step(model, segment, memory))
    row: dict[str, Any] = {"network": name, "step_mib": step, "train_seconds": [], "inference_seconds": []}
    if output.solution is not None:
        solves = [output.solution, *output.solution.adjoint[-1:]]
        row |= {"forward": solves[0].evals, "backward": sum(solve.evals for solve in solves[1:])}
        row["converged"] = float(torch.cat([solve.converged for solve in solves]).double().mean())
    del output
    with evaluating(model):
        x = model.embedding(segment.tokens)
    torch.manual_seed(0)
    row["layer_mib"], _ = _peak(lambda: _layer_step(model, x, memory))
    print(row, flush=True)
    return row


def _time_once(row: dict[str, Any], model: LanguageModel, segment: Segment, memory: Any, *, seed: int) -> None:
    """One more time of each kind."""
    torch.manual_seed(seed)  # the same masks for all
    row["train_seconds"].append(_seconds(lambda: training_step(model, segment, memory)))
    with evaluating(model):
        row["inference_seconds"].append(_seconds(lambda: model(segment.tokens, segment.targets, memory)))
        if seed == 0:
            solution = model(segment.tokens, segment.targets, memory).solution
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
