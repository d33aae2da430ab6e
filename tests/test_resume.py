"""A run that was stopped at any moment and goes on ends with the same weights, bit for bit, as one never stopped."""

import dataclasses
import functools
import itertools
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from equilibria.lm.corpora import TextFolder
from equilibria.lm.experiments import NonMonotone, Plateau
from equilibria.lm.runs import CheckpointError, Run, checkpoint
from equilibria.lm.runs.weights import weights
from equilibria.lm.training import Trainer
from slow_cases import some_slow
from small_experiment import Killed, corpus, experiment, finished, kill_at, killed, same_bits, whole, without_times


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return whole(tmp_path_factory.mktemp("run") / "whole")


def killed_after(number: int):
    seen = 0

    def on_event(_):
        nonlocal seen
        seen += 1
        if seen == number:
            raise Killed

    return on_event


@pytest.mark.parametrize("number", [1, 14, *some_slow(9, 11, 13, 15, 20, 27, 34)])
def test_stopped_after_any_line_of_the_log(tmp_path, uninterrupted, number):
    weights, events = uninterrupted
    with pytest.raises(Killed):
        finished(tmp_path / "run", on_event=killed_after(number))
    resumed, resumed_events = finished(tmp_path / "run", resume=True)
    assert same_bits(resumed, weights)
    assert without_times(resumed_events) == without_times(events)


@pytest.mark.slow
def test_stopped_again_and_again(tmp_path, uninterrupted):
    weights, events = uninterrupted
    for number in (14, 9, 2, 8, 10):
        with pytest.raises(Killed):
            finished(tmp_path / "run", resume=True, on_event=killed_after(number))
    resumed, resumed_events = finished(tmp_path / "run", resume=True)
    assert same_bits(resumed, weights)
    assert without_times(resumed_events) == without_times(events)


DECAYS = {
    "sgd": {"optimiser": "sgd", "momentum": 0.5, "decay": NonMonotone(window=1, divide=1.5, floor=0.0)},
    "asgd": {"optimiser": "asgd", "decay": NonMonotone(window=1)},
    "plateau": {"decay": Plateau(patience=0, divide=1.5), "overlap": 13},
}


def decaying(name):
    """Too fast to be good, so that validations get worse again and again."""
    rate = {"learning_rate": 0.1} if name == "plateau" else {"learning_rate": 20.0, "warmup": 0}
    return experiment(valid_every=1, checkpoint_every=3, spectral_radius=0, **rate, **DECAYS[name])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("decaying")


@functools.cache
def trained(folder, name):
    """The weights and the log of the run that is trained at ``folder``."""
    return finished(folder, decaying(name))


@pytest.fixture(params=DECAYS)
def decayed(request, place):
    weights, events = trained(place / request.param, request.param)
    rates = {event["learning_rate"] for event in events if event["event"] == "step"}
    assert len(rates) == 1 if request.param == "asgd" else len(rates) > 3
    return request.param, weights, events


@pytest.mark.parametrize("step", [11, *some_slow(3, 7, 12, 14, 17)])
def test_what_the_validations_have_done_is_remembered(tmp_path, decayed, step):
    name, weights, events = decayed
    with pytest.raises(Killed):
        finished(tmp_path / "run", decaying(name), on_event=kill_at(step))
    resumed, resumed_events = finished(tmp_path / "run", decaying(name), resume=True)
    assert same_bits(resumed, weights)
    assert without_times(resumed_events) == without_times(events)


def test_averages_and_weights_are_both_in_the_checkpoint(tmp_path, place):
    trained(place / "asgd", "asgd")
    shutil.copytree(place / "asgd", tmp_path / "run")
    newest = Run(tmp_path / "run").newest()
    assert newest.state["validated"]["divisions"] > 0
    trainer = Trainer(decaying("asgd"), Run(tmp_path / "run"), corpus())
    trainer.resume()
    raw = weights(trainer.model)
    assert same_bits(newest.optimiser["weights"], raw)
    assert newest.model.keys() == raw.keys()
    assert not same_bits(newest.model, raw)


