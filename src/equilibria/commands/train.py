"""`equilibria train RECIPE`: train, show it live, and end with one table, a sample and a report."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.text import Text

from equilibria.commands import report
from equilibria.commands.arguments import parse
from equilibria.commands.interrupt import Asked, interrupted
from equilibria.commands.recipe import experiment_of
from equilibria.commands.sample import write_sample
from equilibria.commands.terminal import complain
from equilibria.errors import UsageError
from equilibria.lm.corpora import Corpus, TextFolder
from equilibria.lm.device import choose_device
from equilibria.lm.environment import restarts
from equilibria.lm.experiments.experiment import Experiment
from equilibria.lm.experiments.explicit import explicit
from equilibria.lm.experiments.serialise import kinds_in
from equilibria.lm.ranks import Ranks
from equilibria.lm.recipes import RECIPES
from equilibria.lm.report import summary
from equilibria.lm.report.display import Display, literal, summary_table, waiting
from equilibria.lm.report.record import read
from equilibria.lm.runs.folder import NEW, check_shared, locked, withdraw
from equilibria.lm.runs.run import Run
from equilibria.lm.runs.trained import with_data
from equilibria.lm.training.tracker import require
from equilibria.lm.training.trainer import Trainer, TrainingInterrupted
from equilibria.torch_private import denormals_are_zero

RUNS = Path("runs")
"""Where runs go unless --out says otherwise."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Train the model of a recipe. Every number of the recipe is a flag; the last word of its name is enough where
    only one flag ends so: --batch-size 16.
    """

    experiment: Annotated[Experiment, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff]
    """The recipe."""
    out: Path | None = None
    """Folder of the run; None for runs/NAME, or the next free number."""
    data: Path | None = None
    """Folder of the corpus, for recipes that read one; the recipe text takes a file as well."""
    steps: int | None = None
    """Training steps of all stages together; each keeps its share. None for those of the recipe."""
    explicit: int | None = None
    """Train an explicit network of so many layers, which share one cell, instead of the equilibrium."""
    untied: tyro.conf.FlagCreatePairsOff[bool] = False
    """With --explicit: each layer has its own weights, as in Transformer-XL."""
    layer_memory: tyro.conf.FlagCreatePairsOff[bool] = False
    """With --explicit: each layer remembers its own past, and not all that of the last one."""
    recompute: tyro.conf.FlagCreatePairsOff[bool] = False
    """With --explicit: keep less and compute the layers again in the backward pass."""
    resume: tyro.conf.FlagCreatePairsOff[bool] = False
    """Continue where the run stopped; starts it if there is none."""
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False
    """Start again in a folder that holds a run, which the new run replaces once it has its first checkpoint."""
    quiet: tyro.conf.FlagCreatePairsOff[bool] = False
    """Show nothing but errors."""


EXPLICIT = ("--untied", "--layer-memory", "--recompute")
"""Flags that say more about --explicit."""

SWITCHES = ("-h", "--help", "--resume", "--overwrite", "--quiet", *EXPLICIT)
"""Flags that stand alone."""

HELP = """\
usage: equilibria train RECIPE [--out DIR] [--data FOLDER] [--resume | --overwrite] [--quiet] [--field value …]
                               [--steps N] [--lr RATE] [--batch-size N] [--threads N] [--seed N]
                               [--explicit LAYERS [--untied] [--layer-memory] [--recompute]]

{recipes}

--explicit LAYERS trains the recipe's explicit baseline, a network of so many layers where the equilibrium was: with the
weights of one cell, or, of a transformer, --untied, a Transformer-XL; the other flags then change the numbers of the
baseline.

