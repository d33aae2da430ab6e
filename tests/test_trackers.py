"""Trackers: what is sent to TensorBoard, Trackio and Weights & Biases, and what happens if they are missing or fail."""

from __future__ import annotations

import dataclasses
import importlib.machinery
import importlib.util
import logging
import math
import sys
import types

import pytest

from equilibria.__main__ import main
from equilibria.lm.experiments import Logging
from equilibria.lm.experiments.serialise import from_json, to_json
from equilibria.lm.runs import Run
from equilibria.lm.training import Trainer
from equilibria.lm.training.tracker import Tracker, TrackerError, module_of, numbers_of
from slow_cases import some_slow
from small_experiment import corpus, experiment, same_bits, trained_weights, without_times


class Remote:
    """A run at a service that keeps the calls; it fails from the call ``fails`` on."""

    def __init__(self, settings, fails=math.inf):
        self.settings, self.fails, self.calls, self.metrics, self.finished = settings, fails, [], [], 0

    def log(self, values, step=None):
        if len(self.calls) >= self.fails:
            raise ConnectionError("the line is dead")
        self.calls.append((step, values))

    def define_metric(self, name, *, step_metric):
        self.metrics.append((name, step_metric))

    def finish(self):
        self.finished += 1


class Settings:
    def __init__(self, *, console):
        self.console = console


@pytest.fixture(params=[*some_slow("trackio"), "wandb"])
def service(request, monkeypatch):
    """A package of the service that records what it is given."""
    module = types.ModuleType(request.param)
    module.__spec__ = importlib.machinery.ModuleSpec(request.param, None, origin="fake")
    module.runs, module.fails, module.Settings = [], math.inf, Settings

    def init(**settings):
        if module.fails < 0:
            raise RuntimeError("no account")
        module.runs.append(Remote(settings, module.fails))
        return module.runs[-1]

    module.init = init
    monkeypatch.setitem(sys.modules, request.param, module)
    return module


def trained(path, name, *, resume=False, steps=None):
    value = experiment(tracker=name)
    run = Run.start(path, value, resume=resume)
    trainer = Trainer(value, run, corpus())
    if resume:
        trainer.resume()
    trainer.fit()
    return run, trainer


def sent(remote):
    """The step and the numbers of each call, of either service."""
    return [
        (values.get("training_step", step), {name: v for name, v in values.items() if name != "training_step"})
        for step, values in remote.calls
    ]


def test_every_number_of_the_log_is_sent_under_its_name(tmp_path, service):
    run, _ = trained(tmp_path / "mine", service.__name__)
    (remote,) = service.runs
    assert sent(remote) == [(event["step"], pytest.approx(numbers_of(event))) for event in run.events()]
    assert remote.settings["project"] == "equilibria"
    assert remote.settings["name"] == "mine"
    assert from_json(remote.settings["config"]) == experiment(tracker=service.__name__)
    assert remote.finished == 1


def test_numbers_are_named_by_their_event_and_settings_are_none():
    event = {"event": "valid", "step": 3, "bits": 2, "best": True, "forward": {"evals": 4.5}, "stage": "a", "x": None}
    assert numbers_of({**event, "setting": {"rtol": 0.1}}) == {
        "valid/bits": 2.0,
        "valid/best": 1.0,
        "valid/forward/evals": 4.5,
    }


def test_steps_that_go_back_have_an_axis_of_their_own(tmp_path, service):
    trained(tmp_path / "run", service.__name__)
    remote = service.runs[0]
    if service.__name__ == "wandb":
        assert remote.metrics == [("*", "training_step")]
        assert all(step is None for step, _ in remote.calls)
        assert remote.settings["settings"].console == "off"
    else:
        assert all("training_step" not in values for _, values in remote.calls)


def test_a_tracker_that_fails_is_dropped_with_one_warning_and_the_training_ends(tmp_path, service, caplog):
    service.fails = 7
    plain = Run.start(tmp_path / "plain", experiment())
    before = Trainer(experiment(), plain, corpus())
    before.fit()
    with caplog.at_level(logging.WARNING):
        run, after = trained(tmp_path / "run", service.__name__)
    warnings = [record.message for record in caplog.records if "tracker" in record.message]
    assert len(warnings) == 1
    assert "ConnectionError: the line is dead" in warnings[0]
    assert service.runs[0].finished == 1
    assert len(service.runs[0].calls) == 7
    assert same_bits(trained_weights(before), trained_weights(after))
    assert without_times(run.events()) == without_times(plain.events())


