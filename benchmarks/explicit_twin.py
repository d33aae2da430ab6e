"""Penn Treebank at equal time: the deep equilibrium transformer and its explicit, weight-tied baseline.

python benchmarks/explicit_twin.py --data FOLDER [--minutes 15] [--depth 12] [--only NAME …]

All have the same parameters, start, corpus, batches and optimiser. ``explicit`` is the baseline as ``--explicit`` makes
it; ``curriculum`` is the same network after the same shallow stage as the equilibrium has. Each first gets its learning
rate from short runs, whose speed then decides how many steps of a whole cosine fit into the time; two trainings at a
time run side by side, one thread each. The time is the processor's (see ``trainings.py``); it was wall time when the
result in results/ was measured. Writes results/explicit_twin.json and its part of docs/evidence/reproducing.md; with
``--only`` the other rows stay as they are.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from machine import RESULTS, publish, side_by_side
from trainings import QUIET, RATES, fitted, planned, scored, together, tuned

from equilibria.lm.experiments import Experiment, explicit, network_of
from equilibria.lm.recipes import ptb
from equilibria.lm.runs.trained import with_data

TUNING = {"equilibrium": (200, 100), "explicit": (200,), "curriculum": (200, 100)}
"""Steps of each stage in the short runs."""
SHALLOW = 0.4
"""Share of the time in which equilibrium and curriculum are networks of three layers."""


def experiments(data: Path, depth: int) -> dict[str, Experiment]:
    """All of them, without what costs time and is not compared."""
    whole = with_data(ptb(), data)
    whole = dataclasses.replace(whole, training=whole.training.changed(**QUIET, valid_segments=10))
    layers = network_of(depth, name="layers")
    curriculum = dataclasses.replace(whole, name=f"ptb-3-to-{depth}-layers", stages=(whole.stages[0], layers))
    baseline = explicit(whole, depth)
    deep = dataclasses.replace(baseline.stages[-1], steps=whole.total_steps)  # in one stage; "curriculum" has two
    return {
        "equilibrium": whole,
        "explicit": dataclasses.replace(baseline, stages=(deep,)),
        "curriculum": curriculum,
    }


def table(rows: dict[str, Any], *, minutes: float, depth: int) -> str:
    """The networks side by side, for the docs."""
    names = {
        "equilibrium": "equilibrium",
        "explicit": f"{depth} layers, tied",
        "curriculum": f"3, then {depth} layers, tied",
    }
    columns = {label: rows[name] for name, label in names.items() if name in rows}

    def mean(values: list[float]) -> str:
        return f"{sum(values) / len(values):.1f}" if values else "–"

    lines = [
        ("parameters", lambda r: f"{r['parameters']:,}"),
        ("learning rate (of " + ", ".join(f"{rate:g}" for rate in RATES) + ")", lambda r: f"{r['rate']:g}"),
        ("training steps", lambda r: " + ".join(f"{n:,}" for n in r["steps"])),
        ("time of the steps, s", lambda r: f"{r['seconds']:.0f}"),
        (
            "tokens/s in training",
            lambda r: ", ".join(f"{value:,.0f} ({name})" for name, value in r["tokens_per_second"].items()),
        ),
        ("evaluations of f per step, forward", lambda r: mean(r["forward"]) if r["backward"] else str(depth)),
        ("VJPs per step, backward", lambda r: mean(r["backward"])),
        ("peak memory of a training step", lambda r: f"{r['peak_bytes'] / 2**20:.0f} MiB"),
        ("validation perplexity", lambda r: f"{r['valid']['perplexity']:.1f}"),
        ("test perplexity", lambda r: f"{r['test']['perplexity']:.1f}"),
        ("tokens scored, validation and test", lambda r: f"{r['valid']['tokens']:,}, {r['test']['tokens']:,}"),
        ("tokens/s in evaluation, batch 1", lambda r: f"{r['test']['tokens_per_second']:,.0f}"),
    ]
    return side_by_side(f"{minutes:g} minutes each", columns, lines)


def main() -> None:
    """Tune, train, score, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--out", type=Path, default=Path("runs/explicit-twin"))
    parser.add_argument("--only", nargs="+", default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    pair = experiments(options.data, options.depth)
    pair = {name: value for name, value in pair.items() if options.only is None or name in options.only}
    rows = tuned(pair, TUNING, options.out)
    for name, row in rows.items():
        row["steps"] = fitted(pair[name], row["seconds_per_step"], 60 * options.minutes, SHALLOW)
    jobs = [(planned(pair[name], row["steps"], row["rate"]), options.out / name) for name, row in rows.items()]
    for (name, row), found in zip(rows.items(), together(jobs), strict=True):
        row |= found | scored(options.out / name, batch_size=1)
    if options.only is not None:
        rows = json.loads((RESULTS / "explicit_twin.json").read_text(encoding="utf-8"))["rows"] | rows
    publish("explicit_twin", rows, table(rows, minutes=options.minutes, depth=options.depth))


if __name__ == "__main__":
    main()
