"""A fault campaign: runs are killed, cut short, starved of disk and of ranks, and go on; nothing may be lost.

python benchmarks/faults.py                     about ten minutes on two cores
    prints the table, writes results/faults.json and its part of docs/evidence/reliability.md

Each kind of fault hits runs of one small experiment (transformer, dropout, Jacobian penalty, two stages, a checkpoint
every four steps), which is then resumed by the same command until it ends. "Equal" means that the weights at the end
are those of a run that nothing happened to, bit for bit. Moments and places are drawn from a seed. The disk that fills
up is a tmpfs, for which root is needed; without it that row is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from equilibria.cells import TransformerConfig
from equilibria.commands.main import run as command
from equilibria.core.stop import Stop
from equilibria.fixed_point import Method
from equilibria.gradients import Implicit
from equilibria.lm.corpora import TextFolder
from equilibria.lm.experiments import (
    Batches,
    Devices,
    Experiment,
    Faults,
    Logging,
    Optimisation,
    Stage,
    Training,
    Validation,
)
from equilibria.lm.experiments.stage import network_of
from equilibria.lm.model import LanguageConfig
from equilibria.lm.runs import Run, checkpoint
from equilibria.solvers import Anderson

TEXT = "the fixed point of a map is where the map leaves it; " * 60
RECIPE = f"{Path(__file__).resolve()}:small"
CORPUS = "EQUILIBRIA_FAULTS_CORPUS"
STEPS = 120
LOADED = (
    "equilibria.commands.train",
    "equilibria.lm.report.figures",
    "matplotlib.backends.backend_agg",
    "safetensors.torch",
    "torch._dynamo",  # which every optimiser loads
)
"""What a forked process needs not load again."""


def small() -> Experiment:
    """The experiment."""
    solver, stop = Anderson(window=3), Stop(rtol=1e-2, max_evals=8)
    return Experiment(
        name="small",
        corpus=TextFolder(root=Path(os.environ[CORPUS]), unit="character"),
        model=LanguageConfig(
            cell=TransformerConfig(width=16, heads=2, inner=24, memory=20, dropout=0.1, attention_dropout=0.1),
            dropout=0.1,
        ),
        stages=(
            network_of(3, name="shallow", steps=STEPS // 3),
            Stage(
                name="implicit",
                steps=STEPS - STEPS // 3,
                method=Method(solver, stop, Implicit(solver, stop)),
                penalty=0.1,
                penalty_share=0.5,
            ),
        ),
        training=Training(
            batches=Batches(batch_size=4, segment_length=20),
            optimisation=Optimisation(learning_rate=1e-2),
            log=Logging(log_every=1, spectral_radius=0, measure_memory=False, baseline=False),
            validation=Validation(valid_every=20, valid_segments=2, eval_batch_size=2),
            faults=Faults(checkpoint_every=4),
            devices=Devices(threads=1),
        ),
    )


def log_of(folder: Path) -> Path:
    """What the processes of a run have said; not beside it, where the disk may be full."""
    return Path(os.environ[CORPUS]) / f"{folder.parent.name}-{folder.name}.log"


def words(folder: Path, *more: str) -> list[str]:
    """The command that starts the run, and the same that goes on with it."""
    return ["train", RECIPE, "--out", str(folder), "--resume", "--quiet", *more]


@contextlib.contextmanager
def child(folder: Path) -> Iterator[int]:
    """A process that trains; what it says goes to a log. It is forked, since PyTorch takes seconds to load."""
    number = os.fork()
    if number == 0:
        with log_of(folder).open("a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            os._exit(command(words(folder)))
    try:
        yield number
    finally:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(number, 0)


def finish(folder: Path) -> tuple[int, str]:
    """Resume to the end; returns the exit code and what was said."""
    log = log_of(folder)
    log.unlink(missing_ok=True)
    with child(folder) as number:
        _, status = os.waitpid(number, 0)
    return os.waitstatus_to_exitcode(status), log.read_text()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Of the newest checkpoint."""
    found = Run.open(folder).newest()
    assert found is not None
    assert found.step == STEPS
    return dict(found.model)


def equal(folder: Path, expected: dict[str, torch.Tensor]) -> bool:
    """Whether the run has ended with these weights, and its log has every step once."""
    found = weights(folder)
    steps = [event["step"] for event in Run.open(folder).events() if event["event"] == "step"]
    same = found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    return same and steps == list(range(1, STEPS + 1))


