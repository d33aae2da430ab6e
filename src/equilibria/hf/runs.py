"""A trained run as a model and a tokenizer of transformers, and as a folder that ``from_pretrained`` reads."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from equilibria.errors import UsageError
from equilibria.hf import card
from equilibria.hf.configuration import EquilibriumConfig, seen_in_training
from equilibria.hf.modeling import EquilibriumForCausalLM
from equilibria.hf.remote import AUTO_MAP
from equilibria.hf.tokenization import EquilibriumTokenizer, tokenizer_of
from equilibria.layers.linear import fold as fold_weights
from equilibria.lm.corpora import Vocabulary
from equilibria.lm.model import LanguageConfig
from equilibria.lm.paths import path_of
from equilibria.lm.runs.files import discard, errors_of_the_disk
from equilibria.lm.runs.run import Run, Which
from equilibria.lm.runs.shipped import require
from equilibria.lm.runs.trained import Trained, load


@dataclasses.dataclass(frozen=True, eq=False)
class Converted:
    """A run for transformers."""

    model: EquilibriumForCausalLM
    """The model, in evaluation mode."""
    tokenizer: EquilibriumTokenizer | None
    """The tokenizer; None for a synthetic task, whose symbols are no text."""
    trained: Trained
    """The run itself."""


def from_run(path: Path | str, *, checkpoint: Which = "best", fold: bool = False) -> Converted:
    """The model of a run, with the same weights, and its tokenizer.

    Its window is that of the training, memory and segment together, so that it reads a text as the training did, and
    without borders between segments.

    Args:
        path: the folder of the run.
        checkpoint: the checkpoint with the best validation, or the last one.
        fold: store plain matrices instead of normalised weights, for adapters and quantisation.

    Raises:
        UsageError: there is no run, or its model is no equilibrium.
    """
    trained = load(path_of("from_run", path=path), checkpoint=checkpoint)
    language, experiment = trained.experiment.model, trained.experiment
    if not isinstance(language, LanguageConfig) or not language.solves:
        kind = "an explicit network" if isinstance(language, LanguageConfig) else language.kind
        raise UsageError(
            f"{path} is a run of {kind}, and only an equilibrium has one cache slot per "
            "position; leave --format hf out for its weights."
        )
    text = trained.language.unit != "symbol"
    stage = trained.stage
    assert stage.method is not None
    config = EquilibriumConfig.of(
        seen_in_training(language, experiment.training.batches.segment_length),
        len(trained.vocabulary),
        method=stage.method,
        eval_stop=stage.eval_stop,
        edge_reads_as=_edge(trained.vocabulary) if text else None,
        architectures=["EquilibriumForCausalLM"],
        auto_map=AUTO_MAP,
    )
    model = EquilibriumForCausalLM(config)
    model.model.load_state_dict(trained.model.state_dict())
    if fold:
        fold_weights(model.model)
        config.folded = True
    return Converted(model.eval(), tokenizer_of(trained.vocabulary) if text else None, trained)


def export(path: Path | str, out: Path | str, *, checkpoint: Which = "best", fold: bool = False) -> Converted:
    """Write a run as a folder for ``from_pretrained``: weights, configuration, tokenizer, model card, and its classes.

    Args:
        path: the folder of the run.
        out: the folder to write, which is new or empty.
        checkpoint: the checkpoint with the best validation, or the last one.
        fold: store plain matrices instead of normalised weights.

    Raises:
        UsageError: there is no run, its model is no equilibrium, or ``out`` has content.
    """
    path, out = path_of("export", path=path), path_of("export", out=out)
    if (out.exists() or out.is_symlink()) and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"--out {out} exists and is not an empty folder; name a new one.")
    found = from_run(path, checkpoint=checkpoint, fold=fold)
    new = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        with errors_of_the_disk(out):
            found.model.save_pretrained(out)
            if found.tokenizer is not None:
                found.tokenizer.save_pretrained(out)
            text = card.card(found.trained, Run.open(require(path)).events())
            (out / "README.md").write_text(text, encoding="utf-8")
    except Exception:
        _empty(out, remove=new)  # a part of an export would stand in the way of the next one
        raise
    return found


def _empty(folder: Path, *, remove: bool) -> None:
    """Empty the folder; remove it too if ``remove`` is true."""
    if not folder.is_dir():
        return
    for entry in folder.iterdir():
        discard(entry)
    if remove:
        folder.rmdir()


def _edge(vocabulary: Vocabulary) -> int:
    """The token to read at the edge of a text: the end of a line, or else a space, or else the first token."""
    places = map(vocabulary.place_of, ("\n", " "))
    return next((place for place in places if place is not None), 0)
