"""convert: published weights as a run of this library."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from equilibria.errors import UsageError
from equilibria.lm.convert.deq_lm import DEQLanguageModel
from equilibria.lm.convert.deq_transformer import DEQTransformer
from equilibria.lm.convert.deq_trellisnet import DEQTrellisNet
from equilibria.lm.convert.format import Format
from equilibria.lm.convert.numbering import Numbering, numbered
from equilibria.lm.convert.tensors import ConversionError, Tensors, read
from equilibria.lm.convert.trellisnet import TrellisNet
from equilibria.lm.corpora import Corpus
from equilibria.lm.corpora.language import Language
from equilibria.lm.corpora.vocabulary import noun
from equilibria.lm.experiments.experiment import Experiment
from equilibria.lm.model import LanguageConfig
from equilibria.lm.paths import path_of
from equilibria.lm.runs import checkpoint
from equilibria.lm.runs.checkpoint import Checkpoint
from equilibria.lm.runs.folder import locked
from equilibria.lm.runs.run import Run
from equilibria.lm.runs.weights import weights

FORMATS: tuple[Format, ...] = (DEQTransformer(), DEQLanguageModel(), DEQTrellisNet(), TrellisNet())
"""The formats that can be converted."""


@dataclasses.dataclass(frozen=True, eq=False)
class Conversion:
    """Published weights with everything that a run of them needs; ``write`` makes the run."""

    format: Format
    """The format of the file."""
    experiment: Experiment
    """The recipe's experiment, with the sizes of the file."""
    corpus: Corpus
    """The corpus, with its words numbered as in the file."""
    weights: dict[str, Tensor]
    """The parameters of the model by name."""
    source: Path
    """The file."""

    def write(self, path: Path | str) -> Run:
        """Write the run into a new folder: its weights are those of step 0, in the last stage, and it has no history.

        Raises:
            UsageError: the folder holds a run.
        """
        path = path_of("write", path=path)
        if (path / "experiment.json").exists():
            raise UsageError(f"{path} already holds a run; choose another folder with --out.")
        last = self.experiment.stages[-1].name
        origin = {"format": self.format.name, "file": str(self.source), "sha256": checkpoint.sha256_of(self.source)}
        state = {"stage": last, "position": 0, "seconds": 0.0, "converted": origin}
        with locked(path):
            run = Run.start(path, self.experiment)
            run.keep(Language.of(self.corpus))
            checkpoint.save(run.checkpoints, Checkpoint(0, self.weights, {}, {}, state))
            run.append({"event": "converted", "step": 0, "stage": last, **origin})
        return run


def convert(
    source: Path | str, experiment: Experiment, *, ids: Numbering | None = None, criterion: Path | str | None = None
) -> Conversion:
    """The weights of a published file for the model of an experiment, whose corpus is read.

    The sizes of the model come from the file, everything else from the experiment: where layer norm stands, the window,
    the memory, tolerances, and the cutoffs of clusters that share one table.

    Args:
        source: a state dict of one of ``FORMATS``.
        experiment: an experiment of the same kind of model, on the text of the training.
        ids: the order in which the file's words are numbered; None for that of its format.
        criterion: the state dict of the split softmax, which the authors' scripts keep apart from the model.

    Raises:
        ConversionError: the file is of no known format, has broken ties or tensors that nothing reads, or does not
            belong to the experiment or to its text.
    """
    source = path_of("convert", source=source)
    criterion = None if criterion is None else path_of("convert", criterion=criterion)
    tensors = read(source) if criterion is None else read(source).joined(read(criterion))
    kind = format_of(tensors)
    if not isinstance(experiment.model, LanguageConfig):
        raise ConversionError(
            f"{experiment.name} has {experiment.model.kind}, and the published formats are of "
            "transformers and TrellisNets; choose the recipe of the file's model."
        )
    model = _model(kind, tensors, experiment.model)
    found = kind.weights(tensors, model)
    tensors.skip(kind.copies)
    if rest := tensors.rest():
        more = f" and {len(rest) - 3} more" if len(rest) > 3 else ""
        raise ConversionError(
            f"{source} holds {', '.join(rest[:3])}{more}, which {kind.name} does not have; it was saved by a changed "
            "code, and leaving tensors out would give another model."
        )
    corpus = _corpus(kind, tensors, experiment, ids)
    experiment = dataclasses.replace(experiment, model=model)
    _check_shapes(found, experiment, corpus, source)
    return Conversion(kind, experiment, corpus, found, source)


def format_of(tensors: Tensors) -> Format:
    """The format of a file.

    Raises:
        ConversionError: it has no known one.
    """
    for kind in FORMATS:
        if kind.matches(tensors):
            return kind
    known = "; ".join(kind.name for kind in FORMATS)
    raise ConversionError(
        f"{tensors.source} has names of no known format, such as {', '.join(tensors.names()[:3])}; known are {known}."
    )


def _corpus(kind: Format, tensors: Tensors, experiment: Experiment, ids: Numbering | None) -> Corpus:
    corpus = experiment.corpus.load()
    have, need = kind.vocabulary_size(tensors), len(corpus.vocabulary)
    if have != need:
        raise ConversionError(
            f"{tensors.source} has {have:,} {noun(corpus.unit)}s and the text {corpus.name} has {need:,}; name the "
            "text of its training with --data, and the recipe that reads it with --recipe."
        )
    return numbered(corpus, ids or kind.numbering(experiment.corpus))


def _check_shapes(found: dict[str, Tensor], experiment: Experiment, corpus: Corpus, source: Path) -> None:
    """Raise a ConversionError unless these are the parameters of the experiment's model."""
    with torch.device("meta"):
        built = weights(experiment.build(corpus))
    for name in sorted(built.keys() | found.keys()):
        have, need = (tuple(part[name].shape) if name in part else None for part in (found, built))
        if have != need:
            given = f"has no {name}" if have is None else f"gives {name} the shape {have}"
            raise ConversionError(
                f"{source} {given} and the model {'has no such tensor' if need is None else f'has {need}'}; "
                "it was saved by a changed code, or its recipe is another one."
            )


def _model(kind: Format, tensors: Tensors, model: LanguageConfig) -> LanguageConfig:
    """The model with the sizes of the file.

    Raises:
        ConversionError: no model can have these sizes.
    """
    try:
        return kind.model(tensors, model)
    except ConversionError:
        raise
    except ValueError as error:
        raise ConversionError(f"{tensors.source} has sizes that its model cannot have: {error}") from None
