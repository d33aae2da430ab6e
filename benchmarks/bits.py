"""The bit test: does a change of the code compute the same numbers?

python benchmarks/bits.py OLD              a commit beside the working tree
python benchmarks/bits.py OLD NEW          two commits
    --cases tiny,chain                     only these
    --keep FILE                            what OLD computes is read from FILE, or computed and written there

Both trees train the same small models by one thread, each in a process of its own, and every tensor that they record
is compared with ``torch.equal``: losses, gradient norms and evaluations of each step, weights, validation, logits of
generated text. Weights are compared in the order of ``model.parameters()``: their names may change. It prints a table,
and ends with exit code 1 if anything differs. About a minute a tree, on one core. Bits are those of one machine and
one PyTorch, so FILE is for these too.

The program that trains is this file, whichever tree it is run with. What is called differently in the two trees is
looked up in the functions below "Names".
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from machine import machine
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
Recorded = list[tuple[str, Tensor]]
"""The tensors of a case, in an order that both trees have, each with what it is."""
Tree = dict[str, Recorded | str]
"""What a tree computes in each case, or why it could not."""

# Names: what the trees call differently.


def config(module: str, name: str) -> Any:
    """The class of hyper-parameters that is called XxxConfig or XxxShape."""
    found = home(module.replace("equilibria.language", "equilibria.lm.model"), module)
    return getattr(found, f"{name}Config", None) or getattr(found, f"{name}Shape")


def home(*modules: str) -> Any:
    """The first of the modules that the tree has."""
    for module in modules:
        with contextlib.suppress(ModuleNotFoundError):
            return importlib.import_module(module)
    raise ModuleNotFoundError(f"none of {', '.join(modules)}")


def with_settings(training: Any, **values: Any) -> Any:
    """The settings of a training with other values, in whichever group they are."""
    if not hasattr(training, "changed"):
        return dataclasses.replace(training, **values)
    names = {"yardstick": "baseline"}
    return training.changed(**{names.get(name, name): value for name, value in values.items()})


def explicit_baseline(experiment: Any, depth: int, **choices: Any) -> Any:
    """The explicit baseline in one stage: newer trees keep the shallow stage."""
    found = home("equilibria.lm.experiments", "equilibria.training").explicit(experiment, depth, **choices)
    last = dataclasses.replace(found.stages[-1], steps=found.total_steps)
    return dataclasses.replace(found, stages=(last,))


def names_of(value: Any) -> set[str]:
    """The fields of a dataclass or of its instance."""
    return {field.name for field in dataclasses.fields(value)}


def changed(stage: Any, **values: Any) -> Any:
    """A stage with other values, which are its own or those of its ``method``."""
    own = {name: value for name, value in values.items() if name in names_of(stage)}
    method = {name: value for name, value in values.items() if name not in own}
    if method:
        own["method"] = dataclasses.replace(stage.method, **method)
    return dataclasses.replace(stage, **own)


def broyden(updates: int) -> Any:
    """Broyden's method with so many updates before it starts anew."""
    from equilibria import Broyden

    return Broyden(**{"rank" if "rank" in names_of(Broyden) else "memory": updates})


def halved(solver: Any) -> Any:
    """A solver that keeps its history in bfloat16."""
    if "history_dtype" in names_of(solver):
        return dataclasses.replace(solver, history_dtype=torch.bfloat16)
    return dataclasses.replace(solver, half=True)


def per_step(step: Any) -> dict[str, float]:
    """What is recorded of each training step."""
    return {
        "losses": float(step.loss),
        "gradient norms": float(step.gradient_norm),
        "evaluations forward": sum(solution.evals for solution in step.solutions),
        "evaluations backward": sum(solution.evals for solution in step.adjoints),
    }


# Experiments.


