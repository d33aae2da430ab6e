"""A recipe, a corpus and a helper for the tests of the command line."""

from __future__ import annotations

from pathlib import Path

from equilibria.__main__ import main
from equilibria.commands import sample

sample.SAMPLE["character"] = 12  # the text with which a training ends: the whole one takes longer than the training

RECIPE = '''
from equilibria import Anderson, Implicit, Method, Picard, Stop, Unroll
from equilibria.cells import TransformerConfig
from equilibria.lm.corpora import TextFolder
from equilibria.lm.experiments import Experiment, Stage, Training
from equilibria.lm.model import LanguageConfig


def small() -> Experiment:
    """A model of a few hundred parameters."""
    return Experiment(
        name="small",
        corpus=TextFolder(unit="character"),
        model=LanguageConfig(
            cell=TransformerConfig(width=8, heads=2, inner=8, memory=4, positions="decay", longest=32),
        ),
        stages=(
            Stage("shallow", 3, Method(Picard(), Stop(rtol=0, atol=0, max_evals=3, best=False), Unroll())),
            Stage("implicit", 5, Method(Anderson(), Stop(rtol=1e-2), Implicit(stop=Stop(rtol=1e-2)))),
        ),
        training=Training().changed(
            batch_size=2, segment_length=8, log_every=1, valid_every=4, checkpoint_every=2, threads=1,
            valid_segments=3, spectral_radius=3, memory_depths=(2, 4),
        ),
    )


def number() -> int:
    return 3
'''


def furnish(folder: Path) -> None:
    """Put a recipe and a corpus into a folder."""
    (folder / "recipe.py").write_text(RECIPE)
    (folder / "text").mkdir()
    for split, times in (("train", 40), ("valid", 10), ("test", 10)):
        (folder / "text" / f"{split}.txt").write_text("abc d\nba cad\n" * times)


def fails(capsys, *words: str, code: int = 2) -> str:
    """The sentence that a command line fails with."""
    assert main(words) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("equilibria: ")
    assert captured.err.count("\n") == 1
    return captured.err.removeprefix("equilibria: ").strip()
