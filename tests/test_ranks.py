"""Several processes train as one does: the same curve, whatever spreads the model, and nobody waits inside a solve."""

import dataclasses
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from equilibria import fixed_point
from equilibria.commands.interrupt import interrupted
from equilibria.layers.dropout import BatchSlice, batch_draw
from equilibria.lm.environment import restarts
from equilibria.lm.experiments.decay import NonMonotone
from equilibria.lm.ranks import Ranks
from equilibria.lm.recipes import RECIPES
from equilibria.lm.runs import Run
from equilibria.lm.runs.checkpoint import verify
from equilibria.lm.runs.pieces import pieces_in
from equilibria.lm.training import Trainer
from small_experiment import corpus, experiment, trained_weights

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")


def train(out, *words, recipe="tiny", processes=1, environment=None, check=True):
    """`equilibria train`, by torchrun if there are several processes; returns the finished process."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    command = [sys.executable, *launcher, "-m", "equilibria", "train", recipe, "--out", str(out), *words]
    variables = os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {})
    done = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=600)
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


def events(out, kind):
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def losses(out):
    return torch.tensor([event["loss"] for event in events(out, "step")], dtype=torch.float64)


def run_program(out, parallel, *, processes, leave_after=99, recipe=None):
    """`ranks_program.py` by torchrun, or as one process."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    program = str(Path(__file__).with_name("ranks_program.py"))
    words = [str(out), parallel, str(leave_after), *([] if recipe is None else [recipe])]
    variables = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, program, *words]
    done = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((out / "solves.json").read_text())


@pytest.fixture(scope="module", params=["tiny", "tiny-trellis"])
def alone(request, tmp_path_factory):
    """50 steps by one process: 20 of the first stage, 30 implicit ones."""
    out = tmp_path_factory.mktemp("alone") / "run"
    run_program(out, "none", processes=1, leave_after=49, recipe=request.param)
    return request.param, out


@pytest.mark.slow
@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize(("parallel", "processes"), [("ddp", 2), ("fsdp", 2), ("ddp", 4), ("fsdp", 4)])
def test_the_curve_is_that_of_one_process(alone, tmp_path, parallel, processes):
    recipe, expected = alone
    out = tmp_path / "run"
    run_program(out, parallel, processes=processes, leave_after=49, recipe=recipe)
    assert len(losses(out)) == 50
    assert (losses(out) - losses(expected)).abs().max() < 1e-6
    scores = [[event["nats"] for event in events(run, "valid")] for run in (out, expected)]
    torch.testing.assert_close(*map(torch.tensor, scores), rtol=0, atol=1e-6)
    evals = [event["rank_evals"] for event in events(out, "step")]
    assert all(len(ranks) == processes for ranks in evals)
    # Streams of the trellis are alike, and two ranks need the same.
    assert recipe == "tiny-trellis" or any(len(set(map(sum, ranks))) > 1 for ranks in evals)


@pytest.mark.slow
@pytest.mark.xdist_group("ranks")
def test_in_float32_two_ranks_are_to_the_bit_one_process_with_two_parts(tmp_path):
    """An untrained cell makes 1e-3 of a last bit in 30 implicit steps, so that 50 steps at once prove nothing there."""
    flags = "--training.warmup 20 --stages.0.steps 20 --stages.1.steps 30 --training.log-every 1 --training.threads 1"
    quick = "--training.valid-segments 4 --training.baseline False --training.measure-memory False --quiet"
    words = [*flags.split(), *quick.split(), "--training.spectral-radius", "0"]
    train(tmp_path / "ranks", *words, "--training.parallel", "ddp", processes=2)
    train(tmp_path / "parts", *words, "--training.accumulate", "2")
    assert losses(tmp_path / "ranks").equal(losses(tmp_path / "parts"))


