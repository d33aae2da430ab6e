"""Penn Treebank by characters at equal parameters and equal time: an equilibrium beside explicit networks.

python benchmarks/equal_parameters.py --data FOLDER [--minutes 6] [--seeds 3] [--processes 2]

Four networks of about one million parameters: the deep equilibrium transformer, the same cell applied twelve times, and
untied Transformer-XLs of four and of twelve layers, which are narrower. These start their matrices as the equilibrium
does, since from Transformer-XL's own N(0, 0.02²) twelve layers learn nothing in the short runs. Each network gets its
best learning rate of four after short runs with one seed; then each is trained with every seed for the same processor
time, and the untied ones once more for as many steps as the equilibrium. The checkpoint of the best validation score
reads the whole test text. Trainings that have ended are not repeated, so the script can be stopped and called again.
Writes results/equal_parameters.json and its part of docs/evidence/reproducing.md after every seed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import publish, side_by_side
from trainings import QUIET, Job, fitted, planned, scored, together, train, tuned

from equilibria.lm.corpora import PennTreebankCharacters
from equilibria.lm.experiments import Experiment, explicit
from equilibria.lm.recipes import tiny
from equilibria.lm.runs.trained import with_data

RATES = (5e-4, 1e-3, 2e-3, 4e-3)
"""Learning rates of which each network gets its best."""
SHALLOW = 0.3
"""Share of the time in which the two networks with one cell have three layers."""
TUNING = 12
"""The short runs take one part in so many of the time."""
LABELS = {
    "equilibrium": "equilibrium, width 256",
    "tied-12": "12 layers, tied, width 256",
    "untied-4": "4 layers, untied, width 144",
    "untied-12": "12 layers, untied, width 80",
    "untied-4-few": "4 layers, untied, as many steps as the equilibrium",
    "untied-12-few": "12 layers, untied, as many steps",
}
FEW = {"untied-4-few": "untied-4", "untied-12-few": "untied-12"}
"""Networks that are trained once more, for as many steps as the equilibrium instead of the same time."""


def experiments(data: Path) -> dict[str, Experiment]:
    """The four networks by name, with the steps of ``tiny``."""

    def sized(width: int) -> Experiment:
        whole = dataclasses.replace(tiny(), name=f"equal-parameters-{width}", corpus=PennTreebankCharacters())
        cell = dataclasses.replace(whole.model.cell, width=width, inner=4 * width)
        training = whole.training.changed(**QUIET, batch_size=16, valid_segments=40, eval_batch_size=20)
        model = dataclasses.replace(whole.model, cell=cell)
        return with_data(dataclasses.replace(whole, model=model, training=training), data)

    def untied(width: int, depth: int) -> Experiment:
        """In one stage."""
        network = explicit(sized(width), depth, tied=False)
        last = dataclasses.replace(network.stages[-1], steps=network.total_steps)
        return dataclasses.replace(network, stages=(last,))

    return {
        "equilibrium": sized(256),
        "tied-12": explicit(sized(256), 12),
        "untied-4": untied(144, 4),
        "untied-12": untied(80, 12),
    }


def ended(job: Job) -> dict[str, Any]:
    """A training and its score in the test."""
    return train(job) | scored(job[1], batch_size=20, splits=("test",))


def seeded(experiment: Experiment, seed: int) -> Experiment:
    """The experiment with another seed of weights and batches."""
    return dataclasses.replace(experiment, training=experiment.training.changed(seed=seed))


def table(rows: dict[str, Any], minutes: float) -> str:
    """The networks side by side, for the docs: means over the seeds, and the smallest and largest score."""
    columns = {label: rows[name]["runs"] for name, label in LABELS.items() if rows.get(name, {}).get("runs")}
    seeds, mean = max(map(len, columns.values())), statistics.fmean
    lines: list[tuple[str, Callable[[list[dict[str, Any]]], str]]] = [
        ("parameters", lambda runs: f"{runs[0]['parameters']:,}"),
        ("learning rate of " + ", ".join(f"{rate:g}" for rate in RATES), lambda runs: f"{runs[0]['rate']:g}"),
        ("training steps", lambda runs: " + ".join(f"{n:,}" for n in runs[0]["steps"])),
        ("processor time of the steps, s", lambda runs: f"{mean([run['seconds'] for run in runs]):.0f}"),
        (
            "evaluations of f + VJPs per step",
            lambda runs: (
                f"{mean(runs[0]['forward']):.1f} + {mean(runs[0]['backward']):.1f}" if runs[0]["backward"] else "–"
            ),
        ),
        ("peak memory of a training step", lambda runs: f"{runs[0]['peak_bytes'] / 2**20:.0f} MiB"),
        (
            "best validation, bits per character",
            lambda runs: f"{mean([_best(run['curve']) for run in runs]):.3f}",
        ),
        ("**test, bits per character**", lambda runs: f"**{mean([run['test']['bits'] for run in runs]):.3f}**"),
        (
            "test, smallest and largest",
            lambda runs: " – ".join(f"{f(run['test']['bits'] for run in runs):.3f}" for f in (min, max)),
        ),
    ]
    return side_by_side(f"{minutes:g} minutes each, {seeds} seed{'s' * (seeds > 1)}", columns, lines)


def _best(curve: list[dict[str, Any]]) -> float:
    """The best validation of the last stage, whose checkpoint is read."""
    return min(score["bits"] for score in curve if score["stage"] == curve[-1]["stage"])


def main() -> None:
    """Tune, train, score, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=6)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/equal-parameters"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    networks, budget = experiments(options.data), 60 * options.minutes
    tries = [(planned(e, (10,) * len(e.stages), RATES[0]), options.out / f"speed-{n}") for n, e in networks.items()]
    speed = dict(zip(networks, together(tries, 1), strict=True))
    short = {name: fitted(e, speed[name]["seconds_per_step"], budget / TUNING, SHALLOW) for name, e in networks.items()}
    rows = tuned(networks, short, options.out, options.processes, RATES)
    plan = options.out / "plan.json"  # a second call keeps the plan of the first, and so its trainings
    if not plan.exists():
        steps = {name: fitted(e, rows[name]["seconds_per_step"], budget, SHALLOW) for name, e in networks.items()}
        plan.write_text(json.dumps(steps), encoding="utf-8")
    steps = json.loads(plan.read_text(encoding="utf-8"))
    for few, name in FEW.items():
        networks[few], rows[few], steps[few] = networks[name], dict(rows[name]), [sum(steps["equilibrium"])]
    for seed in range(options.seeds):
        jobs = {
            name: (planned(seeded(e, seed), tuple(steps[name]), rows[name]["rate"]), options.out / f"{name}-{seed}")
            for name, e in networks.items()
        }
        for name, found in zip(jobs, together([*jobs.values()], options.processes, ended), strict=True):
            rows[name].setdefault("runs", []).append(found)
        publish("equal_parameters", rows | {"minutes": options.minutes}, table(rows, options.minutes))


if __name__ == "__main__":
    main()
