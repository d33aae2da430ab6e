"""text: the model of ``tiny`` on a text of your own."""

from __future__ import annotations

import dataclasses

from equilibria.lm.corpora import TextFolder
from equilibria.lm.experiments import Experiment
from equilibria.lm.recipes.tiny import tiny


def text() -> Experiment:
    """Your own text: a file or folder named with --data, by characters, by words with --unit word, or by --unit bpe."""
    return dataclasses.replace(tiny(), name="text", corpus=TextFolder(unit="character"))
