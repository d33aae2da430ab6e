"""Trainings that benchmarks compare: planned for a time, each in its own process with one thread, kept when it ends.

The time of a training is the processor's time of its steps, without validation: on a machine with other work, two
trainings of equal processor time have done the same amount of work, and two of equal wall time have not.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from equilibria.lm.corpora import Segments
from equilibria.lm.evaluation import evaluate
from equilibria.lm.experiments import Experiment
from equilibria.lm.runs import Run
from equilibria.lm.runs.trained import load
from equilibria.lm.training import Trainer, memory_comparison

QUIET = {"threads": 1, "measure_memory": False, "spectral_radius": 0, "baseline": False}
"""Settings of a training without what costs time and is not compared."""
RATES = (1e-3, 2e-3, 4e-3)
"""Learning rates of which each network gets its best."""


def planned(experiment: Experiment, steps: tuple[int, ...], rate: float, **settings: Any) -> Experiment:
    """The experiment with other numbers of steps and another learning rate, validated eight times."""
    stages = tuple(dataclasses.replace(s, steps=n) for s, n in zip(experiment.stages, steps, strict=True))
    every = max(1, sum(steps) // 8)
    training = experiment.training.changed(
        learning_rate=rate, warmup=sum(steps) // 15, valid_every=every, checkpoint_every=every, **settings
    )
    return dataclasses.replace(experiment, stages=stages, training=training)


class _Timed(Trainer):
    """A trainer that adds up the processor's time of the steps of each stage."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.spent = dict.fromkeys((stage.name for stage in self.experiment.stages), 0.0)

    def step(self, *arguments: Any, **options: Any) -> Any:
        name, began = self.stage.name, time.process_time()
        result = super().step(*arguments, **options)
        self.spent[name] += time.process_time() - began
        return result


Job = tuple[Experiment, Path]
"""What to train, and in which folder."""


