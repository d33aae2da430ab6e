"""load: a trained model back from its run directory."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from equilibria.errors import UsageError
from equilibria.fixed_point import Method
from equilibria.lm.corpora import Corpus, Stream, Vocabulary
from equilibria.lm.corpora.language import Language
from equilibria.lm.corpora.text_folder import lines_of
from equilibria.lm.device import choose_device
from equilibria.lm.evaluation import Evaluation, evaluate
from equilibria.lm.experiments.experiment import Experiment
from equilibria.lm.experiments.stage import Stage
from equilibria.lm.model import LanguageModel
from equilibria.lm.runs.checkpoint import CheckpointError
from equilibria.lm.runs.continuation import continuation
from equilibria.lm.runs.run import Run, require
from equilibria.lm.runs.weights import load_weights, weights

_log = logging.getLogger(__name__)

Which = Literal["best", "last"]
"""The checkpoint with the best validation (see ``Run.best``), or the newest one."""


@dataclasses.dataclass(frozen=True, eq=False)
class Trained:
    """A model ready for use, and where it comes from."""

    experiment: Experiment
    """What was trained."""
    language: Language
    """What its tokens mean."""
    model: LanguageModel
    """In evaluation mode; it solves as in ``stage``."""
    stage: Stage
    """The stage that the checkpoint was written in: where two meet, the later one."""
    step: int
    """The training step of the weights."""
    data: Path | None = None
    """The text that was asked for in the place of the run's own: a folder like the corpus, or a file; None for that."""

    @property
    def vocabulary(self) -> Vocabulary:
        """The meaning of the token ids."""
        return self.language.vocabulary

    def generate(
        self,
        prompt: str,
        length: int = 400,
        *,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        stop: str | None = None,
    ) -> str:
        """The text that the model writes after ``prompt``, without the prompt; arguments as of ``continuation``."""
        choices = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed, "stop": stop}
        return "".join(piece for (piece,) in self.pieces((prompt,), length=length, **choices))

    def pieces(self, prompts: Sequence[str], *, length: int = 400, **choices: Any) -> Iterator[tuple[str, ...]]:
        """The same text piece by piece, of several prompts side by side."""
        segment = self.experiment.training.batches.segment_length
        return continuation(self.model, self.language, prompts, length=length, segment=segment, **choices)

    def evaluate(
        self,
        split: Literal["train", "valid", "test"] = "valid",
        *,
        batch_size: int = 1,
        segment_length: int | None = None,
        overlap: int | None = None,
        max_segments: int | None = None,
        method: Method | None = None,
    ) -> Evaluation:
        """The score of the model on a split of its corpus, or on the file ``data``.

        Args:
            split: of the corpus; a file has none.
            batch_size: streams read side by side; 1 is exact, since each stream begins without memory.
            segment_length: tokens per solve; None for those of the training's validations.
            overlap: tokens that a segment shares with the one before; None for those of the training's validations.
            max_segments: read the first segments only; None for all.
            method: how to solve; None for the way of the run's own validations.
        """
        stream, usual = self.stream(split), self.experiment.training.evaluation
        return evaluate(
            self.model,
            stream,
            batch_size=batch_size,
            segment_length=None if stream.episode else segment_length or usual["segment_length"],
            overlap=usual["overlap"] if overlap is None else overlap,
            max_segments=max_segments,
            method=method or self.stage.evaluation_method,
            warm=self.stage.warm,
        )

    @functools.cached_property
    def corpus(self) -> Corpus:
        """What it was trained on, read again; or the folder ``data``, as ids of the run's vocabulary.

        Raises:
            ValueError: it is another text than that of the training, and nobody asked for another one.
        """
        corpus = self.experiment.corpus.load()
        changed = self.language.changed(corpus)
        if changed and self.data is None:
            raise ValueError(
                f"The text of {', '.join(changed)} is not the one that this run was trained, validated and tested on "
                "(their SHA-256 differ): bring the old one back, or say with --data FOLDER or --data FILE which text "
                "is meant."
            )
        if changed:
            _log.warning("The text of %s in %s is not that of the training.", ", ".join(changed), self.data)
        same = corpus.vocabulary.tokens == self.language.vocabulary.tokens
        return corpus if same else self.language.encoded(corpus)

    @property
    def is_file(self) -> bool:
        """True if a file was asked for in the place of the corpus."""
        return self.data is not None and self.data.is_file()

    def stream(self, split: str) -> Stream:
        """A split of the corpus, or the file ``data``, which is read as one text."""
        if self.data is None or not self.is_file:
            return getattr(self.corpus, split)
        if self.language.unit == "symbol":
            raise UsageError(f"--data {self.data}: this run was trained on a made-up task, and no text can be scored.")
        lines = lines_of(self.data, lowercase=getattr(self.experiment.corpus, "lowercase", False))
        try:
            return Stream.of_text(self.language.vocabulary.encode_lines(lines))
        except ValueError as error:
            raise ValueError(f"{self.data}: {error}") from None