`equilibria train RECIPE --help` lists every number of that recipe with its default."""


def main(arguments: Sequence[str]) -> int:
    """Train; returns 0, or 130 or 143 if Ctrl-C or SIGTERM asked it to leave."""
    if not arguments or arguments[0] in ("-h", "--help"):
        recipes = f"RECIPE is one of {', '.join(RECIPES)}, or FILE.py:FUNCTION for a function returning an Experiment."
        print(HELP.format(recipes=textwrap.fill(recipes, width=119, break_on_hyphens=False)))
        return 0 if arguments else 2
    recipe, words = _split(arguments)
    options, path = _options(recipe, words)
    console = Console(highlight=False)
    require(options.experiment.training.log.tracker_name)  # a tracker that is missing must not leave a run behind
    with waiting("reading the corpus"):
        corpus = options.experiment.corpus.load()
    training = options.experiment.training
    device = choose_device(training.devices.device)  # one that is missing must not cost an old run
    with Ranks.joined(training.devices.parallel, device.type, timeout=training.devices.rank_timeout) as ranks:
        return _train(options, path, corpus, [recipe, *_explicit_words(words)], console, ranks)


def _train(options: Options, path: Path, corpus: Corpus, recipe: Sequence[str], console: Console, ranks: Ranks) -> int:
    experiment, quiet = options.experiment, options.quiet or not ranks.first
    display = Display(console, experiment, unit=corpus.unit, quiet=quiet)
    path = ranks.of_first(path)  # the others may have seen it taken
    with contextlib.ExitStack() as stack:
        stack.enter_context(denormals_are_zero())  # before PyTorch starts its threads, which take the setting over
        if ranks.first:
            stack.enter_context(locked(path))
            options = dataclasses.replace(options, **_restarted(options, path))
            run = Run.start(path, experiment, resume=options.resume, overwrite=options.overwrite)
            stack.callback(withdraw, path)
            stack.callback(run.give_up)
        resume, overwrite = ranks.of_first((options.resume, options.overwrite))
        check_shared(path, ranks)
        run = Run.open(path, replacing=overwrite)
        if resume and run.language is not None:
            corpus = run.language.adopted(corpus)
        if not quiet:
            console.print(literal(f"{experiment.name} on {corpus.name}, in {run.path}"), soft_wrap=True)
            if options.out is None and run.path.name != experiment.name and not (resume or overwrite):
                hint = "--resume continues the last run, and --overwrite replaces it"
                console.print(literal(f"{RUNS / experiment.name} is there already: {hint}", "dim"), soft_wrap=True)
        asked, trainer = Asked(), None
        try:
            with display.running():
                trainer = Trainer(experiment, run, corpus, on_event=display.show, ranks=ranks)
                stack.enter_context(asked.heard(trainer))
                if resume:
                    display.resumed(trainer.resume())
                trainer.fit()
        except (KeyboardInterrupt, TrainingInterrupted):
            if ranks.first:
                done = trainer.steps_done if trainer is not None else 0
                complain(f"\n{interrupted(run, recipe, done, ranks)}")
            return 128 + asked.number
        if ranks.first:
            _finish(run, experiment, corpus, console, quiet=quiet)
    return 0


def _restarted(options: Options, path: Path) -> dict[str, bool]:
    """How a process continues that torchrun has started again, whatever it was told at first."""
    if not restarts():
        return {}
    again = options.overwrite and (path / NEW).is_dir()  # the old run is still there, and the new one had not begun
    return {"overwrite": again, "resume": not again}


def _split(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """The recipe and the other words; it may stand before or after the flags, and the values of flags are none."""
    if not arguments[0].startswith("-"):
        return arguments[0], list(arguments[1:])
    free = [place for place, word in enumerate(arguments) if not word.startswith("-")]
    free = [place for place in free if not _takes_value(arguments[place - 1])]
    named = [place for place in free if arguments[place] in RECIPES or ".py:" in arguments[place]]
    if not free:
        first = arguments[0]
        raise UsageError(f"train needs a recipe before {first}: one of {', '.join(RECIPES)}, or FILE.py:FUNCTION.")
    place = (named or free)[0]
    return arguments[place], [*arguments[:place], *arguments[place + 1 :]]


def _takes_value(word: str) -> bool:
    """Whether the next word of the command line is a value of this one."""
    return word.startswith("-") and "=" not in word and word.replace("_", "-") not in SWITCHES


def _options(recipe: str, words: Sequence[str]) -> tuple[Options, Path]:
    """The options of the command line, and the folder of the run.

    A run that continues starts from its own experiment.json, so its first flags need not be repeated.
    """
    default = Options(experiment=_as_explicit(experiment_of(recipe), words))
    options = parse(Options, words, verb=f"train {recipe}", default=default)
    said = [name for name in EXPLICIT if getattr(options, name[2:].replace("-", "_"))]
    if said and options.explicit is None:
        raise UsageError(f"{said[0]} says more about --explicit LAYERS, which is not there; try --explicit 12.")
    if options.resume and options.overwrite:
        raise UsageError("--resume continues a run and --overwrite replaces it; give one of the two.")
    options = _named(_completed(options), default.experiment.name, recipe)
    path = options.out or folder(options.experiment.name, taken=options.resume or options.overwrite)
    goes_on = options.resume or (restarts() > 0 and not (path / NEW).is_dir())
    if goes_on and (path / "experiment.json").is_file():
        stored = Run.open(path).experiment(extra=kinds_in(default.experiment))
        name, kind = options.experiment.name, default.experiment.name.removeprefix(recipe)
        of_a_text = recipe == "text" and isinstance(stored.corpus, TextFolder)  # its name is that of its text
        fits = stored.name.endswith(kind) if of_a_text else stored.name == name
        if not fits:
            raise UsageError(f"{path} is a run of {stored.name!r}, not of {name!r}; check --out.")
        default = dataclasses.replace(default, experiment=stored)
        options = parse(Options, words, verb=f"train {recipe}", default=default)
        options = _completed(options)
    return options, path


def _completed(options: Options) -> Options:
    """The options with their experiment on the text and for the steps that they ask for."""
    experiment = options.experiment
    if options.data is not None:
        experiment = with_data(experiment, options.data)
    if options.steps is not None:
        experiment = _of_length(experiment, options.steps)
    return dataclasses.replace(options, experiment=experiment)


def _named(options: Options, usual: str, recipe: str) -> Options:
    """The options with an experiment that is called as its text, if its recipe is for any text and --name is absent."""
    if recipe != "text" or options.data is None or options.experiment.name != usual:
        return options
    stem = re.sub(r"\W+", "-", options.data.stem).strip("-") or "text"
    name = stem + options.experiment.name.removeprefix("text")  # "-12-layers" of an explicit baseline stays
    return dataclasses.replace(options, experiment=dataclasses.replace(options.experiment, name=name))


def _of_length(experiment: Experiment, steps: int) -> Experiment:
    """The experiment with so many steps, of which each stage keeps its share, one at least."""
    if steps < len(experiment.stages):
        raise UsageError(
            f"--steps {steps}: {experiment.name} has {len(experiment.stages)} stages, and each has at least one step."
        )
    total, done, stages = experiment.total_steps, 0, []
    for place, stage in enumerate(experiment.stages):
        left = len(experiment.stages) - place - 1
        share = round(stage.steps * steps / total) if left else steps - done
        mine = min(max(1, share), steps - done - left)
        stages.append(dataclasses.replace(stage, steps=mine))
        done += mine
    warmup = min(experiment.training.optimisation.warmup, steps)
    training = experiment.training.changed(warmup=warmup)
    return dataclasses.replace(experiment, stages=tuple(stages), training=training)


def _as_explicit(experiment: Experiment, words: Sequence[str]) -> Experiment:
    """The explicit baseline of the experiment if the words ask for it, whose numbers the other flags then change."""
    known = _explicit_words(words)
    if not known:
        return experiment
    if not known[-1].isdecimal() or int(known[-1]) < 1:
        raise UsageError(f"--explicit takes a number of layers from 1 on, and not {known[-1]!r}; try --explicit 12.")
    tied, layers, checkpoint = ("--untied" not in known, "--layer-memory" in known, "--recompute" in known)
    return explicit(experiment, int(known[-1]), tied, memory="layers" if layers else "last", checkpoint=checkpoint)


def _explicit_words(words: Sequence[str]) -> list[str]:
    """The words about the explicit baseline, the number of layers last; none if there is no --explicit."""
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--explicit=") else [word])]
    depths = [depth for word, depth in itertools.pairwise(words) if word == "--explicit"]
    plain = [word.replace("_", "-") for word in words]
    return [*(word for word in plain if word in EXPLICIT), "--explicit", depths[-1]] if depths else []


def folder(name: str, *, taken: bool) -> Path:
    """runs/NAME, runs/NAME-2, …: the first that is free, or the last that is taken, if there is one."""
    numbered = (RUNS / (name if number == 1 else f"{name}-{number}") for number in itertools.count(1))
    present = list(itertools.takewhile(lambda path: path.exists(), numbered))
    if taken and present:
        return present[-1]
    return RUNS / (name if not present else f"{name}-{len(present) + 1}")


def _finish(run: Run, experiment: Experiment, corpus: Corpus, console: Console, *, quiet: bool) -> None:
    """The sample, the report and the table."""
    with waiting("writing a sample and the report"):
        if corpus.unit != "symbol":
            write_sample(run, experiment, corpus)
        record = read(run.path)
        page = report.write(record)
    if quiet:
        return
    console.print()
    console.print(summary_table(summary.rows(record), record.name))
    sample = report.read_sample(run.path)
    if sample is not None:
        console.print("\nA sample, after the words in bold from the validation text:", style="dim")
        console.print(Text.assemble(literal(sample[0], "bold"), literal(sample[1])))
    console.print(literal(f"\nreport: {page}"), soft_wrap=True)