def test_a_tracker_is_closed_when_a_training_is_interrupted(tmp_path, service):
    value = experiment(tracker=service.__name__)
    trainer = Trainer(value, Run.start(tmp_path / "run", value), corpus())
    trainer.leaving = True
    with pytest.raises(Exception, match="interrupted on request after step 1"):
        trainer.fit()
    assert service.runs[0].finished == 1
    trained(tmp_path / "run", service.__name__, resume=True)
    assert sent(service.runs[1])[0][0] == 2
    assert [remote.settings.get("resume") for remote in service.runs] == (
        ["never", "allow"] if service.__name__ == "trackio" else [None, None]
    )


def test_a_service_that_cannot_begin_says_so_before_the_first_step(tmp_path, service):
    service.fails = -1
    with pytest.raises(
        TrackerError, match=r"could not begin \(RuntimeError: no account\).*--training\.tracker"
    ) as error:
        trained(tmp_path / "run", service.__name__)
    assert ("WANDB_MODE=offline" in str(error.value)) is (service.__name__ == "wandb")
    assert Run.open(tmp_path / "run").events() == []


@pytest.mark.parametrize("name", ["tensorboard", "trackio", "wandb"])
def test_a_missing_package_is_named_with_its_extra_and_leaves_no_run(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if name == "tensorboard" else name, None)
    assert main(["train", "tiny", "--out", "run", "--training.tracker", name]) == 1
    assert f'pip install "equilibria[{name}]"' in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ModuleNotFoundError, match=rf'--training\.tracker {name}.*"equilibria\[{name}\]"'):
        trained(tmp_path / "run", name)


def test_a_folder_that_wandb_has_left_is_not_the_package(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(ModuleNotFoundError, match="not installed"):
        module_of("wandb")
    sys.modules.pop("wandb", None)


def test_the_older_name_of_the_setting_still_works():
    assert Logging().tracker_name == "none"
    assert Logging(tensorboard=True).tracker_name == Logging(tracker="tensorboard").tracker_name == "tensorboard"
    assert Logging(tensorboard=True, tracker="tensorboard").tracker_name == "tensorboard"
    with pytest.raises(ValueError, match="one tracker at a time"):
        Logging(tracker="wandb", tensorboard=True)
    stored = to_json(experiment())
    del stored["training"]["log"]["tracker"]  # as of a run before there were trackers
    assert from_json(stored) == experiment()


def test_there_are_no_other_trackers(unhooked):
    with pytest.raises(ValueError, match=r"tracker='neptune'.*'none', 'tensorboard', 'trackio', 'wandb'"):
        Logging(tracker="neptune")


def test_the_interface_is_two_methods():
    assert Tracker.__abstractmethods__ == {"log", "close"}


def test_the_tracker_has_no_influence_and_may_change_on_the_way(tmp_path, service):
    value = experiment()
    trainer = Trainer(value, Run.start(tmp_path / "run", value), corpus())
    trainer.leaving = True
    with pytest.raises(Exception, match="interrupted"):
        trainer.fit()
    run, _ = trained(tmp_path / "run", service.__name__, resume=True)
    assert run.experiment() == dataclasses.replace(experiment(tracker=service.__name__))


@pytest.mark.skipif(importlib.util.find_spec("trackio") is None, reason="trackio is not installed")
def test_trackio_keeps_the_numbers(tmp_path, monkeypatch):
    import sqlite3

    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "tracked"))
    run, _ = trained(tmp_path / "mine", "trackio")
    with sqlite3.connect(next((tmp_path / "tracked").glob("*.db"))) as database:
        rows = database.execute("select count(*) from metrics where run_name = 'mine'").fetchone()
    assert rows[0] == len(run.events())


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_keeps_the_numbers_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    trained(tmp_path / "mine", "wandb")
    (file,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    assert b"valid/bits_per_byte" in file.read_bytes()
