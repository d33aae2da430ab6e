"""Trains as one of the processes of a torchrun, in float64: where last bits decide nothing, curves must be the same.

python -m torch.distributed.run --nproc-per-node 2 ranks_program.py FOLDER PARALLEL LEAVE_AFTER [RECIPE]

RECIPE, with its numbers and a short first stage, or else the small experiment, with its dropout and its penalty. It
goes on where FOLDER has a run, and leaves after step LEAVE_AFTER + 1. While a solve is under way every collective is
an error; the first rank writes into FOLDER/solves.json how many solves there were, and the last rank's numbers beside.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import equilibria.core.solve
import equilibria.gradients.linearise
from equilibria.lm.corpora import Corpus
from equilibria.lm.experiments import Experiment
from equilibria.lm.ranks import Ranks
from equilibria.lm.recipes import RECIPES
from equilibria.lm.runs import Run
from equilibria.lm.training import Trainer
from equilibria.lm.training.trainer import TrainingInterrupted
from small_experiment import corpus, experiment

SOLVES = {"count": 0, "collectives outside": 0}


class Collectives(TorchDispatchMode):
    """Counts collectives; inside a solve they are an error."""

    inside = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            if Collectives.inside:
                raise AssertionError(f"{func} inside a solve")
            SOLVES["collectives outside"] += 1
        return func(*args, **(kwargs or {}))


class Counted:
    """A safetensors file whose slices that are read are counted, in bytes."""

    total = 0
    open_file = safetensors.safe_open

    def __init__(self, *given: Any, **named: Any) -> None:
        self.file = Counted.open_file(*given, **named)

    def __enter__(self) -> Counted:
        self.inner = self.file.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.file.__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def get_slice(self, name: str) -> Any:
        """A slice of a tensor that counts what is taken of it."""
        return CountedSlice(self.inner.get_slice(name))


class CountedSlice:
    """One tensor of such a file."""

    def __init__(self, part: Any) -> None:
        self.part = part

    def __getitem__(self, index: Any) -> torch.Tensor:
        tensor = self.part[index]
        Counted.total += tensor.nbytes
        return tensor

    def __getattr__(self, name: str) -> Any:
        return getattr(self.part, name)


def watched(solve: Any) -> Any:
    """The solve, during which no collective may be issued."""

    def inner(*given: Any, **named: Any) -> Any:
        SOLVES["count"] += 1
        with Collectives():
            Collectives.inside = True
            try:
                return solve(*given, **named)
            finally:
                Collectives.inside = False

    return inner


def chosen(recipe: str | None, parallel: Any) -> tuple[Experiment, Corpus]:
    """What is trained."""
    if recipe is None:
        return experiment(parallel=parallel), corpus()
    value = RECIPES[recipe]()
    quick = {"log_every": 1, "valid_segments": 4, "baseline": False, "measure_memory": False, "spectral_radius": 0}
    training = value.training.changed(**quick, parallel=parallel, threads=1)
    first, *others = value.stages
    value = dataclasses.replace(value, stages=(dataclasses.replace(first, steps=20), *others), training=training)
    return value, value.corpus.load()


def main(folder: Path, parallel: Any, leave_after: int, recipe: str | None = None) -> None:
    """Train."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    safetensors.safe_open = Counted
    for module in (equilibria.core.solve, equilibria.gradients.linearise):  # where it is called
        module.solve_from = watched(module.solve_from)
    with Ranks.joined(parallel, "cpu", timeout=60) as ranks:
        every = ranks.of_all(train(folder, parallel, leave_after, recipe, ranks))
        if ranks.first:
            (folder / "solves.json").write_text(json.dumps(every))
    threads = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").glob("*")]
    assert not any("gloo" in name for name in threads), f"{threads} outlive the group"


def train(folder: Path, parallel: Any, leave_after: int, recipe: str | None, ranks: Ranks) -> dict[str, int]:
    """Train; returns what there is to tell of this rank."""
    value, text = chosen(recipe, parallel)
    resume = ranks.of_first((folder / "experiment.json").is_file())
    if ranks.first:
        Run.start(folder, value, resume=resume)
    ranks.wait()

    def on_event(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == leave_after:
            trainer.leaving = True

    trainer = Trainer(value, Run.open(folder), text, on_event=on_event, ranks=ranks)
    if resume:
        trainer.resume()
    with Collectives(), contextlib.suppress(TrainingInterrupted):
        trainer.fit()
    states = [value for state in trainer.optimiser.state.values() for value in state.values()]
    held = sum(
        tensor.to_local().nbytes if hasattr(tensor, "to_local") else tensor.nbytes
        for tensor in [*trainer.model.parameters(), *states]
    )
    return {**SOLVES, "bytes of weights and optimiser": held, "bytes read in slices": Counted.total}


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), *sys.argv[4:])
