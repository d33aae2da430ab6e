"""What a generated token costs: from the cache, and by solving the whole text again.

python benchmarks/generation.py RUN [--longest 512]

RUN is a trained run with a memory, such as runs/demo. Times are medians; everything on one thread. Writes
results/generation.json, results/generation.png and its part of docs/generation.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import RESULTS, keep, write_into_docs

from equilibria.commands.loading import Trained, trained
from equilibria.equilibrium import Memory
from equilibria.language import LanguageModel
from equilibria.solve import Stop

WINDOW = 32
"""Tokens over which a median is taken."""


def text_of(loaded: Trained, rows: int, length: int) -> torch.Tensor:
    """Beginnings of equal parts of the validation text."""
    tokens = loaded.corpus.valid.tokens
    return torch.stack([part[:length] for part in tokens.split(len(tokens) // rows)[:rows]])


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    found = run()
    return time.perf_counter() - began, found


@torch.no_grad()
def by_position(model: LanguageModel, text: torch.Tensor, memory: Memory) -> dict[str, list[float]]:
    """Milliseconds and evaluations of each token, read one by one, and the logits."""
    milliseconds, evals, logits = [], [], []
    for place in range(text.shape[1]):
        token = text[:, place : place + 1]
        seconds, out = timed(lambda token=token, memory=memory: model(token, token, memory))
        memory = out.memory
        milliseconds.append(1e3 * seconds)
        evals.append(out.solution.evals)
        logits.append(model.read(out.layer.z))
    return {"milliseconds": milliseconds, "evals": evals, "logits": torch.cat(logits, dim=1)}


@torch.no_grad()
def anew(model: LanguageModel, text: torch.Tensor, lengths: list[int]) -> dict[int, dict[str, float]]:
    """Milliseconds and evaluations of solving a whole text of each length, of which the last logits would be used."""
    found = {}
    for length in lengths:
        rows = text[:, :length]
        runs = [timed(lambda rows=rows: model(rows, rows)) for _ in range(5)]
        found[length] = {
            "milliseconds": 1e3 * statistics.median(seconds for seconds, _ in runs),
            "evals": runs[-1][1].solution.evals,
        }
    return found


def curve(values: list[float]) -> dict[int, float]:
    """The median of each window, by the position where it ends."""
    ends = range(WINDOW, len(values) + 1, WINDOW)
    return {end: statistics.median(values[end - WINDOW : end]) for end in ends}


@torch.no_grad()
def deviation(model: LanguageModel, text: torch.Tensor, stop: Stop) -> dict[str, Any]:
    """How far the logits read position by position are from those of the joint solve, both at ``stop``."""
    model.layer.eval_stop, before = stop, model.layer.eval_stop
    whole = model(text, text)
    ours = by_position(model, text, model.cache(len(text), length=text.shape[1]))["logits"]
    model.layer.eval_stop = before
    joint = model.read(whole.layer.z)
    return {
        "rtol": stop.rtol,
        "dtype": str(joint.dtype).removeprefix("torch."),
        "largest": float((ours - joint).abs().max()),
        "same_choice": float((ours.argmax(-1) == joint.argmax(-1)).double().mean()),
        "joint_converged": float(whole.solution.converged.double().mean()),
    }


def measured(loaded: Trained, longest: int) -> dict[str, Any]:
    """Everything, for batches of 1 and 8."""
    model, rows = loaded.model, {}
    for batch in (1, 8):
        text = text_of(loaded, batch, longest)
        by_position(model, text[:, :64], model.cache(batch, length=longest))  # warm up
        cold = by_position(model, text, model.cache(batch, length=longest, warm=False))
        warm = by_position(model, text, model.cache(batch, length=longest, warm=True))
        whole = anew(model, text, [length for length in (16, 32, 64, 128, 256, 512) if length <= longest])
        rows[f"batch {batch}"] = {
            "cached": curve(cold["milliseconds"]),
            "anew": {length: row["milliseconds"] for length, row in whole.items()},
            "ratio_at_256": whole[256]["milliseconds"] / curve(cold["milliseconds"])[256],
            "evals": {
                "anew": whole[256]["evals"],
                "from zero": statistics.mean(cold["evals"]),
                "from the position before": statistics.mean(warm["evals"]),
            },
        }
    text = text_of(loaded, 8, 256)
    rows["deviation"] = [deviation(model, text, dataclasses.replace(model.layer.stop, rtol=r)) for r in (1e-2, 1e-4)]
    model.double()
    rows["deviation"].append(deviation(model, text, Stop(rtol=1e-11, atol=0, max_evals=200)))
    return rows


def plot(rows: dict[str, Any]) -> None:
    """Milliseconds a token against its position."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for batch, style in ((1, "-"), (8, "--")):
        row = rows[f"batch {batch}"]
        axes.plot(*zip(*row["anew"].items(), strict=True), f"C1o{style}", label=f"whole text anew, batch {batch}")
        axes.plot(*zip(*row["cached"].items(), strict=True), f"C0{style}", label=f"cache, batch {batch}")
    axes.set(xlabel="position of the token", ylabel="milliseconds a token", yscale="log")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(RESULTS / "generation.png", dpi=160)


def table(rows: dict[str, Any]) -> str:
    """For the docs."""
    lines = ["| | batch 1 | batch 8 |", "|---|---|---|"]
    pair = [rows["batch 1"], rows["batch 8"]]

    def line(label: str, *values: str) -> None:
        lines.append(f"| {label} | {' | '.join(values)} |")

    for length in pair[0]["anew"]:
        if length in pair[0]["cached"]:
            line(f"cache, ms a token at position {length}", *(f"{row['cached'][length]:.2f}" for row in pair))
    for length in pair[0]["anew"]:
        line(f"whole text anew, ms at length {length}", *(f"{row['anew'][length]:.1f}" for row in pair))
    line("**times cheaper at 256**", *(f"**{row['ratio_at_256']:.0f}**" for row in pair))
    for name in pair[0]["evals"]:
        line(f"evaluations, {name}", *(f"{row['evals'][name]:.1f}" for row in pair))
    lines += [
        "",
        "| tolerance | dtype | largest difference of a logit | same likeliest token | joint solves converged |",
    ]
    lines += ["|---|---|---|---|---|"]
    lines += [
        f"| {row['rtol']:g} | {row['dtype']} | {row['largest']:.1e} | {row['same_choice']:.2%} | "
        f"{row['joint_converged']:.0%} |"
        for row in rows["deviation"]
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--longest", type=int, default=512)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = measured(trained(options.run, data=options.data), options.longest)
    print(table(found))
    print(keep("generation", found))
    plot(found)
    write_into_docs("generation", table(found), page="generation")
