"""More computation in the test: trained on short sequences, tested on longer ones with larger budgets of evaluations.

python benchmarks/more_compute.py [--seeds 3] [--processes 2] [--out runs/more-compute]

The recipe `prefix-sums` (parities of 32 random bits) is trained by three rules: implicit differentiation at the fixed
point, back-propagation through 33 evaluations, and the phantom gradient of five. Each model then reads sequences of 32
to 256 bits with budgets from 8 to 512 evaluations. The recipe `copying` (100 blanks), trained by implicit
differentiation, reads longer blanks. Trainings that have ended are not repeated, nor are measurements.
Writes results/more_compute.json, docs/pictures/more_compute.png and its part of docs/evidence/reproducing.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from machine import PICTURES, publish
from trainings import QUIET, together

from equilibria import Anderson, GradientRule, Implicit, Method, Phantom, Picard, Solver, Stop, Unroll
from equilibria.lm.corpora import Segments, Stream
from equilibria.lm.corpora import copying as copies
from equilibria.lm.corpora import prefix_sums as sums
from equilibria.lm.experiments import Experiment
from equilibria.lm.model import LanguageModel
from equilibria.lm.recipes import copying, prefix_sums
from equilibria.lm.runs.trained import load

TRAINED, LENGTHS = 32, (32, 64, 128, 256)
BUDGETS = (8, 16, 32, 64, 128, 256, 512)
BLANKS = (100, 101, 110, 150, 200)
STOP = Stop(rtol=1e-3, max_evals=4 * TRAINED)
RULES: dict[str, tuple[Stop, GradientRule]] = {
    "implicit": (STOP, Implicit(Picard(), STOP)),
    "unrolled": (Stop(rtol=0, atol=0, max_evals=TRAINED + 1, best=False), Unroll()),
    "phantom": (STOP, Phantom(5)),
}
EPISODES = 20
"""Sequences of the test set that are read at each length."""


def experiments(seed: int) -> dict[str, Experiment]:
    """The trainings of one seed by name."""
    found = {}
    for rule, (stop, gradient) in RULES.items():
        whole = prefix_sums()
        (stage,) = whole.stages
        stage = dataclasses.replace(stage, steps=400, method=Method(Picard(), stop, gradient))
        training = whole.training.changed(**QUIET, seed=seed)
        found[rule] = dataclasses.replace(whole, name=f"prefix-sums-{rule}", stages=(stage,), training=training)
    whole = copying()
    found["copying"] = dataclasses.replace(whole, training=whole.training.changed(**QUIET, seed=seed))
    return found


@torch.no_grad()
def read(model: LanguageModel, stream: Stream, solver: Solver, budget: int) -> dict[str, Any]:
    """Share of right answers, and for each sequence its residual and its share of wrong answers."""
    model.eval()
    method = Method(solver, Stop(rtol=1e-3, max_evals=budget), on_failure="ignore")
    right, residual, evals = [], [], []
    for segment in Segments(stream, batch_size=EPISODES).one_epoch():
        out = model(segment.tokens, segment.targets, method=method)
        guesses = model.read(out.layer.output).argmax(dim=-1)
        asked = slice(-(stream.answers or segment.tokens.shape[1]), None)
        right.append((guesses == segment.targets)[:, asked].double().mean(dim=1))
        residual.append(out.solution.residual)
        evals.append(out.solution.evals)
    return {
        "evals": statistics.fmean(evals),
        "accuracy": float(torch.cat(right).mean()),
        "wrong": (1 - torch.cat(right)).tolist(),
        "residual": torch.cat(residual).tolist(),
    }


def measured(path: Path, name: str) -> list[dict[str, Any]]:
    """One trained model at all difficulties and budgets; read from its folder if it has been measured."""
    kept = path / "measured.json"
    if not kept.exists():
        kept.write_text(json.dumps(_measured(path, name)), encoding="utf-8")
    return json.loads(kept.read_text(encoding="utf-8"))


def _measured(path: Path, name: str) -> list[dict[str, Any]]:
    model, rows = load(path).model, []
    if name == "copying":
        for blank in BLANKS:
            stream = copies(blank=blank, train=1, valid=1, test=EPISODES).test
            rows += [
                {"blank": blank, "budget": budget} | read(model, stream, Anderson(), budget) for budget in (30, 100)
            ]
        return rows
    for length in LENGTHS:
        stream = sums(length=length, train=1, valid=1, test=EPISODES).test
        rows += [{"length": length, "budget": budget} | read(model, stream, Picard(), budget) for budget in BUDGETS]
    return rows


def auc(rows: list[dict[str, Any]]) -> float:
    """The probability that a sequence with a wrong answer has a larger residual than one without; 0.5 is a guess."""
    residual = torch.tensor([r for row in rows for r in row["residual"]], dtype=torch.float64)
    wrong = torch.tensor([w > 0 for row in rows for w in row["wrong"]])
    if wrong.all() or not wrong.any():
        return float("nan")
    above = (residual[wrong][:, None] > residual[~wrong]).double().mean()
    equal = (residual[wrong][:, None] == residual[~wrong]).double().mean()
    return float(above + equal / 2)


def converged_and_right(rows: list[dict[str, Any]]) -> tuple[float, float]:
    """The share of wholly right sequences among those that converged, and among those that did not."""
    pairs = [(r <= 1e-3, w == 0) for row in rows for r, w in zip(row["residual"], row["wrong"], strict=True)]

    def share(kind: bool) -> float:
        right = [good for done, good in pairs if done is kind]
        return sum(right) / len(right) if right else float("nan")

    return share(True), share(False)


def spread(scores: list[float]) -> str:
    """The mean of the seeds, and the smallest and the largest."""
    return f"{statistics.fmean(scores):.1%} ({min(scores):.1%} – {max(scores):.1%})"


def table(found: dict[str, list[list[dict[str, Any]]]]) -> str:
    """For the docs."""
    lines = [f"| trained on {TRAINED} bits by | " + " | ".join(f"{n} bits" for n in LENGTHS) + " |"]
    lines += ["|---|" + "---:|" * len(LENGTHS)]
    for rule in RULES:
        cells = []
        for length in LENGTHS:
            best = [
                max((row for row in rows if row["length"] == length), key=lambda row: row["accuracy"])
                for rows in found[rule]
            ]
            cells.append(spread([row["accuracy"] for row in best]))
        lines.append(f"| {rule} | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"| implicit, {len(found['implicit'])} seeds: budget | " + " | ".join(f"{n} bits" for n in LENGTHS) + " |",
    ]
    lines += ["|---|" + "---:|" * len(LENGTHS)]
    for budget in BUDGETS:
        cells = []
        for length in LENGTHS:
            rows = [
                row for run in found["implicit"] for row in run if (row["length"], row["budget"]) == (length, budget)
            ]
            accuracy, evals = (statistics.fmean(row[key] for row in rows) for key in ("accuracy", "evals"))
            cells.append(f"{accuracy:.1%} ({evals:.0f})")
        lines.append(f"| {budget} | " + " | ".join(cells) + " |")
    lines += ["", "| trained by | converged and right | not converged and right | wrong has the larger residual |"]
    lines += ["|---|---:|---:|---:|"]
    for rule in RULES:
        rows = [row for run in found[rule] for row in run]
        done, not_done = converged_and_right(rows)
        lines.append(f"| {rule} | {done:.1%} | {not_done:.1%} | {auc(rows):.3f} |")
    lines += ["", "| `copying`, trained with 100 blanks: blanks | " + " | ".join(map(str, BLANKS)) + " |"]
    lines += ["|---|" + "---:|" * len(BLANKS)]
    for budget in (30, 100):
        cells = []
        for blank in BLANKS:
            rows = [row for run in found["copying"] for row in run if (row["blank"], row["budget"]) == (blank, budget)]
            cells.append(spread([row["accuracy"] for row in rows]))
        lines.append(f"| right answers with at most {budget} evaluations | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(found: dict[str, list[list[dict[str, Any]]]]) -> None:
    """Accuracy against evaluations by length, and the share of wrong answers against the residual."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for length, colour in zip(LENGTHS, ("C0", "C1", "C2", "C3"), strict=True):
        for rule, style in (("implicit", "-"), ("unrolled", "--"), ("phantom", ":")):
            points = [
                [row for run in found[rule] for row in run if (row["length"], row["budget"]) == (length, budget)]
                for budget in BUDGETS
            ]
            line = [[statistics.fmean(row[k] for row in rows) for k in ("evals", "accuracy")] for rows in points]
            label = f"{length} bits" if rule == "implicit" else None
            left.plot(*zip(*line, strict=True), colour + style, lw=1.6, label=label)
    left.set(xscale="log", xlabel="evaluations of f", ylabel="right answers", title="trained on 32 bits")
    left.set_xticks(BUDGETS, [str(budget) for budget in BUDGETS])
    left.minorticks_off()
    left.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1), title="implicit –\nunrolled - -\nphantom ···")
    for rule, colour in (("implicit", "C0"), ("unrolled", "C1"), ("phantom", "C2")):
        rows = [row for run in found[rule] for row in run]
        residual = [max(r, 1e-9) for row in rows for r in row["residual"]][::7]
        wrong = [w for row in rows for w in row["wrong"]][::7]
        right.plot(residual, wrong, colour + ".", ms=2, alpha=0.3, label=rule)
    right.axvline(1e-3, color="0.6", lw=1, ls=":")
    right.set(xscale="log", xlabel="relative residual of the sequence", ylabel="share of wrong answers")
    right.legend(frameon=False, markerscale=6)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(PICTURES / "more_compute.png", dpi=160)


def main() -> None:
    """Train what is missing, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/more-compute"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    jobs = {
        (name, seed): (experiment, options.out / f"{name}-{seed}")
        for seed in range(options.seeds)
        for name, experiment in experiments(seed).items()
    }
    together([*jobs.values()], options.processes)
    found: dict[str, list[list[dict[str, Any]]]] = {}
    for (name, _), (_, path) in jobs.items():
        found.setdefault(name, []).append(measured(path, name))
    plot(found)
    short = [
        {"trained": name, "seed": seed} | {key: value for key, value in row.items() if key not in ("wrong", "residual")}
        for name, runs in found.items()
        for seed, rows in enumerate(runs)
        for row in rows
    ]
    publish("more_compute", short, table(found))


if __name__ == "__main__":
    main()
