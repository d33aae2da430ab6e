"""What a generated token costs: from the cache, and by solving the whole text again.

python benchmarks/generation.py RUN [RUN …] [--longest 512]

The RUNs are trained, such as runs/demo. Times are medians on one thread; run it on an idle machine. Writes
results/generation.json, docs/pictures/generation.png (of the first run) and its part of docs/concepts/generation.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from device import timed as timed_on
from machine import PICTURES, keep, write_into_docs

from equilibria.core.stop import Stop
from equilibria.fixed_point import Method
from equilibria.layers.equilibrium import Equilibrium
from equilibria.layers.sequence import Memory
from equilibria.lm.device import device_of
from equilibria.lm.model import LanguageModel
from equilibria.lm.runs.trained import Trained, load

WINDOW = 32
"""Tokens over which a median is taken."""
Texts = Callable[[int, int], torch.Tensor]


def trained_run(path: Path) -> tuple[str, LanguageModel, Texts]:
    """A model by its name, with beginnings of equal parts of its validation text."""
    loaded = load(path)
    return f"`{loaded.experiment.name}`", loaded.model, beginnings(loaded)


def beginnings(loaded: Trained) -> Texts:
    """The beginnings of equal parts of the validation text, on the device of the model."""
    tokens = loaded.stream("valid").tokens.to(device_of(loaded.model))

    def text(rows: int, length: int) -> torch.Tensor:
        return torch.stack([part[:length] for part in tokens.split(len(tokens) // rows)[:rows]])

    return text


def equilibrium_of(model: LanguageModel) -> Equilibrium:
    """The layer; an explicit network solves nothing, so that it has no tolerance to compare."""
    if not isinstance(model.layer, Equilibrium):
        raise SystemExit(f"the model's layer is {type(model.layer).__name__}; give the run of an equilibrium.")
    return model.layer


def timed(run: Callable[[], Any], like: torch.Tensor) -> tuple[float, Any]:
    """Milliseconds on the device of ``like``, and the result."""
    spent, found = timed_on(run, like.device)
    return 1e3 * spent, found


@torch.no_grad()
def by_position(
    model: LanguageModel, text: torch.Tensor, memory: Memory, *, method: Method | None = None
) -> dict[str, Any]:
    """Milliseconds and evaluations of each token, read one by one, and the logits."""
    milliseconds, evals, logits = [], [], []
    for token in text.split(1, dim=1):

        def step(token: torch.Tensor = token, memory: Memory = memory) -> Any:
            out = model.layer(model.embedding(token), memory, method=method)
            return out, model.read(out.output)

        spent, (out, seen) = timed(step, text)
        memory = out.memory
        milliseconds.append(spent)
        evals.append(out.solution.evals)
        logits.append(seen)
    return {"milliseconds": milliseconds, "evals": evals, "logits": torch.cat(logits, dim=1)}


@torch.no_grad()
def anew(model: LanguageModel, text: torch.Tensor, lengths: list[int]) -> dict[int, dict[str, float]]:
    """Milliseconds and evaluations of solving a whole text of each length, of which the last logits are read."""
    found = {}
    for length in lengths:

        def solve(rows: torch.Tensor = text[:, :length]) -> Any:
            out = model.layer(model.embedding(rows))
            model.read(out.output[:, -1:])
            return out

        runs = [timed(solve, text) for _ in range(5)]
        milliseconds = statistics.median(spent for spent, _ in runs)
        found[length] = {"milliseconds": milliseconds, "evals": runs[-1][1].solution.evals}
    return found


def curve(values: list[float]) -> dict[int, float]:
    """The median of each window, by the position where it ends."""
    ends = range(WINDOW, len(values) + 1, WINDOW)
    return {end: statistics.median(values[end - WINDOW : end]) for end in ends}


def costs(model: LanguageModel, texts: Texts, longest: int) -> dict[str, Any]:
    """For batches of 1 and 8."""
    rows = {}
    for batch in (1, 8):
        text = texts(batch, longest)
        by_position(model, text[:, :64], model.cache(batch, length=longest))  # warm up
        zero = by_position(model, text, model.cache(batch, length=longest))
        warm = by_position(model, text, model.cache(batch, length=longest, warm=True))
        whole = anew(model, text, [length for length in (32, 64, 128, 256, 512) if length <= longest])
        cached, at = curve(zero["milliseconds"]), min(256, longest)
        rows[f"batch {batch}"] = {
            "cached": cached,
            "anew": {length: row["milliseconds"] for length, row in whole.items()},
            f"ratio_at_{at}": whole[at]["milliseconds"] / cached[at],
            "evals": {
                f"whole text of {at}": whole[at]["evals"],
                "one position, from zero": statistics.mean(zero["evals"]),
                "one position, from the one before": statistics.mean(warm["evals"]),
            },
        }
    return rows


@torch.no_grad()
def deviation(model: LanguageModel, text: torch.Tensor, stop: Stop) -> dict[str, Any]:
    """How far the logits read position by position are from those of the joint solve, both at ``stop``."""
    method = dataclasses.replace(equilibrium_of(model).method, stop=stop)
    whole = model.layer(model.embedding(text), method=method)
    ours = by_position(model, text, model.cache(len(text), length=text.shape[1]), method=method)["logits"]
    joint = model.read(whole.output)
    return {
        "rtol": stop.rtol,
        "dtype": str(joint.dtype).removeprefix("torch."),
        "largest": float((ours - joint).abs().max()),
        "same_choice": float((ours.argmax(-1) == joint.argmax(-1)).double().mean()),
        "joint_converged": float(whole.solution.converged.double().mean()),
    }


def deviations(model: LanguageModel, texts: Texts) -> list[dict[str, Any]]:
    """At the tolerance of the training, at a tight one, and in float64; the model is in float64 afterwards."""
    text, stop = texts(8, 256), equilibrium_of(model).evaluation_method.stop
    rows = [deviation(model, text, dataclasses.replace(stop, rtol=r, max_evals=100)) for r in (1e-2, 1e-4)]
    return [*rows, deviation(model.double(), text, Stop(rtol=1e-11, atol=0, max_evals=200))]


def plot(rows: dict[str, Any]) -> None:
    """Milliseconds per token against its position."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for batch, style in ((1, "-"), (8, "--")):
        row = rows[f"batch {batch}"]
        axes.plot(*zip(*row["anew"].items(), strict=True), f"C1o{style}", label=f"whole text again, batch {batch}")
        axes.plot(*zip(*row["cached"].items(), strict=True), f"C0{style}", label=f"cache, batch {batch}")
    axes.set(xlabel="position of the token", ylabel="milliseconds per token", yscale="log")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(PICTURES / "generation.png", dpi=160)


