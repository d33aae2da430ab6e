"""The sample at the end of a training: the best model continues the beginning of the validation text."""

from __future__ import annotations

import re

from equilibria.commands import report
from equilibria.commands.failures import failures_of
from equilibria.lm.corpora import Corpus
from equilibria.lm.experiments.experiment import Experiment
from equilibria.lm.experiments.serialise import kinds_in
from equilibria.lm.runs.run import Run
from equilibria.lm.runs.trained import load

SAMPLE = {"character": 360, "word": 60, "bpe": 90}
"""Tokens of the sample."""


def write_sample(run: Run, experiment: Experiment, corpus: Corpus) -> None:
    """Let the best model continue the beginning of the validation text, and store what it writes for the report."""
    loaded, prompt = load(run.path, extra=kinds_in(experiment)), prompt_of(corpus)
    with failures_of(loaded):  # the closing table has the share of solves that converge
        report.write_sample(run.path, prompt=prompt, text=loaded.generate(prompt, SAMPLE[corpus.unit]))


def prompt_of(corpus: Corpus) -> str:
    """The first words, or characters, of the second line of the validation text, or of its first if that is the last.

    A word of a vocabulary of words stays whole, however long it is: a part of it would be another word.
    """
    text = corpus.vocabulary.decode(corpus.valid.tokens[:1000])
    line = text[text.find("\n") + 1 :].lstrip() or text.lstrip() or text
    last = r"\S+" if corpus.unit == "word" else r"\S{1,40}"
    words = re.match(rf"(\S+\s+){{0,7}}{last}", line)
    return line[:40] if corpus.unit == "character" or words is None else words[0]
