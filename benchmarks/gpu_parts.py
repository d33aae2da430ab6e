"""What ``gpu.py`` measures: parts in order of value, each with named cases that return one JSON value.

Every case builds what it needs, so that it can run alone. ``Setting(dry=True)`` makes all sizes small.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import attention
import explicit
import generation
import gpu_tests
import memory
import precision
import scaling
import steps
import torch
from device import gaps, waits
from gpu_tests import NotRun

import equilibria
from equilibria import Anderson, Broyden, Implicit, Method, Picard, Solver, Stop
from equilibria.cells import TransformerConfig
from equilibria.lm.corpora import Segment, Segments
from equilibria.lm.device import to
from equilibria.lm.model import LanguageConfig, LanguageModel
from equilibria.lm.model.modes import eval_mode
from equilibria.lm.recipes import RECIPES
from equilibria.lm.runs.trained import Trained

Case = Callable[[], Any]
PAPER = "wikitext103-v2"
"""The paper's larger transformer, in the authors' version 2.0: 71M parameters in the layer, batch 56 × 150."""
PAPER_WORDS = 267_735


@dataclasses.dataclass(frozen=True)
class Setting:
    """Where the cases run, and how large they are."""

    device: torch.device
    dry: bool = False

    @property
    def rounds(self) -> int:
        """Times that each thing is timed."""
        return 2 if self.dry else 7


@dataclasses.dataclass(frozen=True)
class Part:
    """Some cases that belong together."""

    name: str
    cases: Callable[[Setting], dict[str, Case]]
    share: float = 1.0
    """The share of all minutes that it may take at most."""


def tests(at: Setting) -> dict[str, Case]:
    """The tests that need a GPU; in a dry run on a CPU all of them are skipped."""
    return {"pytest -m gpu": gpu_tests.run}


def solves(at: Setting) -> dict[str, Case]:
    """That the number of waits does not grow with the evaluations, and the gaps between the kernels of a step."""
    cases: dict[str, Case] = {}
    for solver in (Anderson(), Broyden(), Picard()):
        cases[f"waits, {type(solver).__name__}"] = lambda solver=solver: waits_of(solver, at)
    cases["gaps"] = lambda: gaps_of(at)
    return cases


def waits_of(solver: Solver, at: Setting) -> dict[str, Any]:
    """Waits in a training step of `tiny` with few and with many evaluations; an AssertionError if they differ."""
    work = memory.Work(device=at.device, **small(at))
    found: dict[str, Any] = {}
    for evals in (8, 32):
        stop = Stop(rtol=0, atol=0, max_evals=evals)
        step = work.step(Method(solver, stop, Implicit(solver, stop)))
        step()  # pinned memory and handles are there from now on
        found[f"{evals} evaluations"] = waits(step, at.device)
    assert len(set(found.values())) == 1, f"the host waits in the iterations of {solver}: {found}"
    return found


def gaps_of(at: Setting) -> dict[str, Any]:
    """The gaps in a training step of the trained `tiny`, and in one of its explicit network."""
    loaded = trained(at)
    first, second = two_segments(loaded, at)
    models = explicit.networks(
        loaded.model, loaded.experiment.model, ("equilibrium, Anderson, 0.01", explicit.BASES[0])
    )
    found = {}
    for name, model in models.items():
        past = model(first.tokens, first.targets).memory

        def step(model: LanguageModel = model, past: Any = past) -> None:
            model(second.tokens, second.targets, past).nll.mean().backward()

        step()
        found[name] = gaps(step, at.device)
    return found


def memories(at: Setting) -> dict[str, Case]:
    """Peak memory of a training step against depth: `tiny`, as in the README, and the paper's size."""
    cases: dict[str, Case] = {}
    sizes: dict[str, dict[str, Any]] = {"tiny": small(at), PAPER: {"words": PAPER_WORDS}}
    if at.dry:
        sizes = {"tiny": small(at)}
    for recipe, size in sizes.items():
        for depth in (2, 4) if at.dry else memory.DEPTHS:
            for network, method in memory.methods(depth).items():
                cases[f"{recipe}, {network}, depth {depth}"] = lambda recipe=recipe, size=size, method=method: {
                    "bytes": memory.Work(recipe, device=at.device, **size).peak(method)
                }
    return cases


STEPS = (
    "equilibrium, Anderson, 0.01",
    "equilibrium, Anderson, 0.001",
    "equilibrium, Broyden, 0.01",
    "12 layers, tied",
    "18 layers, untied",
)


def training_steps(at: Setting) -> dict[str, Case]:
    """A training step beside explicit networks: trained `tiny` at its own and at a larger batch, others as drawn."""
    if at.dry:
        return {"tiny, trained, 2 × 16": lambda: beside(STEPS[:1] + STEPS[3:4], at)}
    cases: dict[str, Case] = {
        f"tiny, trained, {batch} × 64": lambda batch=batch: beside(STEPS, at, batch) for batch in (8, 64)
    }
    for recipe, words in (("ptb", 10_000), (PAPER, PAPER_WORDS)):
        cases[f"{recipe}, as drawn"] = lambda recipe=recipe, words=words: beside_as_drawn(recipe, words, STEPS, at)
    return cases


def compiled(at: Setting) -> dict[str, Case]:
    """Networks whose cell is compiled, beside the same ones that are not."""
    names = [
        name for base in ("equilibrium, Anderson, 0.01", "12 layers, tied") for name in (base, base + explicit.COMPILED)
    ]
    return {"tiny, trained": lambda: beside(names, at)}