def table(found: dict[str, dict[str, Any]], exact: dict[str, list[dict[str, Any]]]) -> str:
    """For the docs."""
    columns = [(name, batch, row) for name, rows in found.items() for batch, row in rows.items()]
    lines = ["| | " + " | ".join(f"{name}, {batch}" for name, batch, _ in columns) + " |"]
    lines.append("|---" * (1 + len(columns)) + "|")

    def line(label: str, tell: Callable[[dict[str, Any]], str]) -> None:
        lines.append(f"| {label} | {' | '.join(tell(row) for *_, row in columns)} |")

    for length in columns[0][2]["anew"]:
        line(f"cache, ms per token at position {length}", lambda row, length=length: f"{row['cached'][length]:.2f}")
    for length in columns[0][2]["anew"]:
        line(f"whole text again, ms at length {length}", lambda row, length=length: f"{row['anew'][length]:.1f}")
    line("**times cheaper at 256**", lambda row: f"**{row['ratio_at_256']:.0f}**")
    for name in columns[0][2]["evals"]:
        line(f"evaluations, {name}", lambda row, name=name: f"{row['evals'][name]:.1f}")
    lines += ["", "| run | tolerance | dtype | largest difference of a logit | same most likely token | converged |"]
    lines.append("|---|---|---|---|---|---|")
    lines += [
        f"| {name} | {row['rtol']:g} | {row['dtype']} | {row['largest']:.1e} | {row['same_choice']:.2%} | "
        f"{row['joint_converged']:.0%} |"
        for name, rows in exact.items()
        for row in rows
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--longest", type=int, default=512)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found, exact = {}, {}
    for path in options.runs:
        name, model, texts = trained_run(path)
        found[name], exact[name] = costs(model, texts, options.longest), deviations(model, texts)
    text = table(found, exact)
    print(text)
    print(keep("generation", {"costs": found, "exactness": exact}))
    plot(next(iter(found.values())))
    write_into_docs("generation", text, page="concepts/generation")