def short(experiment: Any, *steps: int, **training: Any) -> Any:
    """The experiment with so many steps in its stages, and nothing besides training and validation."""
    stages = tuple(
        dataclasses.replace(stage, steps=count) for stage, count in zip(experiment.stages, steps, strict=True)
    )
    choices: dict[str, Any] = {"device": "cpu", "threads": 1, "warmup": 5, "valid_segments": 4}
    choices |= {"measure_memory": False, "yardstick": False, "spectral_radius": 0, "log_every": 10_000}
    choices |= {"valid_every": 10_000, "checkpoint_every": 10_000, **training}
    settings = with_settings(experiment.training, **choices)
    return dataclasses.replace(experiment, stages=stages, training=settings)


def recipe(name: str, *steps: int, **training: Any) -> Any:
    """A recipe in so many steps."""
    recipes = home("equilibria.lm.recipes", "equilibria.recipes").RECIPES
    return short(recipes[name](), *steps, **training)


def small(*steps: int, **training: Any) -> Any:
    """``tiny`` at half its width."""
    found = with_cell(recipe("tiny", *steps), width=64, inner=192, memory=24)
    choices = {"batch_size": 4, "segment_length": 32, **training}
    return dataclasses.replace(found, training=with_settings(found.training, **choices))


def with_model(experiment: Any, **values: Any) -> Any:
    """The experiment with another model."""
    return dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, **values))


def with_cell(experiment: Any, **values: Any) -> Any:
    """The experiment with another cell."""
    return with_model(experiment, cell=dataclasses.replace(experiment.model.cell, **values))


def with_implicit(experiment: Any, **values: Any) -> Any:
    """The experiment with another last stage."""
    *before, last = experiment.stages
    return dataclasses.replace(experiment, stages=(*before, changed(last, **values)))


# What is recorded.


def trained(experiment: Any, label: str = "") -> tuple[Any, Recorded]:
    """The trainer after the training, and what it computed."""
    trainer = home("equilibria.lm.training", "equilibria.training").Trainer(experiment, None, experiment.corpus.load())
    rows, take = [], trainer.step

    def watched(segment: Any) -> Any:
        step = take(segment)
        rows.append(per_step(step))
        return step

    trainer.step = watched
    trainer.fit()
    if len(rows) != experiment.total_steps:
        raise RuntimeError(f"{len(rows)} of {experiment.total_steps} steps were seen: Trainer.fit does not call step.")
    prefix = f"{label}: " if label else ""
    recorded = [(prefix + name, torch.tensor([row[name] for row in rows], dtype=torch.float64)) for name in rows[0]]
    for number, (name, weight) in enumerate(trainer.model.named_parameters()):
        recorded.append((f"{prefix}parameter {number}, {name}", weight.detach().clone()))
    return trainer, recorded


def validated(trainer: Any) -> Recorded:
    """The nll per token of the validation text."""
    return [("validation", torch.tensor([_nll_per_token(trainer.validate())], dtype=torch.float64))]


def _nll_per_token(evaluation: Any) -> float:
    """The score by its present name, or by the one that older commits gave it."""
    for name in ("nll_per_token", "nats_per_token"):
        if hasattr(evaluation, name):
            return getattr(evaluation, name)
    raise AttributeError(f"{type(evaluation).__name__} has no nll_per_token.")


def generated(trainer: Any, *, length: int = 32, warm: bool = False, label: str = "") -> Recorded:
    """Logits of the likeliest tokens after three prompts of different lengths, and tokens that are drawn."""
    generate = home("equilibria.lm.model", "equilibria.language").generate
    model, text = trainer.model.eval(), trainer.corpus.valid.tokens
    prompts = [text[:5], text[40:52], text[100:103]]
    longest = max(map(len, prompts))
    tokens = torch.stack([torch.nn.functional.pad(prompt, (longest - len(prompt), 0)) for prompt in prompts])
    logits = []
    with torch.no_grad():
        memory = model.cache(3, padding=torch.tensor([longest - len(prompt) for prompt in prompts]), warm=warm)
        for _ in range(length):
            found, memory = model.logits(tokens, memory, last=True)
            logits.append(found[:, -1])
            tokens = found[:, -1].argmax(dim=-1, keepdim=True)
    drawn = generate(model, prompts, length=length, temperature=0.8, top_k=20, top_p=0.95, seed=1)
    prefix = f"{label}: " if label else ""
    return [(f"{prefix}logits", torch.stack(logits, dim=1)), (f"{prefix}drawn tokens", drawn)]