def load(
    path: Path | str,
    *,
    checkpoint: Which = "best",
    data: Path | None = None,
    memory_length: int | None = None,
    segment: int | None = None,
    extra: Iterable[type] = (),
) -> Trained:
    """The model of the run in folder ``path``, in evaluation mode, with everything that is needed to use it.

        run = equilibria.load("runs/tiny")
        print(run.generate("The ", length=200), run.evaluate("test").bits)

    Args:
        path: the run directory.
        checkpoint: whose weights.
        data: where the corpus lies now, if it has moved; or a file with another text.
        memory_length: positions of the past that the cell is to remember; None for those of the training.
        segment: positions that are to be solved at once beside them; None for those of the training.
        extra: dataclasses from outside the library that the experiment holds.

    Raises:
        UsageError: there is no run in the folder; names the runs nearby.
        CheckpointError: the run has no good checkpoint yet, or its weights do not fit its experiment.
    """
    path = Path(path)
    run = Run.open(require(path))
    experiment = run.experiment(extra=extra)
    if data is not None and not data.is_file():
        experiment = with_data(experiment, data)
    stored = run.best() if checkpoint == "best" else run.newest()
    if stored is None:
        raise CheckpointError(f"{path} has no good checkpoint yet: continue the training with --resume.")
    language = run.language or Language.without_sums(experiment.corpus.load())
    stage = experiment.stage_named(stored.state.get("stage", ""))
    built = experiment if memory_length is None else with_memory(experiment, memory_length, segment=segment)
    model = built.build(language, stage)
    try:
        load_weights(model, stored.model)
    except CheckpointError:
        if weights(model).keys() != stored.model.keys():
            raise CheckpointError(
                f"The weights of {path} have other names than those that its experiment.json stands for in this "
                "version of the library; use the version that wrote them, or train anew."
            ) from None
        raise CheckpointError(
            f"The weights of {path} do not fit a corpus with {len(language.vocabulary):,} tokens in its vocabulary: "
            f"is {language.name} still the text it was trained on? Name the right folder with --data."
        ) from None
    model.eval().to(device(experiment))
    return Trained(experiment, language, model, stage, stored.step, data)


def with_data(experiment: Experiment, data: Path) -> Experiment:
    """The experiment with its corpus read from the folder ``data``."""
    corpus: Any = experiment.corpus
    if not any(field.name == "root" for field in dataclasses.fields(corpus)):
        raise UsageError(
            f"--data {data}: the corpus {type(corpus).__name__} is not read from a folder; leave --data out, or choose "
            "a recipe that reads one, such as ptb."
        )
    return dataclasses.replace(experiment, corpus=dataclasses.replace(corpus, root=data.expanduser().absolute()))


def with_memory(experiment: Experiment, length: int, *, segment: int | None = None) -> Experiment:
    """The experiment with a cell, in a chain with blocks, that remember ``length`` positions beside a segment."""
    model: Any = experiment.model
    cell = _remembering(getattr(model, "cell", model), length, segment or experiment.training.batches.segment_length)
    return dataclasses.replace(experiment, model=dataclasses.replace(model, cell=cell))


def _remembering(cell: Any, length: int, segment: int) -> Any:
    if hasattr(cell, "cells"):
        return dataclasses.replace(cell, cells=tuple(_remembering(block, length, segment) for block in cell.cells))
    if not hasattr(cell, "memory"):
        raise UsageError(
            f"--memory-length {length}: a {type(cell).__name__} has no number of positions that it remembers; leave it "
            "out for this model."
        )
    longest = cell.longest - segment
    if cell.positions == "decay" and min(length, (cell.window or 1000) - 1) > longest:
        raise UsageError(
            f"--memory-length {length}: this cell has position biases for {cell.longest:,} positions, memory and a "
            f"segment of {segment:,} together; give at most {max(0, longest):,}."
        )
    return dataclasses.replace(cell, memory=length)


def device(experiment: Experiment) -> torch.device:
    """Where the model runs: the device of the training, if this machine has it."""
    try:
        return choose_device(experiment.training.devices.device)
    except ValueError:
        return choose_device("auto")