def test_checkpoints_and_runs_that_lack_newer_fields_go_on(tmp_path, uninterrupted):
    """They are of this format, and say nothing of decays, of validations and of overlaps."""
    killed(tmp_path / "run", 25)
    run = Run(tmp_path / "run")
    newest, described = run.newest(), json.loads(run.description.read_text())
    state = {name: value for name, value in newest.state.items() if name != "validated"}
    checkpoint.save(run.checkpoints, dataclasses.replace(newest, state=state))
    for group, name in (("optimisation", "decay"), ("optimisation", "momentum"), ("validation", "eval_overlap")):
        del described["training"][group][name]
    assert described["format"] == 3
    run.description.write_text(json.dumps(described))
    resumed, _ = finished(tmp_path / "run", resume=True)
    assert same_bits(resumed, uninterrupted[0])


@pytest.mark.parametrize("seed", range(3))
def test_power_fails_while_a_checkpoint_is_written(tmp_path, uninterrupted, seed, monkeypatch):
    """The n-th time that a file is forced to the disk, the run ends."""
    weights, _ = uninterrupted
    remaining = random.Random(seed).randrange(1, 60)

    def failing(handle, fsync=os.fsync):
        nonlocal remaining
        remaining -= 1
        if remaining == 0:
            raise Killed
        fsync(handle)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(Killed):
        finished(tmp_path / "run")
    resumed, _ = finished(tmp_path / "run", resume=True)
    assert same_bits(resumed, weights)


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path, uninterrupted, caplog):
    killed(tmp_path / "run", 25)
    good, bad = checkpoint.all_in(tmp_path / "run" / "checkpoints")[-2:]
    (bad / "model.safetensors").write_bytes(b"\0" * 100)
    with caplog.at_level(logging.WARNING):
        resumed, _ = finished(tmp_path / "run", resume=True)
    assert same_bits(resumed, uninterrupted[0])
    assert f"{bad} is damaged" in caplog.text
    assert str(good) in caplog.text


def test_checkpoints_written_after_damaged_ones_stay(tmp_path, uninterrupted):
    """The damaged ones have higher numbers, and are not the newest for all that."""
    with pytest.raises(Killed):
        finished(tmp_path / "run", on_event=killed_after(30))
    folder = tmp_path / "run" / "checkpoints"
    _, *rest = checkpoint.all_in(folder)
    for step in (*rest, folder / "step-00000016", folder / "step-00000017"):
        step.mkdir(exist_ok=True)
        (step / "model.safetensors").write_bytes(b"")
    run = Run(tmp_path / "run")
    trainer = Trainer(experiment(), run, corpus())
    done = trainer.resume()
    assert [int(entry.name[5:]) for entry in checkpoint.all_in(folder)] == [done]
    for segment in itertools.islice(trainer._segments(), 2):
        trainer.step(segment)
    trainer._checkpoint()
    assert run.newest().step == done + 2
    resumed, _ = finished(tmp_path / "run", resume=True)
    assert same_bits(resumed, uninterrupted[0])


@pytest.mark.slow
def test_what_has_no_influence_may_change_on_the_way(tmp_path, uninterrupted, caplog):
    killed(tmp_path / "run", 25)
    changed = experiment(log_every=3, keep=5, memory_depths=(2,), threads=2, device="auto", tensorboard=True)
    with caplog.at_level(logging.WARNING):
        resumed, _ = finished(tmp_path / "run", changed, resume=True)
    assert all(torch.allclose(resumed[name], uninterrupted[0][name], atol=1e-4) for name in resumed)
    assert Run(tmp_path / "run").experiment() == changed
    assert "trained with threads = 1 and the training continues with 2" in caplog.text
    assert "--training.threads 1 avoids this" in caplog.text
    with pytest.raises(ValueError, match=r"training\.optimisation\.clip = 0\.25 and cannot be continued with 1\.0"):
        finished(
            tmp_path / "run",
            dataclasses.replace(changed, training=changed.training.changed(clip=1.0)),
            resume=True,
        )


def test_a_stage_that_was_added_is_named_before_its_fields(tmp_path):
    value = experiment()
    run = Run.start(tmp_path / "run", value)
    more = dataclasses.replace(value, stages=(*value.stages, dataclasses.replace(value.stages[1], name="third")))
    with pytest.raises(ValueError, match=r"started with stages\.2\.kind = None and cannot be continued with 'Stage'"):
        run.go_on(more)


