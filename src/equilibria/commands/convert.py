"""`equilibria convert CHECKPOINT`: a run from weights that other codes have published."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from equilibria.commands.arguments import flags, parse, shortest
from equilibria.commands.recipe import experiment_of
from equilibria.commands.train import folder
from equilibria.errors import UsageError
from equilibria.lm.convert import Conversion, Numbering, convert
from equilibria.lm.experiments.experiment import Experiment
from equilibria.lm.report.display import waiting
from equilibria.lm.report.visible import visible
from equilibria.lm.runs.trained import with_data

NONE = Path()
"""No file was named."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Make a run of published weights: of the DEQ-Transformer and DEQ-TrellisNet of locuslab/deq, of TorchDEQ's deq-seq
    and deq-lm, and of TrellisNet. Sizes come from the file; what no shape says, such as where layer norm stands, the
    length of the memory, and the tolerances, is a flag of the recipe.
    """

    checkpoint: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """A state dict, written by torch.save(model.state_dict(), …). Whole pickled modules are refused."""
    experiment: Annotated[Experiment, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff]
    """The recipe."""
    out: Path | None = None
    """Folder of the run; None for runs/NAME, or the next free number."""
    data: Path | None = None
    """Folder of the text that the weights were trained on; its words give the vocabulary."""
    criterion: Path | None = None
    """State dict of the split softmax (SplitCrossEntropyLoss), which the scripts of TrellisNet and DEQ-TrellisNet keep
    apart from the model."""
    ids: Numbering | None = None
    """How the file numbers its words: by frequency in the training text ("train"), by frequency in all three texts
    ("all"), or by first appearance ("appearance"); None for the numbering of its code."""


HELP = """\
usage: equilibria convert CHECKPOINT --recipe RECIPE --data FOLDER [--out DIR] [--criterion FILE] [--ids ORDER]
                                     [--field value …]

CHECKPOINT is a state dict of locuslab/deq (2019, 2020, 2021), of TorchDEQ's deq-seq or deq-lm, or of TrellisNet.
RECIPE is that of the same model, such as wikitext103-v2, wikitext103-seq, wikitext103-unrolled, wikitext103-trellis,
ptb-trellis-deep, or FILE.py:FUNCTION.

`equilibria convert CHECKPOINT --recipe RECIPE --help` lists every number of that recipe with its default."""


def main(arguments: Sequence[str]) -> int:
    """Convert, and say what the run is."""
    recipe, words = _split(arguments)
    if recipe is None and (not words or "--help" in words or "-h" in words):
        print(HELP)
        return 0 if words else 2
    if recipe is None:
        raise UsageError(
            "convert needs --recipe: the recipe of the same model, such as wikitext103-v2 or ptb-trellis-deep."
        )
    default = Options(checkpoint=NONE, experiment=experiment_of(recipe))
    options = parse(Options, words, verb="convert", default=default)
    if options.checkpoint == NONE:
        raise UsageError("convert needs a file: the state dict that the authors' code has written.")
    if not options.checkpoint.is_file():
        raise UsageError(f"{options.checkpoint} is no file; name the state dict that the authors' code has written.")
    experiment = options.experiment if options.data is None else with_data(options.experiment, options.data)
    with waiting("reading the weights and the corpus"):
        found = convert(options.checkpoint, experiment, ids=options.ids, criterion=options.criterion)
    _check_flags(default.experiment, options.experiment, found.experiment)
    run = found.write(options.out or folder(experiment.name, taken=False))
    print(visible(f"{run.path}: {_said(found)}"))
    return 0


def _said(found: Conversion) -> str:
    count = sum(tensor.numel() for tensor in found.weights.values())
    return f"{count:,} weights of {found.format.name}, on {found.corpus.name}"


def _split(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """The recipe and the other words."""
    recipe, words = None, []
    rest = iter(arguments)
    for word in rest:
        name, equals, value = word.partition("=")
        if name == "--recipe":
            recipe = value if equals else next(rest, None)
            if recipe is None:
                raise UsageError("--recipe needs a value after it.")
        else:
            words.append(word)
    return recipe, words


def _check_flags(recipe: Experiment, asked: Experiment, found: Experiment) -> None:
    """Raise a UsageError if a flag asks for a size that is not the file's."""
    usual, given, real = (flags(experiment.model, "model.") for experiment in (recipe, asked, found))
    for name, value in given.items():
        if value != usual.get(name) and value != real.get(name):
            short = shortest(name, given)
            has = real.get(name, "no such part")
            raise UsageError(f"{short} {value}: the weights in the file say {has}; leave the flag out.")