def kills(
    place: Path, expected: dict[str, torch.Tensor], count: int, draw: random.Random, *, by: signal.Signals
) -> dict[str, Any]:
    """A signal at random moments, until so many processes have heard it."""
    done, runs, same = 0, 0, 0
    while done < count:
        folder = place / f"{by.name}-{runs}"
        runs += 1
        longest, reached = 1.5, 0
        while True:
            with child(folder) as number:
                time.sleep(draw.uniform(0.05, longest))
                ended, _ = os.waitpid(number, os.WNOHANG)
                if ended:
                    break
                os.kill(number, by)
                done += 1
            kept = checkpoint.all_in(folder / "checkpoints")
            step = int(kept[-1].name.removeprefix("step-")) if kept else 0
            longest, reached = (1.5 if step > reached else 1.2 * longest), step  # on a busy machine nothing may be done
        code, _ = finish(folder)
        same += code == 0 and equal(folder, expected)
        shutil.rmtree(folder)
    return {"fault": f"{by.name} at a random moment", "faults": done, "runs": runs, "equal": same}


def changed_texts(place: Path, expected: dict[str, torch.Tensor], count: int, draw: random.Random) -> dict[str, Any]:
    """A text that has changed when the run continues, and is put back after that was refused."""
    source, same, named = place / "texts", 0, 0
    halfway(source)
    for folder in copies(source, count):
        file = Path(os.environ[CORPUS]) / f"{draw.choice(['train', 'valid', 'test'])}.txt"
        before = file.read_text()
        place_of = draw.randrange(len(before))
        file.write_text(before[:place_of] + draw.choice("abet") + before[place_of:])
        code, said = finish(folder)
        named += code == 1 and "SHA-256" in said and "Traceback" not in said
        file.write_text(before)
        code, _ = finish(folder)
        same += code == 0 and equal(folder, expected)
    return {"fault": "a letter added to the text", "faults": count, "runs": count, "equal": same, "named": named}


def truncations(place: Path, expected: dict[str, torch.Tensor], count: int, draw: random.Random) -> dict[str, Any]:
    """The newest checkpoint of a run, of which one file is cut at a random byte."""
    source, same, named = place / "source", 0, 0
    halfway(source)
    for folder in copies(source, count):
        newest = sorted((folder / "checkpoints").iterdir())[-1]
        file = draw.choice(sorted(path for path in newest.iterdir() if path.is_file()))
        os.truncate(file, draw.randrange(file.stat().st_size))
        _, said = finish(folder)
        named += newest.name in said and "Traceback" not in said
        same += equal(folder, expected)
    return {
        "fault": "a checkpoint's file cut at a random byte",
        "faults": count,
        "runs": count,
        "equal": same,
        "named": named,
    }


def copies(source: Path, count: int) -> Iterator[Path]:
    """Copies of a run, one at a time; each is removed before the next one."""
    for index in range(count):
        folder = source.with_name(f"{source.name}-{index}")
        shutil.copytree(source, folder)
        yield folder
        shutil.rmtree(folder)


def halfway(folder: Path) -> None:
    """A run that was asked to leave in its middle."""
    with child(folder) as number:
        while not (folder / "checkpoints" / f"step-{STEPS // 2:08d}").is_dir():
            time.sleep(0.01)
        os.kill(number, signal.SIGTERM)


def cut_logs(place: Path, expected: dict[str, torch.Tensor], count: int, draw: random.Random) -> dict[str, Any]:
    """A log whose last line is cut, as by a machine that lost power."""
    source, same = place / "logs", 0
    halfway(source)
    for folder in copies(source, count):
        log = folder / "metrics.jsonl"
        last = log.read_bytes().rstrip(b"\n").rfind(b"\n") + 1
        os.truncate(log, draw.randrange(last, log.stat().st_size))
        code, _ = finish(folder)
        same += code == 0 and weights_equal(folder, expected)
    return {"fault": "the last line of metrics.jsonl cut", "faults": count, "runs": count, "equal": same}


def weights_equal(folder: Path, expected: dict[str, torch.Tensor]) -> bool:
    """Of the weights alone."""
    found = weights(folder)
    return all(torch.equal(found[name], expected[name]) for name in expected)


def full_disk(place: Path, expected: dict[str, torch.Tensor], count: int) -> dict[str, Any] | None:
    """A disk that is full after some checkpoints, and has room again afterwards."""
    same = sentences = 0
    for index in range(count):
        disk = place / f"disk-{index}"
        disk.mkdir()
        size = 200 + 37 * index  # KiB
        if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(disk)], check=False).returncode:
            return None
        try:
            code, said = finish(disk / "run")
            sentences += code == 1 and "no space left" in said and "Traceback" not in said
            subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
            code, said = finish(disk / "run")
            same += code == 0 and equal(disk / "run", expected)
        finally:
            subprocess.run(["umount", str(disk)], check=True)
    return {"fault": "disk full, then room again", "faults": count, "runs": count, "equal": same, "named": sentences}