def radius(trainer: Any) -> Recorded:
    """The spectral radius of the Jacobian on a segment of the validation text."""
    from equilibria.stability import spectral_radius

    model, tokens = trainer.model.eval(), trainer.corpus.valid.tokens[:256].view(4, 64)
    with torch.no_grad():
        layer = model(tokens, tokens).layer
    found = spectral_radius(layer.f, layer.z, iterations=10, generator=torch.Generator().manual_seed(0))
    return [("spectral radius", found.detach())]


# The cases.


def tiny() -> Recorded:
    trainer, recorded = trained(recipe("tiny", 15, 25))
    return recorded + validated(trainer) + generated(trainer) + radius(trainer)


def tiny_trellis() -> Recorded:
    trainer, recorded = trained(recipe("tiny-trellis", 15, 25))
    return recorded + validated(trainer) + generated(trainer)


def copying() -> Recorded:
    trainer, recorded = trained(recipe("copying", 15, 25, batch_size=8, eval_batch_size=8))
    return recorded + validated(trainer)


def regularised() -> Recorded:
    """All dropout of a transformer, the Jacobian penalty in some steps, drawn budgets, a batch in two parts."""
    from equilibria import Stop

    experiment = with_cell(small(15, 25, accumulate=2), dropout=0.2, attention_dropout=0.1)
    experiment = with_model(experiment, dropout=0.2, word_dropout=0.1)
    more = {"penalty": 0.5, "penalty_share": 0.5, "budget_jitter": 2, "eval_stop": Stop(rtol=1e-3, max_evals=40)}
    trainer, recorded = trained(with_implicit(experiment, **more))
    return recorded + validated(trainer)


def trellis_regularised() -> Recorded:
    """All dropout of a TrellisNet, its regularised activations, and a mixture of softmaxes."""
    experiment = recipe("tiny-trellis", 15, 25, batch_size=4, segment_length=32)
    experiment = with_cell(experiment, width=64, hidden=96, outputs=64, dropout=0.2, weight_dropout=0.3)
    losses = dataclasses.replace(experiment.model.losses, activation=2.0, temporal_activation=1.0)
    mixture = config("equilibria.language", "Mixture")(experts=3, dropout=0.2)
    more = {"dropout": 0.2, "input_dropout": 0.3, "word_dropout": 0.1, "output_dropout": "token"}
    trainer, recorded = trained(with_model(experiment, losses=losses, mixture=mixture, **more))
    return recorded + validated(trainer) + generated(trainer)


def explicit() -> Recorded:
    """Explicit networks of four layers: tied, each layer with its own memory, and with weights of its own."""
    kinds: dict[str, dict[str, Any]] = {
        "tied": {},
        "tied, recomputed": {"checkpoint": True},
        "tied, a memory a layer": {"memory": "layers"},
        "untied": {"tied": False},
    }
    every: Recorded = []
    for label, choices in kinds.items():
        experiment = explicit_baseline(with_model(small(15, 25), dropout=0.1), 4, **choices)
        trainer, recorded = trained(experiment, label)
        every += recorded + generated(trainer, length=12, label=label)
    return every


def chain() -> Recorded:
    """Two blocks, one with the positions of Transformer-XL and one with biases that are learned; clusters of tokens."""
    experiment = small(15, 25)
    block = dataclasses.replace(experiment.model.cell, memory=20, dropout=0.1)
    blocks = (
        dataclasses.replace(block, positions="relative", heads=2),
        dataclasses.replace(block, positions="decay", inner=96, window=40),
    )
    cell = config("equilibria.cells", "Chain")(cells=blocks)
    clusters = config("equilibria.language", "Adaptive")(cutoffs=(20, 50), division=2)
    trainer, recorded = trained(with_model(experiment, cell=cell, adaptive=clusters))
    return recorded + validated(trainer) + generated(trainer)