def test_random_numbers_are_those_of_the_whole_batch():
    def numbers(first, count):
        torch.manual_seed(3)
        part = BatchSlice(first=first, total=6)
        each = batch_draw(torch.randn, (count, 2), part=part), batch_draw(torch.randn, (3, count), part=part, rows=1)
        return *each, torch.rand(())

    torch.manual_seed(3)
    whole = torch.randn(6, 2), torch.randn(3, 6), torch.rand(())
    parts = [numbers(0, 2), numbers(2, 3), numbers(5, 1)]
    assert torch.cat([part[0] for part in parts]).equal(whole[0])
    assert torch.cat([part[1] for part in parts], dim=1).equal(whole[1])
    assert all(part[2] == whole[2] for part in parts)
    torch.manual_seed(3)
    assert batch_draw(torch.randn, (6, 2), part=None).equal(whole[0])


def test_parts_of_a_batch_train_like_the_batch():
    weights = []
    for accumulate in (1, 2, 4):
        trainer = Trainer(experiment(accumulate=accumulate), None, corpus())
        trainer.fit()
        weights.append(torch.cat([weight.flatten() for weight in trained_weights(trainer).values()]))
    for parts in weights[1:]:
        torch.testing.assert_close(parts, weights[0], rtol=1e-3, atol=2e-5)


def test_what_cannot_be_divided_is_refused():
    with pytest.raises(ValueError, match="share the batch evenly"):
        Ranks(size=3).share_of(8)
    with pytest.raises(ValueError, match="divides the batch size"):
        experiment(accumulate=3)
    with pytest.raises(ValueError, match="averaged weights cannot be sharded"):
        experiment(parallel="fsdp", optimiser="asgd", decay=NonMonotone())


def test_one_process_with_a_flag_for_several_is_told_how_to_start_them(tmp_path):
    done = train(tmp_path / "run", "--training.parallel", "ddp", check=False)
    assert done.returncode == 1
    assert "torchrun --nproc-per-node 2" in done.stderr
    assert (
        "or give --training.parallel none to train with one process" in done.stderr
    )  # a run that resumes has the flag
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("WORLD_SIZE", "two", "from 1 on"),
        ("WORLD_SIZE", "", "from 1 on"),
        ("WORLD_SIZE", "0", "from 1 on"),
        ("WORLD_SIZE", "-2", "from 1 on"),
        ("RANK", "2", "from 0 to 1"),
        ("RANK", "x", "from 0 to 1"),
        ("LOCAL_RANK", "1.0", "from 0 on"),
        ("MASTER_PORT", "70000", "from 1 to 65535"),
        ("MASTER_PORT", "http", "from 1 to 65535"),
    ],
)
def test_a_variable_of_torchrun_that_is_no_number_is_named(monkeypatch, name, value, allowed):
    """They were errors of int(), or waited for the other processes until the timeout."""
    world = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for variable, usual in (world | {name: value}).items():
        monkeypatch.setenv(variable, usual)
    said = f"The environment variable {name} is {value!r}, and it is a whole number {allowed}: let torchrun set it"
    with pytest.raises(ValueError, match=re.escape(said)), Ranks.joined("ddp", "cpu", timeout=5):
        pass
    assert not torch.distributed.is_initialized()


def test_a_count_of_restarts_that_is_no_number_is_named(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "twice")
    with pytest.raises(ValueError, match="TORCHELASTIC_RESTART_COUNT is 'twice', and it is a whole number from 0 on"):
        restarts()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "")
    assert restarts() == 0


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_a_variable_of_torchrun_that_is_missing_asks_for_torchrun(monkeypatch, name):
    world = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for variable, usual in world.items():
        monkeypatch.setenv(variable, usual)
    monkeypatch.delenv(name)
    with pytest.raises(ValueError, match="start torchrun --nproc-per-node 2"), Ranks.joined("ddp", "cpu", timeout=5):
        pass


