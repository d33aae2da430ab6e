"""load: a trained model from its run directory."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from equilibria.checks import check_whole
from equilibria.errors import UsageError
from equilibria.fixed_point import Method
from equilibria.lm.corpora import Corpus, Stream, TextFolder, Vocabulary
from equilibria.lm.corpora.language import SPLITS, Language
from equilibria.lm.corpora.text_folder import lines_of
from equilibria.lm.corpora.vocabulary import noun
from equilibria.lm.device import choose_device
from equilibria.lm.evaluation import evaluate
from equilibria.lm.experiments.experiment import Experiment
from equilibria.lm.experiments.stage import Stage
from equilibria.lm.model import LanguageConfig, LanguageModel
from equilibria.lm.paths import expanded, path_of
from equilibria.lm.runs.checkpoint import CheckpointError
from equilibria.lm.runs.continuation import continuation
from equilibria.lm.runs.memory_length import with_memory
from equilibria.lm.runs.run import Run, Which
from equilibria.lm.runs.shipped import TEXTS, require
from equilibria.lm.runs.weights import load_weights, weights
from equilibria.lm.score import Evaluation

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Trained:
    """A trained model ready for use, with its experiment, vocabulary and training step."""

    experiment: Experiment
    """The experiment of the run."""
    language: Language
    """The vocabulary, and checksums of the training text."""
    model: LanguageModel
    """The model in evaluation mode; its method is that of ``stage``."""
    stage: Stage
    """The stage of the checkpoint; at the end of a stage, the next one."""
    step: int
    """The training step of the weights."""
    path: Path | None = None
    """The run directory; None for a model that was not read from one."""
    data: Path | None = None
    """Another text instead of the run's own: a folder like the corpus, or a file; None for the run's own."""

    def __repr__(self) -> str:
        """One line: name, cell, size, vocabulary, step and place."""
        model = self.experiment.model
        cell = type(model.cell if isinstance(model, LanguageConfig) else model).__name__.removesuffix("Config")
        size = sum(parameter.numel() for parameter in self.model.parameters())
        known = f"{len(self.vocabulary):,} {noun(self.language.unit)}s"
        place = "" if self.path is None else f", {str(self.path)!r}"
        return f"Trained({self.experiment.name!r}: {cell}, {size:,} parameters, {known}, step {self.step:,}{place})"

    @property
    def vocabulary(self) -> Vocabulary:
        """The vocabulary of the token ids."""
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
        """The text that the model generates after ``prompt``.

        Args:
            prompt: the text to continue, of at least one token.
            length: number of tokens to generate.
            temperature: divides the logits; 0 always takes the most probable token.
            top_k: choose among the k most probable tokens only.
            top_p: choose among the fewest most probable tokens whose probabilities add up to at least this.
            seed: the same seed gives the same text.
            stop: a token that ends the text.

        Raises:
            ValueError: the prompt is empty or has tokens that the model does not know, or an option is out of range.
        """
        choices = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed, "stop": stop}
        return "".join(piece for (piece,) in self.pieces((prompt,), length=length, **choices))

    def pieces(self, prompts: Sequence[str], *, length: int = 400, **choices: Any) -> Iterator[tuple[str, ...]]:
        """An iterator over the pieces of the generated text, for several prompts side by side.

        The options are those of ``generate``. A text that has ended has empty pieces.
        """
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
        official: bool = False,
    ) -> Evaluation:
        """The score of the model on a split of its corpus, or on the file ``data``.

        Args:
            split: the split of the corpus; ignored for a file, which has no splits.
            batch_size: number of streams read side by side; 1 is exact, since each stream begins without memory.
            segment_length: tokens per solve; None for the setting of the training's validations.
            overlap: tokens that a segment shares with the previous one; None for the setting of the training's
                validations.
            max_segments: read at most this many segments; None for all.
            method: the method of the solves; None for that of the training's validations.
            official: divide the tokens into rows first, as the published codes do; see ``Segments``.
        """
        stream, usual = self.stream(split), self.experiment.training.evaluation
        length = usual["segment_length"] if segment_length is None else segment_length
        return evaluate(
            self.model,
            stream,
            batch_size=batch_size,
            segment_length=None if stream.episode else length,
            overlap=usual["overlap"] if overlap is None else overlap,
            max_segments=max_segments,
            method=method or self.stage.evaluation_method,
            warm=self.stage.warm,
            vocabulary=self.language.spelling,
            official=official,
        )

    @functools.cached_property
    def corpus(self) -> Corpus:
        """The corpus of the training, or of the folder ``data``, as ids of the run's vocabulary.

        Raises:
            ValueError: the text is not that of the training, although ``data`` is None.
        """
        corpus = self.experiment.corpus.load()
        changed = self.language.changed(corpus)
        if changed and self.data is None:
            raise ValueError(
                f"The text of {', '.join(changed)} is not the one that this run was trained, validated and tested on "
                "(their SHA-256 differ); restore the old text, or name the text to use with --data FOLDER or --data "
                "FILE."
            )
        if changed:
            _log.warning("The text of %s in %s is not the text of the training.", ", ".join(changed), self.data)
        return corpus if corpus.vocabulary == self.language.vocabulary else self.language.encoded(corpus)

    @property
    def is_file(self) -> bool:
        """True if ``data`` is a file with another text, not the corpus."""
        return self.data is not None and self.data.is_file() and not _is_root(self.data, self.experiment)

    def stream(self, split: str) -> Stream:
        """A split of the corpus, as the run keeps it or as its source gives it; or the file ``data`` as one text."""
        if self.is_file:
            return self._text
        if split not in SPLITS:
            raise UsageError(f"There is no split {split!r} of a corpus; there are {', '.join(SPLITS)}.")
        kept = self._kept(split)
        return getattr(self.corpus, split) if kept is None else kept

    def _kept(self, split: str) -> Stream | None:
        """The split as the run keeps it in its folder ``texts``; None if it keeps none, or has another text."""
        if self.path is None or self.data is not None:
            return None
        file = self.path / TEXTS / f"{split}.txt"
        if not file.is_file():
            return None
        kept = Stream.of_text(self.vocabulary.encode(file.read_bytes().decode()))
        if not self.language.is_split(split, kept):
            raise ValueError(f"{file} is not the {split} text of this run (its SHA-256 differs); take it from a copy.")
        return kept

    @functools.cached_property
    def _text(self) -> Stream:
        """The file ``data`` as one text."""
        assert self.data is not None
        if self.language.unit == "symbol":
            raise UsageError(f"--data {self.data}: this run was trained on a synthetic task, and cannot score text.")
        # A source of a user's own may have this setting too.
        lines = lines_of(self.data, lowercase=getattr(self.experiment.corpus, "lowercase", False))
        try:
            return Stream.of_text(self.language.vocabulary.encode_lines(lines))
        except ValueError as error:
            raise ValueError(f"{self.data}: {error}") from None


def load(
    path: Path | str,
    *,
    checkpoint: Which = "best",
    data: Path | str | None = None,
    memory_length: int | None = None,
    segment: int | None = None,
    extra: Iterable[type] = (),
) -> Trained:
    """The model of the run in the folder ``path``, in evaluation mode and with everything needed to use it.

    ```python
    run = equilibria.load("runs/tiny")
    print(run.generate("The ", length=200), run.evaluate("test").bits)
    ```

    Args:
        path: the run directory, or the name of a model that ships with the library: "tiny". A folder of that name, and
            a run of that name in the folder ``runs``, come first.
        checkpoint: the checkpoint with the best validation, or the last one.
        data: the new folder or file of the corpus, if it has moved; or a file with another text.
        memory_length: number of past positions that the cell remembers; None for that of the training.
        segment: longest segment to solve with this memory; None for the segment length of the training.
        extra: dataclasses from outside the library that the experiment uses.

    Raises:
        UsageError: there is no run in the folder; names the runs nearby.
        CheckpointError: the run has no good checkpoint yet, or its weights do not fit its experiment.
    """
    check_whole("load", optional=True, memory_length=memory_length, segment=segment)
    if segment is not None and segment < 1:
        raise UsageError(f"segment={segment}: a segment has at least one token; leave it out for that of the training.")
    path = require(path_of("load", path=path))
    data = None if data is None else path_of("load", data=data)
    if data is not None and not data.exists():
        raise UsageError(f"--data {data}: {data.absolute()} does not exist; check the path.")
    run = Run.open(path)
    experiment = run.experiment(extra=extra)
    if data is not None and (not data.is_file() or _is_corpus(data, experiment, run.language)):
        experiment = with_data(experiment, data)
    stored = run.chosen(checkpoint)
    language = run.language or Language.without_sums(experiment.corpus.load())
    stage = experiment.stage_named(stored.state.get("stage", ""))
    built = experiment if memory_length is None else with_memory(experiment, memory_length, segment=segment)
    model = built.build(language, stage)
    try:
        load_weights(model, stored.model)
    except CheckpointError:
        if weights(model).keys() != stored.model.keys():
            raise CheckpointError(
                f"The weights of {path} have other names than those that this version of the library builds from its "
                "experiment.json; use the version that wrote them, or train again."
            ) from None
        raise CheckpointError(
            f"The weights of {path} do not fit a corpus with {len(language.vocabulary):,} tokens in its vocabulary: "
            f"is {language.name} still the text it was trained on? Name the right folder with --data."
        ) from None
    model.eval().to(device(experiment))
    return Trained(experiment, language, model, stage, stored.step, path, data)


def _is_corpus(data: Path, experiment: Experiment, language: Language | None) -> bool:
    """True if the file is the one that the run was trained on, which may have moved: its splits have the same sums."""
    if language is None or not isinstance(experiment.corpus, TextFolder):
        return False
    try:
        return not language.changed(dataclasses.replace(experiment.corpus, root=data).load())
    except ValueError:  # not a text that can be cut: another one
        return False


def _is_root(data: Path, experiment: Experiment) -> bool:
    return getattr(experiment.corpus, "root", None) == expanded(data).absolute()


def with_data(experiment: Experiment, data: Path) -> Experiment:
    """The experiment with ``data`` as the folder of its corpus; a UsageError if its corpus has no folder."""
    corpus: Any = experiment.corpus
    if not any(field.name == "root" for field in dataclasses.fields(corpus)):
        raise UsageError(
            f"--data {data}: the corpus {type(corpus).__name__} is not read from a folder; leave --data out, or choose "
            "a recipe that reads a folder, such as ptb."
        )
    return dataclasses.replace(experiment, corpus=dataclasses.replace(corpus, root=expanded(data).absolute()))


def device(experiment: Experiment) -> torch.device:
    """The device of the training if this machine has it; otherwise as for "auto"."""
    try:
        return choose_device(experiment.training.devices.device)
    except ValueError:
        return choose_device("auto")