def cells() -> Recorded:
    """Eight steps of each other kind of cell and head."""
    transformer = small(3, 5, segment_length=24)
    trellis = recipe("tiny-trellis", 3, 5, batch_size=4, segment_length=24)
    trellis = with_cell(trellis, width=48, hidden=64, outputs=48)
    clusters = config("equilibria.language", "Adaptive")(cutoffs=(20, 50), division=2)
    kinds = {
        "norm before the parts": explicit_baseline(with_cell(transformer, norm="pre"), 3),
        "pre-normalised": with_cell(transformer, norm="pre-normalised", affine=True),
        "another norm": with_cell(transformer, attention_norm=True, positions="relative", window=12),
        "masks of each position": with_cell(transformer, dropout=0.2, variational=False, weight_norm=False),
        "normal": with_cell(transformer, init="normal", std=0.05),
        "without memory": with_cell(transformer, memory=0),
        "TrellisNet": with_cell(trellis, recurrence="delayed", carry_input=False, injection_init="normal"),
        "TrellisNet without weight norm": with_cell(trellis, weight_norm=False, std=0.05),
        "untied head": with_model(transformer, tied=False, scaled=False, init="uniform"),
        "untied clusters": with_model(trellis, tied=False, adaptive=clusters, dropout=0.1),
    }
    every: Recorded = []
    for label, experiment in kinds.items():
        trainer, recorded = trained(experiment, label)
        every += recorded + generated(trainer, length=8, label=label)
    return every


def warm() -> Recorded:
    """Solves that start where the segment before ended."""
    trainer, recorded = trained(with_implicit(recipe("tiny", 15, 25, batch_size=4), warm=True))
    return recorded + validated(trainer) + generated(trainer, warm=True)


def solvers() -> Recorded:
    """Eight steps by each solver and each gradient rule."""
    from equilibria import (
        Anderson,
        Implicit,
        Neumann,
        NewtonKrylov,
        Phantom,
        Picard,
        Reversible,
        ReversibleGradient,
        Shine,
        Stop,
        Unroll,
    )

    stop = Stop(rtol=1e-3, atol=1e-6, max_evals=20)
    implicit = Implicit(Anderson(), stop)
    kinds: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "Broyden": (broyden(20), Implicit(broyden(20), stop), {}),
        "Broyden that starts anew": (broyden(4), Implicit(broyden(3), stop), {}),
        "Broyden in bfloat16": (halved(broyden(20)), Implicit(halved(broyden(20)), stop), {}),
        "Anderson in bfloat16": (halved(Anderson()), Implicit(halved(Anderson(window=3)), stop), {}),
        "Anderson, mixed": (Anderson(window=4, mixing=0.7, ridge=1e-4), implicit, {}),
        "Newton–Krylov": (NewtonKrylov(inner=5), Implicit(NewtonKrylov(inner=4), stop), {}),
        "Picard": (Picard(), Implicit(Picard(0.7), stop), {}),
        "Picard, damped": (Picard(0.5), implicit, {}),
        "Neumann": (Anderson(), Neumann(5), {}),
        "Neumann without terms": (Anderson(), Neumann(0), {}),
        "Phantom": (Anderson(), Phantom(4, 0.5), {}),
        "Shine": (broyden(20), Shine(), {}),
        "Unroll": (Anderson(), Unroll(), {}),
        "Unroll, recomputed": (Picard(), Unroll(checkpoint=True), {}),
        "Reversible": (Reversible(0.5), ReversibleGradient(), {"stop": Stop(rtol=1e-3, atol=1e-6, max_evals=13)}),
        "no tolerance": (Anderson(), implicit, {"stop": Stop(rtol=0, atol=0, max_evals=9, best=False)}),
    }
    every: Recorded = []
    for label, (solver, gradient, more) in kinds.items():
        choices = {"solver": solver, "gradient": gradient, "stop": stop, **more}
        every += trained(with_implicit(small(3, 5, segment_length=24), **choices), label)[1]
    autocast = small(3, 5, segment_length=24, precision="bfloat16")
    return every + trained(autocast, "autocast")[1]


