import logging
import os
import pickle
import shutil

import pytest
import torch

from equilibria.lm.runs import checkpoint
from equilibria.lm.runs.checkpoint import Checkpoint, CheckpointError


def made(step: int = 5, **state) -> Checkpoint:
    torch.manual_seed(step)
    return Checkpoint(
        step=step,
        model={"w": torch.randn(3, 2), "b": torch.randn(2).bfloat16()},
        memory={"z": torch.randn(2, 3, 4)},
        optimiser={"optimiser": {"state": {0: {"step": torch.tensor(5.0)}}}, "random": {"cpu": torch.get_rng_state()}},
        state={"best": {"step": 3, "nats": 0.1}, "seconds": 1.25, **state},
    )


def test_what_was_saved_is_loaded(tmp_path):
    folder = checkpoint.save(tmp_path, made())
    found, expected = checkpoint.load(folder), made()
    assert found.step == 5
    assert found.state == expected.state
    for mine, theirs in ((found.model, expected.model), (found.memory, expected.memory)):
        assert all(torch.equal(mine[name], theirs[name]) and mine[name].dtype == theirs[name].dtype for name in theirs)
    assert torch.equal(found.optimiser["random"]["cpu"], expected.optimiser["random"]["cpu"])
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-00000005"]


def test_an_empty_memory_is_a_memory(tmp_path):
    empty = Checkpoint(step=1, model={"w": torch.ones(1)}, memory={}, optimiser={}, state={})
    assert checkpoint.load(checkpoint.save(tmp_path, empty)).memory == {}


@pytest.mark.parametrize("name", ["model.safetensors", "memory.safetensors", "optimiser.pt", "state.json"])
@pytest.mark.parametrize("harm", ["flip", "truncate", "remove"])
def test_any_damage_is_refused_in_a_sentence_that_names_the_good_one(tmp_path, name, harm, monkeypatch):
    good, bad = checkpoint.save(tmp_path, made(5)), checkpoint.save(tmp_path, made(10))
    file = bad / name
    content = bytearray(file.read_bytes())
    if harm == "remove":
        file.unlink()
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes(content if harm == "flip" else content[:-7])
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("unpickled before the checksum was compared"))
    with pytest.raises(CheckpointError) as error:
        checkpoint.load(bad)
    message = str(error.value)
    assert str(bad) in message
    assert f"the newest good one is {good}." in message
    assert "\n" not in message


def test_without_a_good_one_the_sentence_says_so(tmp_path):
    bad = checkpoint.save(tmp_path, made())
    (bad / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="no good one"):
        checkpoint.newest(tmp_path)


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("evil",))


def test_foreign_folders_and_files_are_refused_unopened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "somebody's"
    folder.mkdir()
    (folder / "optimiser.pt").write_bytes(pickle.dumps(Evil()))
    (tmp_path / "model.pt").write_bytes(pickle.dumps(Evil()))
    for path in (folder, tmp_path / "model.pt", tmp_path / "absent"):
        with pytest.raises(CheckpointError, match="not a checkpoint of this library"):
            checkpoint.load(path)
    (folder / "state.json").write_text('{"step": 3}')
    with pytest.raises(CheckpointError, match="not a checkpoint of this library"):
        checkpoint.load(folder)
    (folder / "state.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="not a checkpoint of this library"):
        checkpoint.load(folder)
    assert not (tmp_path / "evil").exists()


def test_even_with_a_true_checksum_only_plain_tensors_are_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bad = Checkpoint(step=1, model={"w": torch.ones(1)}, memory={}, optimiser={"evil": Evil()}, state={})
    folder = checkpoint.save(tmp_path, bad)
    with pytest.raises(CheckpointError, match=r"optimiser\.pt holds something other than tensors and plain values"):
        checkpoint.load(folder)
    assert not (tmp_path / "evil").exists()


def test_the_newest_good_one_is_found_and_the_damaged_one_is_logged(tmp_path, caplog):
    checkpoint.save(tmp_path, made(5))
    bad = checkpoint.save(tmp_path, made(10))
    (bad / "optimiser.pt").write_bytes(b"nothing")
    with caplog.at_level(logging.WARNING):
        found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.step == 5
    assert str(bad) in caplog.text


def test_no_checkpoint_is_no_error(tmp_path):
    assert checkpoint.newest(tmp_path / "nothing") is None


def test_the_newest_and_the_best_are_kept(tmp_path):
    for step in (5, 10, 15, 20, 100_000_000):
        checkpoint.save(tmp_path, made(step))
    (tmp_path / ".unfinished-step-00000025-1").mkdir()
    shutil.copytree(tmp_path / "step-00000005", tmp_path / "mine")
    checkpoint.prune(tmp_path, newest=2, best=5)
    names = {entry.name for entry in tmp_path.iterdir()}
    assert names == {"step-00000005", "step-00000020", "step-100000000", "mine"}


def test_a_damaged_one_is_replaced(tmp_path):
    bad = checkpoint.save(tmp_path, made())
    (bad / "model.safetensors").unlink()
    assert checkpoint.load(checkpoint.save(tmp_path, made())).step == 5


class PowerCut(BaseException):
    pass


@pytest.mark.parametrize("call", range(9))
def test_interrupted_at_any_call_the_old_or_the_new_one_is_there(tmp_path, call, monkeypatch):
    """Every force and rename of a save, in turn, is where the power fails."""
    checkpoint.save(tmp_path, made(5))
    count = -1

    def failing(original):
        def wrapped(*arguments, **options):
            nonlocal count
            count += 1
            if count == call:
                raise PowerCut
            return original(*arguments, **options)

        return wrapped

    monkeypatch.setattr(os, "fsync", failing(os.fsync))
    monkeypatch.setattr(os, "rename", failing(os.rename))
    monkeypatch.setattr(type(tmp_path), "rename", failing(type(tmp_path).rename))
    try:
        checkpoint.save(tmp_path, made(10))
    except PowerCut:
        pass
    else:
        assert call > count
    monkeypatch.undo()
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.step in (5, 10)
    checkpoint.save(tmp_path, made(15))
    checkpoint.prune(tmp_path, newest=1, best=None)
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-00000015"]