def rank_deaths(place: Path, count: int, draw: random.Random) -> dict[str, Any]:
    """Two processes by torchrun with restarts, one of which is killed now and then."""
    reference = place / "two"
    launch(reference).wait(timeout=600)
    expected, done, runs, same = weights(reference), 0, 0, 0
    while done < count:
        folder = place / f"ranks-{runs}"
        runs += 1
        job = launch(folder)
        for _ in range(5):
            time.sleep(draw.uniform(6.0, 12.0))
            workers = processes_of(folder)
            if job.poll() is not None or not workers:
                break
            with contextlib.suppress(ProcessLookupError):
                os.kill(draw.choice(workers), signal.SIGKILL)
                done += 1
        same += job.wait(timeout=600) == 0 and weights_equal(folder, expected)
    return {"fault": "a rank of two killed, torchrun --max-restarts", "faults": done, "runs": runs, "equal": same}


def launch(folder: Path) -> subprocess.Popen[bytes]:
    """Two ranks."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=20"]
    more = words(folder, "--training.parallel", "ddp", "--training.rank-timeout", "60")
    with log_of(folder).open("a") as log:
        return subprocess.Popen([sys.executable, *torchrun, "-m", "equilibria", *more], stdout=log, stderr=log)


def processes_of(folder: Path) -> list[int]:
    """The workers that train in this folder: those whose parent is a torchrun."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            line = (entry / "cmdline").read_bytes() if entry.name.isdigit() else b""
            if str(folder).encode() in line and b"torch.distributed.run" not in line:
                found.append(int(entry.name))
    return found


def lone_death(place: Path) -> dict[str, Any]:
    """A rank that dies for good: how long the other one and the job outlive it."""
    folder = place / "lone"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    more = words(folder, "--training.parallel", "ddp", "--training.rank-timeout", "60")
    log = log_of(folder)
    with log.open("w") as stream:
        job = subprocess.Popen([sys.executable, *torchrun, "-m", "equilibria", *more], stdout=stream, stderr=stream)
    while not (folder / "checkpoints" / "step-00000008").is_dir():
        time.sleep(0.05)
    os.kill(max(processes_of(folder)), signal.SIGKILL)
    began = time.perf_counter()
    code = job.wait(timeout=300)
    seconds, said = time.perf_counter() - began, log.read_text()
    named = "Signal 9 (SIGKILL)" in said
    return {
        "fault": "a rank of two killed, no restarts",
        "faults": 1,
        "runs": 1,
        "seconds": seconds,
        "code": code,
        "named": int(named),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """For the documentation."""
    lines = ["| fault | faults | runs | runs that ended equal | said in one sentence |", "|---|---:|---:|---:|---:|"]
    for row in rows:
        end = (
            f"{row['equal']}"
            if "equal" in row
            else f"the job ended after {row['seconds']:.1f} s, exit code {row['code']}"
        )
        lines.append(f"| {row['fault']} | {row['faults']} | {row['runs']} | {end} | {row.get('named', '–')} |")
    return "\n".join(lines)


def campaign(place: Path, given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All of it."""
    draw = random.Random(given.seed)
    undisturbed = place / "undisturbed"
    with child(undisturbed):
        pass
    expected = weights(undisturbed)
    kinds: list[Callable[[], dict[str, Any] | None]] = [
        lambda: kills(place, expected, given.kills, draw, by=signal.SIGKILL),
        lambda: kills(place, expected, given.kills // 4, draw, by=signal.SIGINT),
        lambda: changed_texts(place, expected, 10, draw),
        lambda: truncations(place, expected, given.cuts, draw),
        lambda: cut_logs(place, expected, 10, draw),
        lambda: full_disk(place, expected, 10),
        lambda: rank_deaths(place, given.deaths, draw),
        lambda: lone_death(place),
    ]
    for kind in kinds:
        row = kind()
        if row is not None:
            print(json.dumps(row), flush=True)
            yield row


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--cuts", type=int, default=50)
    parser.add_argument("--deaths", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    torch.set_num_threads(1)
    for module in LOADED:
        importlib.import_module(module)
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as name:
        corpus = Path(name) / "corpus"
        corpus.mkdir()
        for split in ("train", "valid", "test"):
            (corpus / f"{split}.txt").write_text(TEXT if split == "train" else TEXT[:400])
        os.environ[CORPUS] = str(corpus)
        rows = list(campaign(Path(name), parser.parse_args()))
    from machine import publish  # which a process that reads the recipe does not find

    publish("faults", rows, table(rows), page="evidence/reliability")