CASES: dict[str, Callable[[], Recorded]] = {
    "tiny": tiny,
    "tiny-trellis": tiny_trellis,
    "copying": copying,
    "regularised": regularised,
    "trellis-regularised": trellis_regularised,
    "explicit": explicit,
    "chain": chain,
    "cells": cells,
    "warm": warm,
    "solvers": solvers,
}


def work(tree: Path, out: Path, cases: list[str]) -> None:
    """The worker: computes the cases with the library of ``tree``, and writes them to ``out``."""
    import equilibria

    place = Path(equilibria.__file__).resolve()
    if not place.is_relative_to(tree.resolve()):
        raise RuntimeError(f"equilibria was imported from {place}, which is not in {tree}.")
    print(f"  {place.parent}", flush=True)
    torch.set_num_threads(1)
    torch.backends.mkldnn.enabled = False  # which library multiplies is no part of the comparison
    found: Tree = {}
    for case in cases:
        began = time.perf_counter()
        try:
            found[case] = checked(CASES[case]())
        except Exception as error:
            traceback.print_exc()
            found[case] = f"{type(error).__name__}: {' '.join(str(error).split())}"
        print(f"  {case}: {time.perf_counter() - began:.0f} s", flush=True)
    torch.save(found, out)


def checked(recorded: Recorded) -> Recorded:
    """The same; an error if a number is not finite, which would equal nothing."""
    for label, tensor in recorded:
        if not torch.isfinite(tensor).all():
            raise RuntimeError(f"{label} is not finite.")
    return recorded


# Trees.


def commit_of(name: str) -> str:
    """The full hash of a commit."""
    words = ["git", "-C", str(ROOT), "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}"]
    found = subprocess.run(words, capture_output=True, text=True)
    if found.returncode:
        sys.exit(f"{name!r} is no commit of {ROOT}.")
    return found.stdout.strip()


@contextlib.contextmanager
def checked_out(commit: str | None) -> Iterator[Path]:
    """A folder with the tree of a commit, for a while; the working tree for None."""
    if commit is None:
        yield ROOT
        return
    git = ["git", "-C", str(ROOT), "worktree"]
    with tempfile.TemporaryDirectory(prefix="bits-") as folder:
        tree = Path(folder) / commit[:9]
        try:
            subprocess.run([*git, "add", "--quiet", "--detach", str(tree), commit], check=True)
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=False)