def half(at: Setting) -> dict[str, Case]:
    """A training step under autocast to bfloat16, and the residuals that a solve reaches in half precision."""

    def under_autocast(run: Case) -> Case:
        def case() -> Any:
            with torch.autocast(at.device.type, dtype=torch.bfloat16):
                return run()

        return case

    names = ("equilibrium, Anderson, 0.01", "12 layers, tied")
    cases: dict[str, Case] = {"tiny, trained, bfloat16": under_autocast(lambda: beside(names, at))}
    if not at.dry:
        drawn = under_autocast(lambda: beside_as_drawn(PAPER, PAPER_WORDS, names, at))
        cases[f"{PAPER}, as drawn, bfloat16"] = drawn
    budget = 4 if at.dry else precision.BUDGET
    cases["residuals"] = lambda: precision.measure(at.device.type, budget=budget)
    return cases


def beside(names: Any, at: Setting, batch: int | None = None) -> list[dict[str, Any]]:
    """The networks of the trained `tiny`, by ``steps.compare``."""
    loaded = trained(at)
    first, second = two_segments(loaded, at, batch)
    return compare(loaded.model, loaded.experiment.model, names, first, second, at)


def beside_as_drawn(recipe: str, words: int, names: Any, at: Setting) -> list[dict[str, Any]]:
    """The same for a recipe whose weights are as drawn, on random tokens; so are its numbers of evaluations."""
    torch.manual_seed(0)
    experiment = RECIPES[recipe]()
    source = experiment.model.build(words).to(at.device)
    batches = experiment.training.batches
    tokens = torch.randint(words, (2, batches.batch_size, batches.segment_length)).to(at.device)
    pair = [Segment(part, part.roll(-1, dims=1), resets=False, epoch=0, index=0, position=0) for part in tokens]
    return compare(source, experiment.model, names, *pair, at)


def compare(
    source: LanguageModel, config: LanguageConfig, names: Any, first: Segment, second: Segment, at: Setting
) -> list[dict[str, Any]]:
    """``steps.compare`` of these networks, each with its own memory of the first segment."""

    def past(model: LanguageModel) -> Any:
        with eval_mode(model):
            return model(first.tokens, first.targets).memory

    models = explicit.networks(source, config, names)
    return steps.compare(models, second, past, base=explicit.BASES[0], repeats=at.rounds)


def attentions(at: Setting) -> dict[str, Case]:
    """Exact beside fused attention."""
    sizes = attention.SIZES
    if at.dry:
        sizes = {"small": attention.Size(2, 16, TransformerConfig(width=32, heads=4, inner=76, memory=16))}
    return {
        name: lambda name=name, size=size: attention.measure(name, size, at.rounds, at.device)
        for name, size in sizes.items()
    }


def generations(at: Setting) -> dict[str, Case]:
    """A generated token from the cache, beside solving the text again."""

    def run() -> dict[str, Any]:
        loaded = trained(at)
        return generation.costs(loaded.model, generation.beginnings(loaded), 64 if at.dry else 256)

    return {"tiny, trained": run}


def peer_steps(at: Setting) -> dict[str, Case]:
    """A training step beside torchdeq's."""

    def run(solver: str, batch: int) -> dict[str, Any]:
        try:
            import peers
        except ImportError as error:
            raise NotRun(f"torchdeq is not installed: {error}") from None
        loaded = trained(at)
        return peers.compare(loaded, solver, loaded.stream("valid"), at.rounds, batch)

    batches = (2,) if at.dry else (8, 64)
    return {
        f"tiny, trained, {solver}, batch {batch}": lambda solver=solver, batch=batch: run(solver, batch)
        for batch in batches
        for solver in ("anderson", "broyden")
    }


def two_devices(at: Setting) -> dict[str, Case]:
    """What two ranks exchange in a step: on two GPUs, or in a dry run on two processes."""
    enough = at.device.type != "cuda" or torch.cuda.device_count() >= 2
    return {"traffic": lambda: scaling.exchanged(at.device.type)} if enough else {}


def small(at: Setting) -> dict[str, Any]:
    """The size of a dry run, or that of the recipe."""
    return {"batch": 2, "length": 16} if at.dry else {}


def trained(at: Setting) -> Trained:
    """The trained `tiny` that ships with the library, on the device."""
    loaded = equilibria.load("tiny")
    loaded.model.to(at.device)
    return loaded


def two_segments(loaded: Trained, at: Setting, batch: int | None = None) -> Iterator[Segment]:
    """Two segments of the held-out text that follow one another, on the device."""
    batches, less = loaded.experiment.training.batches, small(at)
    streams, length = batch or less.get("batch", batches.batch_size), less.get("length", batches.segment_length)
    segments = Segments(loaded.stream("valid"), batch_size=streams, length=length)
    return (to(segments.at(index), at.device) for index in (0, 1))


PARTS = (
    Part("tests", tests, share=0.3),
    Part("solves", solves, share=0.2),
    Part("memory", memories, share=0.4),
    Part("steps", training_steps, share=0.4),
    Part("attention", attentions, share=0.3),
    Part("generation", generations, share=0.2),
    Part("peers", peer_steps, share=0.2),
    Part("compiled", compiled, share=0.4),
    Part("half", half, share=0.3),
    Part("devices", two_devices, share=0.2),
)