def test_a_training_of_many_is_continued_by_as_many(tmp_path, monkeypatch):
    """The command that was printed after Ctrl-C was that of one process, which refuses such a run."""
    run = Run.start(tmp_path / "run", experiment())
    monkeypatch.setenv("COLUMNS", "200")
    alone = f"equilibria train tiny --out {run.path} --resume"
    assert interrupted(run, ["tiny"], 4).splitlines()[-1] == alone
    for size in (1, 2):
        said = interrupted(run, ["tiny"], 4, Ranks(size=size, parallel="ddp"))
        assert said.splitlines()[-1] == f"torchrun --nproc-per-node {size} -m {alone}"


class Around(nn.Module):
    """A module that calls fixed_point, with a batch norm over ranks before the solve, and another one for f."""

    def __init__(self):
        super().__init__()
        self.stem, self.cell, self.norm = nn.SyncBatchNorm(4), nn.Linear(4, 4), nn.SyncBatchNorm(4)

    def helper(self, z):
        return self.norm(z)

    def without(self, z):
        return self.cell(z) / 3

    def within(self, z):
        parts = [z]
        return torch.cat([self.norm(part) for part in parts]) / 3


@pytest.mark.parametrize(
    ("f", "refused"),
    [
        (lambda self: lambda z: self.cell(z) / 3, False),
        (lambda self: lambda z: self.norm(self.cell(z)) / 3, True),
        (lambda self: lambda z: self.helper(self.cell(z)) / 3, True),
        (lambda self: lambda z: torch.cat([self.norm(part) for part in [z]]), True),
        (lambda self: lambda z: (lambda: self.norm(z))(), True),
        (lambda self: self.without, False),
        (lambda self: self.helper, True),
        (lambda self: self.within, True),
    ],
    ids=["cell", "norm", "helper", "comprehension", "inner function", "method without", "method", "method within"],
)
def test_only_those_parts_of_a_module_that_f_reads_are_refused(monkeypatch, f, refused):
    """A batch norm in front of the solve was refused as one inside f."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_: 2)
    module = Around()
    if not refused:
        assert fixed_point(f(module), torch.zeros(3, 4)).converged.all()
    else:
        with pytest.raises(ValueError, match=r"The SyncBatchNorm( \w+)? inside f averages over 2 processes"):
            fixed_point(f(module), torch.zeros(3, 4))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The small experiment by one process."""
    out = tmp_path_factory.mktemp("small") / "run"
    return out, run_program(out, "none", processes=1)


@pytest.mark.slow
@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_dropout_and_penalty_too_and_no_collective_inside_a_solve(small, tmp_path, parallel):
    """The program itself refuses collectives inside solves; here it is seen that there were some outside."""
    expected, alone = small
    found = run_program(tmp_path / "run", parallel, processes=2)
    assert (losses(tmp_path / "run") - losses(expected)).abs().max() < 1e-9
    assert [rank["count"] for rank in found] == [alone[0]["count"]] * 2
    assert all(rank["collectives outside"] > 18 for rank in found)
    assert any(len(set(map(sum, event["rank_evals"]))) > 1 for event in events(tmp_path / "run", "step"))
    if parallel == "fsdp":
        whole = alone[0]["bytes of weights and optimiser"]
        assert all(rank["bytes of weights and optimiser"] < 0.6 * whole for rank in found)


@pytest.mark.slow
@pytest.mark.xdist_group("ranks")
def test_a_run_saved_by_four_goes_on_with_two_and_with_one(small, tmp_path):
    """Saved in shards, resumed with other numbers of ranks and other ways to spread: the curve of one process."""
    expected, _ = small
    out = tmp_path / "run"
    run_program(out, "fsdp", processes=4, leave_after=8)
    assert (out / "checkpoints" / "step-00000009" / "shards").is_dir()
    verify(out / "checkpoints" / "step-00000009")
    for rank in run_program(out, "fsdp", processes=2, leave_after=12):
        assert (
            0.9 < rank["bytes read in slices"] / rank["bytes of weights and optimiser"] < 1.1
        )  # its own, and no other
    assert (out / "checkpoints" / "step-00000013" / "shards").is_dir()
    run_program(out, "none", processes=1)
    assert (losses(out) - losses(expected)).abs().max() < 1e-9
    assert [event["step"] for event in events(out, "step")] == list(range(1, 19))


