"""A training step and an evaluation of DEQ-TrellisNet beside its explicit network of 60 layers: memory and time.

python benchmarks/trellis.py train --data FOLDER --run RUN [--shallow 150 --implicit 200]
    trains the recipe ptb-trellis for a short while (segments of 35), so that the weights are none that were just
    drawn: fresh ones are solved in fewer evaluations
python benchmarks/trellis.py measure --data FOLDER --run RUN [--repeats 2]
    measures all networks with these weights at the size of the recipe (24M parameters, batch 16 × 110), interleaved;
    writes results/trellis.json and its part of docs/evidence/reproducing.md
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from machine import publish
from steps import compare, table
from torch import Tensor

from equilibria import Anderson, Broyden, Implicit, Method, Picard, Solver, Stop, solve
from equilibria.lm.corpora import Segments
from equilibria.lm.experiments import (
    Batches,
    Experiment,
    Faults,
    Logging,
    Optimisation,
    Stage,
    Training,
    Validation,
    network_of,
)
from equilibria.lm.model import Explicit, LanguageModel
from equilibria.lm.model.modes import eval_mode
from equilibria.lm.recipes import ptb_trellis
from equilibria.lm.runs import Run
from equilibria.lm.runs.trained import load, with_data
from equilibria.lm.training import Trainer

DEPTH = 60


def short(data: Path, *, shallow: int, implicit: int) -> Experiment:
    """The recipe with few steps, of short segments; sizes, dropout rates, optimiser and clipping are its own."""
    whole = with_data(ptb_trellis(), data)
    solver, stop = Picard(), Stop(rtol=1e-2, max_evals=40)
    stages = (
        network_of(3, name="shallow", steps=shallow),
        Stage("implicit", steps=implicit, method=Method(solver, stop, Implicit(solver, stop))),
    )
    training = Training(
        batches=Batches(batch_size=16, segment_length=35),
        optimisation=Optimisation(optimiser="sgd", learning_rate=20.0, clip=0.225),
        validation=Validation(valid_every=50, valid_segments=4, eval_batch_size=12),
        faults=Faults(checkpoint_every=50),
        log=Logging(spectral_radius=0, measure_memory=False),
    )
    return dataclasses.replace(whole, name="ptb-trellis-short", stages=stages, training=training)


@dataclasses.dataclass(frozen=True)
class Network:
    """One row of the table."""

    name: str
    recurrence: str
    solver: Solver | None = None
    adjoint: Solver | None = None
    checkpoint: bool = False
    warm: bool = False
    best: bool = True
    """Whether the adjoint's solve keeps the iterate with the smallest residual, beside the current one."""

    def method(self, stop: Stop) -> Method | None:
        """How it solves; None for an explicit network."""
        if self.solver is None or self.adjoint is None:
            return None
        return Method(self.solver, stop, Implicit(self.adjoint, dataclasses.replace(stop, best=self.best)))

    @property
    def explicit(self) -> Explicit | None:
        """The network in the place of an equilibrium, if it is one."""
        return Explicit(DEPTH, checkpoint=self.checkpoint) if self.solver is None else None


NETWORKS = (
    Network("equilibrium, scan, Picard", "scan", Picard(), Picard(), best=False),
    Network("equilibrium, scan, Picard, warm", "scan", Picard(), Picard(), best=False, warm=True),
    Network("equilibrium, scan, Anderson(3)", "scan", Anderson(window=3), Anderson(window=3)),
    Network("equilibrium, scan, Broyden(20)", "scan", Broyden(rank=20), Broyden(rank=20)),
    Network("equilibrium, delayed, Picard", "delayed", Picard(), Picard(), best=False),
    Network(f"{DEPTH} layers", "delayed"),
    Network(f"{DEPTH} layers, checkpointed", "delayed", checkpoint=True),
)


def built(network: Network, config: Any, weights: dict[str, Tensor], stop: Stop, words: int) -> LanguageModel:
    """The model of a network with the trained weights, in training mode."""
    cell = dataclasses.replace(config.cell, recurrence=network.recurrence)
    config = dataclasses.replace(config, cell=cell, explicit=network.explicit)
    model = config.build(words, method=network.method(stop))
    model.load_state_dict(weights)
    return model.train()