def computed(commit: str | None, cases: list[str]) -> Tree:
    """What a tree computes, in a process of its own."""
    print(f"{commit[:9] if commit else 'the working tree'}:", flush=True)
    with checked_out(commit) as tree, tempfile.TemporaryDirectory(prefix="bits-") as folder:
        out = Path(folder) / "recorded.pt"
        paths = [str(tree / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONDONTWRITEBYTECODE": "1"}
        environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        words = [sys.executable, str(Path(__file__).resolve()), "--worker", str(out), "--tree", str(tree)]
        done = subprocess.run([*words, "--cases", ",".join(cases)], env=environment, cwd=tree)
        if done.returncode:
            sys.exit(f"The worker ended with exit code {done.returncode}.")
        return torch.load(out)


def kept(commit: str, cases: list[str], path: Path | None) -> Tree:
    """What the commit computes, as far as ``path`` has it from this machine; the rest is computed and added."""
    if path is None:
        return computed(commit, cases)
    here = {name: str(machine()[name]) for name in ("cpu", "python", "torch")}
    every = torch.load(path) if path.exists() else {}
    entry = every.get(commit)
    if entry is None or entry["machine"] != here:
        entry = {"machine": here, "cases": {}, "programs": {}}
    program = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    missing = [case for case in cases if case not in entry["cases"]]
    if older := [case for case in cases if case not in missing and entry["programs"][case] != program]:
        print(f"{path} has {', '.join(older)} from another version of this program: remove it if they have changed.")
    if missing:
        found = computed(commit, missing)
        good = {case: recorded for case, recorded in found.items() if not isinstance(recorded, str)}
        entry["cases"] |= good
        entry["programs"] |= dict.fromkeys(good, program)
        torch.save({**every, commit: entry}, path)
        return {**entry["cases"], **found}
    return entry["cases"]


# Comparison.


def difference(old: Recorded, new: Recorded) -> str | None:
    """What differs, in words; None if nothing does."""
    if len(old) != len(new):
        return f"{len(old)} and {len(new)} tensors"
    pairs = [(label, a, b) for (label, a), (_, b) in zip(old, new, strict=True)]
    other = [(label, a, b) for label, a, b in pairs if not same(a, b)]
    if not other:
        return None
    label, a, b = other[0]
    sizes = [(label, float((a.double() - b.double()).abs().max())) for label, a, b in other if a.shape == b.shape]
    where, largest = max(sizes, key=lambda size: size[1], default=(label, float("nan")))
    return f"{len(other)} differ, by up to {largest:.1e} ({where}); the first: {label}{first(a, b)}"


def same(a: Tensor, b: Tensor) -> bool:
    """Whether kind, shape and all values are the same."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def first(a: Tensor, b: Tensor) -> str:
    """The first place where two tensors differ, and how."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return f": {a.dtype} {list(a.shape)} and {b.dtype} {list(b.shape)}"
    place = (a != b).nonzero()[0].tolist()
    return f"{place}: {a[tuple(place)]:.9g} and {b[tuple(place)]:.9g}"


def compare(old: Tree, new: Tree, cases: list[str]) -> bool:
    """Prints the table; whether all is equal."""
    rows, equal = [("case", "tensors", "result")], True
    for case in cases:
        ours, theirs = old[case], new[case]
        if isinstance(ours, str) or isinstance(theirs, str):
            faults = (f"{which} failed: {it}" for which, it in (("OLD", ours), ("NEW", theirs)) if isinstance(it, str))
            rows.append((case, "–", "; ".join(faults)))
            equal = False
            continue
        fault = difference(ours, theirs)
        rows.append((case, str(len(ours)), fault or "equal"))
        equal = equal and fault is None
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for case, count, result in rows:
        print(f"{case:<{widths[0]}}  {count:>{widths[1]}}  {result}")
    return equal


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", nargs="?", metavar="OLD", help="a commit")
    parser.add_argument("new", nargs="?", metavar="NEW", help="another one; the working tree if it is left out")
    parser.add_argument("--cases", default=",".join(CASES), help="some of %(default)s")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="keeps what OLD computes")
    parser.add_argument("--worker", type=Path, metavar="OUT", help=argparse.SUPPRESS)
    parser.add_argument("--tree", type=Path, help=argparse.SUPPRESS)
    found = parser.parse_args()
    found.cases = found.cases.split(",")
    if strange := [case for case in found.cases if case not in CASES]:
        parser.error(f"there is no case {', '.join(strange)}; there are {', '.join(CASES)}.")
    if found.worker is None and found.old is None:
        parser.error("OLD, a commit, is missing.")
    return found


def main() -> int:
    given = arguments()
    if given.worker is not None:
        work(given.tree, given.worker, given.cases)
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the folders are removed
    old, new = commit_of(given.old), given.new and commit_of(given.new)
    recorded = kept(old, given.cases, given.keep)
    return 0 if compare(recorded, computed(new, given.cases), given.cases) else 1


if __name__ == "__main__":
    sys.exit(main())