def test_another_device_is_named(tmp_path, caplog):
    killed(tmp_path / "run", 25)
    newest = Run(tmp_path / "run").newest()
    elsewhere = dataclasses.replace(newest, state={**newest.state, "device": "cuda"})
    checkpoint.save(tmp_path / "run" / "checkpoints", elsewhere)
    with caplog.at_level(logging.WARNING):
        Trainer(experiment(), Run(tmp_path / "run"), corpus()).resume()
    assert "trained with device = cuda and the training continues with cpu" in caplog.text


def test_a_folder_of_text_may_have_moved(tmp_path):
    value = dataclasses.replace(experiment(), corpus=TextFolder(root=tmp_path / "here", unit="character"))
    Run.start(tmp_path / "run", value)
    moved = dataclasses.replace(value, corpus=TextFolder(root=tmp_path / "there", unit="character"))
    run = Run.start(tmp_path / "run", moved, resume=True)
    assert run.experiment() == value  # until the text is known to be the same
    run.go_on(moved)
    assert run.experiment() == moved
    with pytest.raises(ValueError, match=r"corpus\.unit"):
        Run.start(tmp_path / "run", dataclasses.replace(moved, corpus=TextFolder(root=tmp_path)), resume=True)


def test_if_all_are_damaged_the_run_is_refused(tmp_path):
    killed(tmp_path / "run", 25)
    for folder in checkpoint.all_in(tmp_path / "run" / "checkpoints"):
        (folder / "optimiser.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="no good one in this run"):
        finished(tmp_path / "run", resume=True)


def test_a_torn_last_line_is_dropped(tmp_path, uninterrupted):
    killed(tmp_path / "run", 25)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as log:
        log.write('{"event": "step", "st')
    _, events = finished(tmp_path / "run", resume=True)
    assert without_times(events) == without_times(uninterrupted[1])


def test_a_finished_run_stays_as_it_is(tmp_path):
    weights, events = whole(tmp_path / "run")
    again, events_again = finished(tmp_path / "run", resume=True)
    assert same_bits(weights, again)
    assert without_times(events) == without_times(events_again)


def test_seconds_add_up(tmp_path):
    killed(tmp_path / "run", 25)
    before = checkpoint.load(checkpoint.all_in(tmp_path / "run" / "checkpoints")[-1]).state["seconds"]
    _, events = finished(tmp_path / "run", resume=True)
    seconds = [event["seconds"] for event in events if "seconds" in event]
    assert before > 0
    assert seconds == sorted(seconds)


def test_the_checkpoint_of_another_model_is_refused(tmp_path):
    value = experiment()
    whole(tmp_path / "run")
    wider = dataclasses.replace(value, model=dataclasses.replace(value.model, tied=False))
    with pytest.raises(
        CheckpointError, match=r"another model: head\.weight is missing in it and \[19, 8\] in the model"
    ):
        Trainer(wider, Run(tmp_path / "run"), corpus()).resume()


SCRIPT = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from small_experiment import corpus, experiment, trained_weights
from equilibria.lm.runs import Run
from equilibria.lm.training import Trainer

path, value = Path(sys.argv[1]), experiment(checkpoint_every=1, keep=1)
trainer = Trainer(value, Run.start(path, value, resume=True), corpus())
trainer.resume()
print("begins", flush=True)
trainer.fit()
torch.save(trained_weights(trainer), path / "weights.pt")
"""


@pytest.mark.slow
def test_sigkill_at_random_moments(tmp_path):
    value, moments = experiment(checkpoint_every=1, keep=1), random.Random(0)
    expected, _ = finished(tmp_path / "whole", value)
    folder = tmp_path / "run"
    kills = 0
    for attempt in range(20):
        paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        with subprocess.Popen(
            [sys.executable, "-c", SCRIPT, folder], stdout=subprocess.PIPE, env=environment
        ) as process:
            assert process.stdout is not None
            if process.stdout.readline() and attempt < 4:
                time.sleep(moments.uniform(0.01, 0.3))
                process.send_signal(signal.SIGKILL)
        kills += process.returncode == -signal.SIGKILL
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL
    assert kills >= 2
    assert same_bits(torch.load(folder / "weights.pt"), expected)
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [event["step"] for event in steps if event["event"] == "step"] == list(range(1, 19))