def train(job: Job) -> dict[str, Any]:
    """One training: curve, evaluations, and the processor's seconds of its steps. One that has ended is read."""
    experiment, path = job
    kept = path / "benchmark.json"
    if kept.exists():
        return json.loads(kept.read_text(encoding="utf-8"))
    torch.set_num_threads(1)
    trainer = _Timed(experiment, Run.start(path, experiment, overwrite=True), experiment.corpus.load())
    trainer.fit()
    events = [json.loads(line) for line in (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [event for event in events if event["event"] == "step" and event["step"] > 1]
    batches = experiment.training.batches
    fields = ("step", "stage", "seconds", "perplexity", "bits")
    seconds = {stage.name: trainer.spent[stage.name] / stage.steps for stage in experiment.stages}
    found = {
        "steps": [stage.steps for stage in experiment.stages],
        "rate": experiment.training.optimisation.learning_rate,
        "curve": [{f: event.get(f) for f in fields} for event in events if event["event"] == "valid"],
        "tokens_per_second": {name: batches.batch_size * batches.segment_length / s for name, s in seconds.items()},
        "seconds_per_step": seconds,
        "forward": [e["forward"]["evals"] for e in steps if e.get("forward")][-20:],
        "backward": [e["backward"]["evals"] for e in steps if e.get("backward")][-20:],
        "seconds": sum(trainer.spent.values()),
        "wall_seconds": events[-1]["seconds"],
    }
    kept.write_text(json.dumps(found), encoding="utf-8")
    return found


def scored(path: Path, *, batch_size: int, splits: Sequence[str] = ("valid", "test")) -> dict[str, Any]:
    """Parameters, memory of a training step, and the best checkpoint on whole streams. A kept score is read."""
    kept = path / f"scores-{batch_size}.json"
    if kept.exists():
        return json.loads(kept.read_text(encoding="utf-8"))
    loaded = load(path)
    model, batches = loaded.model, loaded.experiment.training.batches
    segment = Segments(loaded.corpus.train, batch_size=batches.batch_size, length=batches.segment_length).at(0)
    memory = model(segment.tokens, segment.targets).memory
    (peak,) = memory_comparison(model, segment, memory, depths=())
    found: dict[str, Any] = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "peak_bytes": peak["peak_bytes"],
    }
    for split in splits:
        began, stream = time.perf_counter(), getattr(loaded.corpus, split)
        choices = {"batch_size": batch_size, "segment_length": batches.segment_length, "warm": loaded.stage.warm}
        score = evaluate(model, stream, **choices)
        found[split] = {
            "perplexity": score.perplexity,
            "bits": score.nll_per_token / math.log(2),
            "tokens": score.tokens,
            "tokens_per_second": score.tokens / (time.perf_counter() - began),
            **(score.forward or {}),
        }
    kept.write_text(json.dumps(found), encoding="utf-8")
    return found


def together(
    jobs: list[Job], processes: int = 2, work: Callable[[Job], dict[str, Any]] = train
) -> list[dict[str, Any]]:
    """So many trainings at a time, each with one thread."""
    with multiprocessing.get_context("spawn").Pool(processes, maxtasksperchild=1) as pool:
        return pool.map(work, jobs, chunksize=1)


def tuned(
    experiments: Mapping[str, Experiment],
    short: Mapping[str, tuple[int, ...]],
    out: Path,
    processes: int = 2,
    rates: Sequence[float] = RATES,
) -> dict[str, dict[str, Any]]:
    """For each, the rate with the lowest validation perplexity after a short run, and the time of its steps."""
    jobs = [(name, rate) for rate in rates for name in experiments]
    found = together(
        [(planned(experiments[n], short[n], rate), out / f"tune-{n}-{rate:g}") for n, rate in jobs], processes
    )
    result: dict[str, dict[str, Any]] = {}
    for name in experiments:
        rows = {rate: run for (n, rate), run in zip(jobs, found, strict=True) if n == name}
        scores = {rate: run["curve"][-1]["perplexity"] for rate, run in rows.items()}
        rate = min(scores, key=scores.__getitem__)
        result[name] = {"rate": rate, "tried": scores}
        print(f"{name}: learning rate {rate:g} of {scores}", flush=True)
    seconds = speeds({name: out / f"tune-{name}-{row['rate']:g}" for name, row in result.items()})
    return {name: row | {"seconds_per_step": seconds[name]} for name, row in result.items()}


def speeds(runs: Mapping[str, Path], rounds: int = 9) -> dict[str, dict[str, float]]:
    """The processor's seconds of a step of each stage, from the weights that a short run left.

    All networks take turns, so that other work on the machine slows all of them alike.
    """
    torch.set_num_threads(1)
    trainers = {}
    for name, path in runs.items():
        run = Run.open(path)
        experiment = run.experiment()
        trainers[name] = trainer = Trainer(experiment, run, experiment.corpus.load())
        trainer.resume()
    found: dict[str, dict[str, float]] = {name: {} for name in runs}
    for number in range(max(len(trainer.experiment.stages) for trainer in trainers.values())):
        steps = {n: _steps_of(t, number) for n, t in trainers.items() if number < len(t.experiment.stages)}
        times: dict[str, list[float]] = {name: [] for name in steps}
        for _, name in itertools.product(range(rounds + 2), steps):
            times[name].append(next(steps[name]))
        for name, seconds in times.items():  # the first two fill the memory
            found[name][trainers[name].stage.name] = statistics.median(seconds[2:])
    return found


def _steps_of(trainer: Trainer, number: int) -> Iterator[float]:
    """Trains on in this stage, and gives the processor's seconds of each step."""
    begin = sum(stage.steps for stage in trainer.experiment.stages[:number])
    trainer.memory = None
    while True:
        trainer.steps_done = begin
        trainer._enter_stage()
        segment, began = next(trainer._batches()), time.process_time()
        trainer.step(segment)
        yield time.process_time() - began


def fitted(experiment: Experiment, seconds: Mapping[str, float], budget: float, shallow: float) -> tuple[int, ...]:
    """Steps of each stage that take the budget in seconds; a first stage of two takes the share ``shallow`` of it."""
    shares = (1.0,) if len(experiment.stages) == 1 else (shallow, 1 - shallow)
    return tuple(
        max(1, int(share * budget / seconds[stage.name]))
        for stage, share in zip(experiment.stages, shares, strict=True)
    )
