"""What happens to real runs: asked to leave, started twice, out of disk, with a dead rank; nothing is lost."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

from equilibria.__main__ import main
from equilibria.commands.errors import LOST, explain
from equilibria.lm.runs import Run, checkpoint
from equilibria.lm.runs.checkpoint import Checkpoint, CheckpointError
from equilibria.lm.runs.folder import locked
from equilibria.lm.training import Trainer
from equilibria.lm.training.trainer import TrainingInterrupted
from small_experiment import corpus, experiment, finished, same_bits, trained_weights, whole
from small_run import fails, furnish
from spawned import waiting

WORDS = ["tiny", "--training.threads", "1", "--training.baseline", "False", "--training.checkpoint-every", "1000"]
WORDS += ["--training.log-every", "1", "--quiet"]


def started(out, *words, launcher=()):
    """`equilibria train tiny` in the background, after its first steps."""
    command = [sys.executable, *launcher, "-m", "equilibria", "train", *WORDS, "--out", str(out), *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        log = out / "metrics.jsonl"
        if log.is_file() and '"step": 3,' in log.read_text():
            return process
        time.sleep(0.05)
    process.kill()
    raise AssertionError(process.communicate()[1])


@pytest.mark.slow
def test_on_sigterm_a_checkpoint_is_written_and_the_next_command_named(tmp_path):
    out = tmp_path / "run"
    process = started(out)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143
    (kept,) = checkpoint.all_in(out / "checkpoints")
    last = [event["step"] for event in Run.open(out).events() if event["event"] == "step"][-1]
    assert kept.name == f"step-{last:08d}"
    assert f"continues from the checkpoint {kept.name}:\nequilibria train tiny --out {out} --resume" in said.replace(
        " \\\n   ", ""
    )


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="fork and SIGKILL")
def test_a_second_process_on_one_folder_is_refused_and_the_lock_ends_with_its_process(tmp_path):
    out = tmp_path / "run"
    process = started(out)
    before = (out / "experiment.json").read_bytes()
    for flag in ("--resume", "--overwrite"):
        command = [sys.executable, "-m", "equilibria", "train", *WORDS, "--out", str(out), flag]
        second = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert second.returncode == 1
        assert f"{out} is in use by process {process.pid}; wait until it ends, or choose another" in second.stderr
    assert (out / "experiment.json").read_bytes() == before
    process.kill()
    process.communicate()
    with locked(out):
        pass


def test_a_folder_that_was_made_for_nothing_is_gone(tmp_path):
    with pytest.raises(KeyError), locked(tmp_path / "a" / "run"):
        raise KeyError
    assert not (tmp_path / "a" / "run").exists()


def test_a_run_that_left_goes_on_to_the_same_bits(tmp_path):
    value = experiment()
    run = Run.start(tmp_path / "run", value)

    def leave(event):
        if event["event"] == "step" and event["step"] == 9:
            trainer.leaving = True

    trainer = Trainer(value, run, corpus(), on_event=leave)
    with pytest.raises(TrainingInterrupted, match="after step 10"):
        trainer.fit()
    again = Trainer(value, run, corpus())
    assert again.resume() == 10
    again.fit()
    expected, _ = whole(tmp_path / "whole")
    assert same_bits(trained_weights(again), expected)


def test_a_limit_of_the_system_is_the_same_sentence_for_every_file_of_a_checkpoint(tmp_path):
    """torch.save has a RuntimeError of its own, which hides that of the system."""
    resource = pytest.importorskip("resource")  # not on Windows

    optimiser = {"random": torch.zeros(100_000)}
    there = Checkpoint(step=1, model={"w": torch.zeros(2)}, memory={}, optimiser=optimiser, state={})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as found:
            checkpoint.save(tmp_path, there)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    sentence, code = explain(found.value)
    assert (found.value.errno, code) == (errno.EFBIG, 1)
    assert "ulimit -f" in sentence
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_one_sentence_and_leaves_no_rest(tmp_path, monkeypatch, error):
    """safetensors and torch.save have errors of their own for it."""
    import safetensors.torch

    value = experiment()
    run = Run.start(tmp_path / "run", value)
    trainer = Trainer(value, run, corpus())
    write = safetensors.torch.save_file

    def save_file(tensors, file, **named):
        if trainer.steps_done == 8:
            raise error
        write(tensors, file, **named)

    monkeypatch.setattr("safetensors.torch.save_file", save_file)
    with pytest.raises(OSError, match="No space left") as found:
        trainer.fit()
    assert found.value.errno == errno.ENOSPC
    assert [entry.name for entry in (run.path / "checkpoints").iterdir()] == [
        entry.name for entry in checkpoint.all_in(run.path / "checkpoints")
    ]
    monkeypatch.undo()
    weights, _ = finished(tmp_path / "run", resume=True)
    expected, _ = whole(tmp_path / "whole")
    assert same_bits(weights, expected)


@pytest.mark.parametrize("place", ["../state.json", "/etc/hostname"])
def test_a_checkpoint_that_names_files_elsewhere_is_refused(tmp_path, place):
    whole(tmp_path / "run")
    folder = checkpoint.all_in(tmp_path / "run" / "checkpoints")[-1]
    state = json.loads((folder / "state.json").read_text())["state"]
    state["files"][place] = "0" * 64
    (folder / "state.json").write_text(json.dumps({"state": state, "sha256": checkpoint._digest(state)}))
    with pytest.raises(CheckpointError, match="does not name its files"):
        checkpoint.load(folder)


@pytest.mark.slow
def test_weights_are_exported_as_one_file(tmp_path, capsys):
    from safetensors import safe_open

    furnish(tmp_path)
    run = tmp_path / "run"
    recipe = f"{tmp_path / 'recipe.py'}:small"
    assert main(["train", recipe, "--data", str(tmp_path / "text"), "--out", str(run), "--quiet"]) == 0
    assert main(["export", str(run)]) == 0
    assert "weights of step" in capsys.readouterr().out
    with safe_open(run / "model.safetensors", "pt") as file:
        names, metadata = set(file.keys()), file.metadata()
    assert names == set(Run.open(run).best().model)
    assert json.loads(metadata["experiment"]) == Run.open(run).stored()


def test_export_of_nothing_is_refused(tmp_path, capsys):
    assert "no run" in fails(capsys, "export", str(tmp_path))


@pytest.mark.slow
@pytest.mark.xdist_group("ranks")
def test_who_waits_for_a_lost_rank_gives_up_and_says_so():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    torch.multiprocessing.spawn(waiting, (port, results), nprocs=2)
    (sentence, code), seconds = results.get(timeout=10)
    assert (sentence, code) == (LOST, 1)
    assert seconds < 9


@pytest.mark.slow
@pytest.mark.xdist_group("ranks")
def test_a_rank_that_dies_ends_the_job_and_one_restart_goes_on(tmp_path):
    out = tmp_path / "run"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=0"]
    flags = ["--training.parallel", "ddp", "--training.rank-timeout", "60"]
    process = started(out, *flags, launcher=launcher)
    holder = int((out / ".lock").read_text().split()[-1])
    os.kill(holder, signal.SIGKILL)
    began = time.monotonic()
    _, said = process.communicate(timeout=100)
    assert process.returncode == 1
    assert time.monotonic() - began < 60
    assert "Signal 9 (SIGKILL)" in said
