"""An experiment that takes a second and uses everything whose state a checkpoint must hold."""

import atexit
import dataclasses
import functools
import random
import shutil
import tempfile
from pathlib import Path

import torch

from equilibria.cells import TransformerConfig
from equilibria.core.stop import Stop
from equilibria.fixed_point import Method
from equilibria.gradients import Implicit, Unroll
from equilibria.lm.corpora import Corpus, PythonDocs, Stream, Vocabulary
from equilibria.lm.experiments import Experiment, Stage, Training
from equilibria.lm.model import LanguageConfig
from equilibria.lm.runs import Run
from equilibria.lm.training import Trainer
from equilibria.solvers import Anderson, Picard

TEXT = "the fixed point of a map is where the map leaves it; " * 30
SOLVER, STOP = Anderson(window=3), Stop(rtol=1e-2, max_evals=8)


def corpus() -> Corpus:
    vocabulary = Vocabulary.of_tokens(sorted(set(TEXT)), "character")
    ids = vocabulary.encode(TEXT)
    train, valid, test = (Stream.of_text(part) for part in ids.split([len(ids) - 400, 200, 200]))
    return Corpus(name="a sentence", train=train, valid=valid, test=test, vocabulary=vocabulary, unit="character")


def experiment(**training) -> Experiment:
    """Dropout, a penalty drawn at random, memory, two stages, and an epoch that ends in the middle."""
    numbers = {
        "batch_size": 4,
        "segment_length": 20,
        "learning_rate": 1e-2,
        "warmup": 3,
        "log_every": 1,
        "valid_every": 5,
        "checkpoint_every": 4,
        "eval_batch_size": 2,
        "valid_segments": 2,
        "spectral_radius": 3,
        "measure_memory": False,
        "device": "cpu",
        "threads": 1,
    }
    cell = TransformerConfig(width=8, heads=2, inner=12, memory=30, dropout=0.1, attention_dropout=0.1)
    return Experiment(
        name="small",
        corpus=PythonDocs(),
        model=LanguageConfig(cell=cell, dropout=0.1),
        stages=(
            Stage(
                name="shallow",
                steps=6,
                method=Method(Picard(), Stop(rtol=0, atol=0, max_evals=4, best=False), Unroll()),
            ),
            Stage(
                name="implicit",
                steps=12,
                method=Method(SOLVER, STOP, Implicit(solver=SOLVER, stop=STOP)),
                penalty=0.1,
                penalty_share=0.5,
            ),
        ),
        training=Training().changed(**(numbers | training)),
    )


def trained_weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def without_times(events: list[dict]) -> list[dict]:
    return [
        {k: v for k, v in event.items() if k not in ("seconds", "step_seconds", "tokens_per_second")}
        for event in events
    ]


def with_stage(value: Experiment, index: int, **changes) -> Experiment:
    """The experiment with another stage: fields of the stage, or, by their own names, of its method."""
    stages, names = list(value.stages), {field.name for field in dataclasses.fields(Method)}
    method = {name: changes.pop(name) for name in names & changes.keys()}
    if method:
        changes["method"] = dataclasses.replace(stages[index].method, **method)
    stages[index] = dataclasses.replace(stages[index], **changes)
    return dataclasses.replace(value, stages=tuple(stages))


class Killed(BaseException):
    """No handler of the library may catch this."""


def finished(
    path: Path, value: Experiment | None = None, *, resume: bool = False, on_event=None
) -> tuple[dict[str, torch.Tensor], list[dict]]:
    """The weights and the log of a run that is started, or goes on, and ends or is killed."""
    value = value or experiment()
    torch.manual_seed(random.randrange(1000))  # the process that goes on has other random numbers
    run = Run.start(path, value, resume=resume)
    trainer = Trainer(value, run, corpus(), on_event=on_event)
    if resume:
        trainer.resume()
    trainer.fit()
    return trained_weights(trainer), run.events()


def kill_at(step: int):
    """Kills a run when it logs this step."""

    def on_event(event):
        if event["step"] == step:
            raise Killed

    return on_event


@functools.cache
def trained_once(number: int | None) -> tuple[Path, dict[str, torch.Tensor] | None]:
    """The folder of a run of ``experiment()``, whole with its weights or killed after ``number`` lines of its log."""
    place, lines = tempfile.mkdtemp(prefix="equilibria-"), []
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    folder = Path(place) / "run"

    def on_event(event):
        lines.append(event)
        if len(lines) == number:
            raise Killed

    try:
        weights, _ = finished(folder, on_event=on_event)
    except Killed:
        return folder, None
    assert number is None
    return folder, weights


def whole(path: Path) -> tuple[dict[str, torch.Tensor], list[dict]]:
    """As ``finished(path)``, by a copy of a run that is trained once for all tests."""
    folder, weights = trained_once(None)
    shutil.copytree(folder, path)
    return {name: tensor.clone() for name, tensor in weights.items()}, Run.open(path).events()


def killed(path: Path, number: int) -> None:
    """What a run leaves at ``path`` that is killed after ``number`` lines of its log; copied like ``whole``."""
    folder, weights = trained_once(number)
    assert weights is None
    shutil.copytree(folder, path)