def measure(data: Path, run: Path, *, repeats: int, rtol: float) -> list[dict[str, Any]]:
    """All rows, the times interleaved over the networks."""
    loaded = load(run, data=data)
    experiment, weights = with_data(ptb_trellis(), data), loaded.model.state_dict()
    words, stop = loaded.model.vocabulary_size, Stop(rtol=rtol, max_evals=120)
    training = experiment.training
    batches = iter(
        Segments(loaded.corpus.train, batch_size=training.batches.batch_size, length=training.batches.segment_length)
    )
    past, segment = next(batches), next(batches)
    models = {network.name: built(network, experiment.model, weights, stop, words) for network in NETWORKS}
    with eval_mode(loaded.model):
        memory = loaded.model(past.tokens, past.targets).memory
    warm = [network.name for network in NETWORKS if network.warm]
    rows = compare(models, segment, lambda _: memory, base=f"{DEPTH} layers", repeats=repeats, warm=warm)
    return [row | {"rtol": rtol} for row in rows]


def starts(data: Path, run: Path, *, rtol: float) -> list[dict[str, Any]]:
    """Evaluations to the tolerance from other starts than zero, in evaluation mode."""
    loaded = load(run, data=data)
    training, stop = ptb_trellis().training, Stop(rtol=rtol, max_evals=120)
    batches = iter(
        Segments(loaded.corpus.train, batch_size=training.batches.batch_size, length=training.batches.segment_length)
    )
    past, segment = next(batches), next(batches)
    rows = []
    for recurrence in ("scan", "delayed"):
        network = Network(recurrence, recurrence, Picard(), Picard())
        config, words = ptb_trellis().model, loaded.model.vocabulary_size
        model = built(network, config, loaded.model.state_dict(), stop, words)
        cell: Any = model.layer.cell
        with eval_mode(model):
            before = model(past.tokens, past.targets).layer
            prepared = cell.prepare(model.embedding(segment.tokens), before.memory)
            zero = cell.start(prepared)
            candidates = {
                "zero": zero,
                "the last state of the past at all times": before.z[:, -1:].expand_as(zero),
                "the states of the segment before": before.z,
            }
            for name, start in candidates.items():
                solution = solve(lambda z: cell(z, prepared), start, Picard(), stop)  # noqa: B023
                evals = (solution.steps + 1).double().mean()
                rows.append({"recurrence": recurrence, "start": name, "evals": float(evals)})
                print(rows[-1], flush=True)
    return rows


def history(run: Path) -> list[dict[str, Any]]:
    """The validations of the short training, up to the weights that were measured."""
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    fields = ("step", "stage", "seconds", "perplexity", "forward")
    return [{name: event[name] for name in fields} for event in events if event["event"] == "valid"]


def table_of_starts(rows: list[dict[str, Any]]) -> str:
    """For the documentation."""
    lines = ["| start | evaluations, scan | evaluations, delayed |", "|---|---:|---:|"]
    for start in dict.fromkeys(row["start"] for row in rows):
        found = {row["recurrence"]: row["evals"] for row in rows if row["start"] == start}
        lines.append(f"| {start} | {found['scan']:.1f} | {found['delayed']:.1f} |")
    return "\n".join(lines)


def train(data: Path, run: Path, *, shallow: int, implicit: int) -> None:
    """The short training; prints its validations."""
    experiment = short(data, shallow=shallow, implicit=implicit)

    def show(event: dict[str, Any]) -> None:
        if event["event"] == "valid":
            print(event["step"], event["stage"], event["perplexity"], event["forward"], flush=True)

    Trainer(experiment, Run.start(run, experiment, overwrite=True), experiment.corpus.load(), on_event=show).fit()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "measure"))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--shallow", type=int, default=150)
    parser.add_argument("--implicit", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--rtol", type=float, default=1e-3)
    given = parser.parse_args()
    if given.what == "train":
        train(given.data, given.run, shallow=given.shallow, implicit=given.implicit)
    else:
        others = starts(given.data, given.run, rtol=given.rtol)
        found = measure(given.data, given.run, repeats=given.repeats, rtol=given.rtol)
        text = f"{table(found)}\n\n{table_of_starts(others)}"
        publish("trellis", {"training": history(given.run), "networks": found, "starts": others}, text)
