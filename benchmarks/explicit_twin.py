"""Penn Treebank at equal wall time: the deep equilibrium transformer and its explicit, weight-tied baseline.

python benchmarks/explicit_twin.py --data FOLDER [--minutes 15] [--depth 12] [--only NAME …]

All have the same parameters, start, corpus, batches and optimiser. ``explicit`` is the baseline as ``--explicit`` makes
it; ``curriculum`` is the same network after the same shallow stage as the equilibrium has. Each first gets its learning
rate from short runs, whose speed then decides how many steps of a whole cosine fit into the time; two trainings at a
time run side by side, one thread each. Writes results/explicit_twin.json and its part of
    docs/evidence/reproducing.md; with
``--only`` the other rows stay as they are.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import time
from pathlib import Path
from typing import Any

import torch
from machine import RESULTS, keep, write_into_docs

from equilibria.lm.corpora import Segments
from equilibria.lm.evaluation import evaluate
from equilibria.lm.experiments import Experiment, explicit, network_of
from equilibria.lm.recipes import ptb
from equilibria.lm.runs import Run
from equilibria.lm.runs.trained import load, with_data
from equilibria.lm.training import Trainer, memory_comparison

RATES = (1e-3, 2e-3, 4e-3)
TUNING = {"equilibrium": (200, 100), "explicit": (200,), "curriculum": (200, 100)}
"""Steps of each stage in the short runs."""
SHALLOW = 0.4
"""Share of the time in which equilibrium and curriculum are networks of three layers."""


def experiments(data: Path, depth: int) -> dict[str, Experiment]:
    """All of them, without what costs time and is not compared."""
    whole = with_data(ptb(), data)
    quiet = {"threads": 1, "measure_memory": False, "spectral_radius": 0, "baseline": False, "valid_segments": 10}
    whole = dataclasses.replace(whole, training=whole.training.changed(**quiet))
    layers = network_of(depth, name="layers")
    curriculum = dataclasses.replace(whole, name=f"ptb-3-to-{depth}-layers", stages=(whole.stages[0], layers))
    baseline = explicit(whole, depth)
    deep = dataclasses.replace(baseline.stages[-1], steps=whole.total_steps)  # in one stage; "curriculum" has two
    return {
        "equilibrium": whole,
        "explicit": dataclasses.replace(baseline, stages=(deep,)),
        "curriculum": curriculum,
    }


def planned(experiment: Experiment, steps: tuple[int, ...], rate: float) -> Experiment:
    """The experiment with other numbers of steps and another learning rate."""
    stages = tuple(dataclasses.replace(s, steps=n) for s, n in zip(experiment.stages, steps, strict=True))
    every = max(1, sum(steps) // 8)
    training = experiment.training.changed(
        learning_rate=rate, warmup=sum(steps) // 15, valid_every=every, checkpoint_every=every
    )
    return dataclasses.replace(experiment, stages=stages, training=training)


def train(job: tuple[Experiment, Path]) -> dict[str, Any]:
    """One training in a process of its own: its curve, and the seconds that a step of each stage took."""
    experiment, path = job
    torch.set_num_threads(1)
    corpus = experiment.corpus.load()
    Trainer(experiment, Run.start(path, experiment, overwrite=True), corpus).fit()
    events = [json.loads(line) for line in (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [event for event in events if event["event"] == "step" and event["step"] > 1]
    tokens = experiment.training.batches.batch_size * experiment.training.batches.segment_length

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    speed = {s.name: mean([e["tokens_per_second"] for e in steps if e["stage"] == s.name]) for s in experiment.stages}
    fields = ("step", "stage", "seconds", "perplexity")
    return {
        "curve": [{name: event[name] for name in fields} for event in events if event["event"] == "valid"],
        "tokens_per_second": speed,
        "seconds_a_step": {name: tokens / value for name, value in speed.items()},
        "forward": [e["forward"]["evals"] for e in steps if e.get("forward")][-20:],
        "backward": [e["backward"]["evals"] for e in steps if e.get("backward")][-20:],
        "seconds": events[-1]["seconds"],
    }


def together(jobs: list[tuple[Experiment, Path]]) -> list[dict[str, Any]]:
    """Two trainings at a time, each with one thread; those of one kind one after another."""
    processes = min(2, len({experiment.name for experiment, _ in jobs}))
    with multiprocessing.get_context("spawn").Pool(processes, maxtasksperchild=1) as pool:
        return pool.map(train, jobs, chunksize=1)


def tuned(pair: dict[str, Experiment], out: Path) -> dict[str, dict[str, Any]]:
    """The learning rate of each with the lowest perplexity after the short runs, and the time of its steps."""
    jobs = [(name, rate) for rate in RATES for name in pair]
    found = together([(planned(pair[n], TUNING[n], rate), out / f"tune-{n}-{rate:g}") for n, rate in jobs])
    result: dict[str, dict[str, Any]] = {}
    for name in pair:
        rows = {rate: run for (n, rate), run in zip(jobs, found, strict=True) if n == name}
        scores = {rate: run["curve"][-1]["perplexity"] for rate, run in rows.items()}
        rate = min(scores, key=scores.__getitem__)
        result[name] = {"rate": rate, "tried": scores, "seconds_a_step": rows[rate]["seconds_a_step"]}
        print(f"{name}: learning rate {rate:g} of {scores}", flush=True)
    return result


def fitted(name: str, seconds: dict[str, float], budget: float) -> tuple[int, ...]:
    """Steps of each stage that take the time."""
    if name == "explicit":
        return (int(budget / seconds["explicit"]),)
    last = "implicit" if name == "equilibrium" else "layers"
    return int(SHALLOW * budget / seconds["shallow"]), int((1 - SHALLOW) * budget / seconds[last])


def scored(path: Path) -> dict[str, Any]:
    """Parameters, memory of a training step, and the best checkpoint on whole streams with batch size 1."""
    loaded = load(path)
    model, training = loaded.model, loaded.experiment.training
    segment = Segments(
        loaded.corpus.train, batch_size=training.batches.batch_size, length=training.batches.segment_length
    ).at(0)
    memory = model(segment.tokens, segment.targets).memory
    (peak,) = memory_comparison(model, segment, memory, depths=())
    result: dict[str, Any] = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "peak_bytes": peak["peak_bytes"],
    }
    for split in ("valid", "test"):
        began = time.perf_counter()
        stream, choices = getattr(loaded.corpus, split), {"segment_length": training.batches.segment_length}
        score = evaluate(model, stream, **choices, warm=loaded.stage.warm)
        result[split] = {
            "perplexity": score.perplexity,
            "tokens": score.tokens,
            "tokens_per_second": score.tokens / (time.perf_counter() - began),
            **(score.forward or {}),
        }
    return result


def table(rows: dict[str, Any], *, minutes: float, depth: int) -> str:
    """The networks side by side, for the docs."""
    names = {
        "equilibrium": "equilibrium",
        "explicit": f"{depth} layers, tied",
        "curriculum": f"3, then {depth} layers, tied",
    }
    names = {name: label for name, label in names.items() if name in rows}

    def line(label: str, tell: Any) -> str:
        return f"| {label} | " + " | ".join(tell(rows[name]) for name in names) + " |"

    def mean(values: list[float]) -> str:
        return f"{sum(values) / len(values):.1f}" if values else "–"

    lines = [
        f"| {minutes:g} minutes each | {' | '.join(names.values())} |",
        "|---|" + "---|" * len(names),
        line("parameters", lambda r: f"{r['parameters']:,}"),
        line("learning rate (of " + ", ".join(f"{rate:g}" for rate in RATES) + ")", lambda r: f"{r['rate']:g}"),
        line("training steps", lambda r: " + ".join(f"{n:,}" for n in r["steps"])),
        line("wall time, s", lambda r: f"{r['seconds']:.0f}"),
        line(
            "tokens/s in training",
            lambda r: ", ".join(f"{value:,.0f} ({name})" for name, value in r["tokens_per_second"].items()),
        ),
        line("evaluations of f per step, forward", lambda r: mean(r["forward"]) if r["backward"] else str(depth)),
        line("VJPs per step, backward", lambda r: mean(r["backward"])),
        line("peak memory of a training step", lambda r: f"{r['peak_bytes'] / 2**20:.0f} MiB"),
        line("validation perplexity", lambda r: f"{r['valid']['perplexity']:.1f}"),
        line("test perplexity", lambda r: f"{r['test']['perplexity']:.1f}"),
        line("tokens scored, validation and test", lambda r: f"{r['valid']['tokens']:,}, {r['test']['tokens']:,}"),
        line("tokens/s in evaluation, batch 1", lambda r: f"{r['test']['tokens_per_second']:,.0f}"),
    ]
    return "\n".join(lines)


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
    rows = tuned(pair, options.out)
    for name, row in rows.items():
        row["steps"] = fitted(name, row["seconds_a_step"], 60 * options.minutes)
    jobs = [(planned(pair[name], row["steps"], row["rate"]), options.out / name) for name, row in rows.items()]
    for (name, row), found in zip(rows.items(), together(jobs), strict=True):
        row |= found | scored(options.out / name)
    if options.only is not None:
        rows = json.loads((RESULTS / "explicit_twin.json").read_text(encoding="utf-8"))["rows"] | rows
    text = table(rows, minutes=options.minutes, depth=options.depth)
    print(text)
    print(keep("explicit_twin", rows))
    write_into_docs("explicit_twin", text)


if __name__ == "__main__":
    main()