def test_shards_that_do_not_fill_their_tensor_are_refused(tmp_path):
    info = json.dumps({"weight": {"saved_offsets": [3]}})
    safetensors.torch.save_file({"weight": torch.ones(2)}, tmp_path / "a.safetensors", {"DCP_SHARDING_INFO": info})
    with pytest.raises(ValueError, match=r"the shards of weight do not fill a tensor of shape \[5\]"):
        pieces_in(tmp_path)
    safetensors.torch.save_file({"weight": torch.zeros(3)}, tmp_path / "b.safetensors")
    assert pieces_in(tmp_path)["weight"].whole().tolist() == [0, 0, 0, 1, 1]


def test_shards_that_share_a_place_and_leave_another_one_are_refused(tmp_path):
    """Together they have as many numbers as the tensor, and one of its places has none."""
    for name, place in (("a", 0), ("b", 0), ("c", 2)):
        info = json.dumps({"weight": {"saved_offsets": [place]}})
        safetensors.torch.save_file(
            {"weight": torch.ones(1)}, tmp_path / f"{name}.safetensors", {"DCP_SHARDING_INFO": info}
        )
    with pytest.raises(ValueError, match=r"the shards of weight do not fill a tensor of shape \[3\]"):
        pieces_in(tmp_path)


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def side_by_side(commands, *, port=None, limit=120, folders=None):
    """Processes that are the ranks of one training, started by hand; their exit codes and what they said."""
    world = {"WORLD_SIZE": str(len(commands)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port or free_port()}
    started = []
    for rank, command in enumerate(commands):
        own = {**os.environ, **world, "OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank)}
        place = None if folders is None else folders[rank]
        started.append(
            subprocess.Popen([sys.executable, *command], env=own, stderr=subprocess.PIPE, text=True, cwd=place)
        )
    ended = [process.communicate(timeout=limit)[1] for process in started]
    return [process.returncode for process in started], ended


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flag", "values", "said"),
    [
        (
            "--training.learning-rate",
            ("1e-3", "2e-3"),
            "training.optimisation.learning_rate = 0.002 and rank 0 has 0.001",
        ),
        ("--training.seed", ("1", "2"), "training.seed = 2 and rank 0 has 1"),
        ("--training.batch-size", ("8", "16"), "training.batches.batch_size = 16 and rank 0 has 8"),
        ("--model.cell.width", ("96", "64"), "model.cell.width = 64 and rank 0 has 96"),
    ],
)
def test_ranks_that_disagree_say_so(tmp_path, flag, values, said):
    """They trained together unnoticed, or ended in SIGABRT."""
    words = ["-m", "equilibria", "train", "tiny", "--out", str(tmp_path / "run"), "--training.parallel", "ddp"]
    codes, sentences = side_by_side([[*words, flag, value] for value in values])
    assert codes == [1, 1]
    for rank, sentence in enumerate(sentences):
        assert said in sentence, (rank, sentence)
        assert "Traceback" not in sentence


@pytest.mark.slow
def test_ranks_with_different_texts_say_so(tmp_path):
    for rank in range(2):
        folder = tmp_path / f"text{rank}"
        folder.mkdir()
        for split in ("train", "valid", "test"):
            (folder / f"{split}.txt").write_text("abc d\nba cad\n" * (300 + (rank if split == "valid" else 0)))
    words = ["-m", "equilibria", "train", "ptb", "--out", str(tmp_path / "run"), "--training.parallel", "ddp"]
    recipe = tmp_path / "mine.py"
    recipe.write_text(
        "import dataclasses\nfrom equilibria.lm.recipes import RECIPES\n"
        "from equilibria.lm.corpora import TextFolder\n\n\n"
        "def mine():\n    return dataclasses.replace(RECIPES['tiny'](), corpus=TextFolder(unit='character'))\n"
    )
    words[3] = f"{recipe}:mine"
    codes, sentences = side_by_side([[*words, "--data", str(tmp_path / f"text{rank}")] for rank in range(2)])
    assert codes == [1, 1]
    assert all("Rank 1 has text of valid = " in sentence for sentence in sentences), sentences


@pytest.mark.slow
@pytest.mark.parametrize("words", [["ddp"], ["ddp", "--resume"], ["fsdp", "--overwrite"]], ids="_".join)
def test_ranks_on_different_disks_say_so(tmp_path, words):
    """Checkpoints had the shards of one rank, and a training was continued from the weights of two runs."""
    folders = [tmp_path / "node0", tmp_path / "node1"]
    for seed, folder in enumerate(folders):
        folder.mkdir()
        if len(words) > 1:
            value = RECIPES["tiny"]()
            Run.start(folder / "run", dataclasses.replace(value, training=value.training.changed(seed=seed)))
    command = ["-m", "equilibria", "train", "tiny", "--out", "run", "--seed", "0", "--training.parallel", *words]
    before = [sorted(folder.rglob("*")) for folder in folders]
    codes, sentences = side_by_side([command] * 2, folders=folders)
    assert codes == [1, 1], sentences
    for sentence in sentences:
        assert "Rank 1 does not see the folder run that rank 0 writes: all processes of a training need one" in sentence
        assert "Traceback" not in sentence
    assert not list(tmp_path.rglob(".ranks-*"))
    assert sorted(folders[1].rglob("*")) == before[1]


@pytest.mark.slow
def test_a_port_in_use_is_called_that(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        words = ["-m", "equilibria", "train", "tiny", "--out", str(tmp_path / "run"), "--training.parallel", "ddp"]
        codes, sentences = side_by_side([words], port=str(taken.getsockname()[1]))
    assert codes == [1]
    assert "is in use by another program; give torchrun another one with --master-port" in sentences[0]


INSIDE = """
import os, sys, torch, torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from equilibria import Equilibrium, Stop, fixed_point
dist.init_process_group("gloo")
rank = dist.get_rank()


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)

    def forward(self, z, x):
        return torch.tanh(self.norm(self.linear(z)) + x)


def around(z):
    return cell(z, x)


def closing(f):
    return lambda z: f(z, x)


torch.manual_seed(0)
cell, x, stop = Cell(), torch.randn(4, 8), Stop(rtol=1e-6 if rank else 1e-1, max_evals=50)
if sys.argv[1] == "norm":
    cell = nn.SyncBatchNorm.convert_sync_batchnorm(cell)
else:
    fully_shard(cell.linear)
solves = {
    "layer": lambda: Equilibrium(cell, stop=stop, coupled=True)(x),
    "norm": lambda: Equilibrium(cell, stop=stop, coupled=True)(x),
    "function": lambda: fixed_point(cell, torch.zeros(4, 8), x, stop=stop, coupled=True),
    "closure": lambda: fixed_point(closing(cell), torch.zeros(4, 8), stop=stop, coupled=True),
    "global": lambda: fixed_point(around, torch.zeros(4, 8), stop=stop, coupled=True),
    "method": lambda: fixed_point(cell.forward, torch.zeros(4, 8), x, stop=stop, coupled=True),
}
try:
    solves[sys.argv[1]]()
except ValueError as error:
    os.write(2, str(error).encode())
    raise SystemExit(7)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["layer", "function", "closure", "global", "method", "norm"])
def test_an_f_that_would_wait_for_others_is_refused_and_not_waited_for(tmp_path, how):
    """fixed_point was not refused: a rank with fewer evaluations was waited for until the timeout."""
    program = tmp_path / "inside.py"
    program.write_text(INSIDE)
    codes, sentences = side_by_side([[str(program), how]] * 2, limit=60)
    assert codes == [7, 7], sentences
    said = "norm inside f averages over 2" if how == "norm" else "inside f is sharded over 2"
    assert all(f"{said} processes" in sentence for sentence in sentences), sentences
