"""The verbs on a TrellisNet, whose memory has no length, and on segments that overlap."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from equilibria.__main__ import main
from equilibria.commands import sample
from small_run import fails, furnish

TRELLIS = '''
import dataclasses

from equilibria.cells import TrellisConfig
from equilibria.lm.model import Explicit, ExtraLosses, LanguageConfig
from equilibria.lm.experiments import Milestones

CELL = TrellisConfig(4, 3, 4, std=0.5)


def trellis():
    """The small recipe with another cell."""
    return dataclasses.replace(small(), name="trellis", model=LanguageConfig(cell=CELL, std=1.0))


def deep():
    """Its explicit network, in segments with an effective history."""
    explicit, losses = Explicit(4, auxiliary_every=2), ExtraLosses(auxiliary=0.1)
    model = LanguageConfig(cell=CELL, std=1.0, explicit=explicit, losses=losses)
    training = small().training.changed(overlap=3, decay=Milestones(steps=(2, 3)))
    stages = (Stage("explicit", steps=4),)
    return dataclasses.replace(small(), name="deep", model=model, stages=stages, training=training)
'''


@pytest.fixture
def place(tmp_path, monkeypatch, one_figure) -> Path:
    """A folder with the recipes and a corpus, which is where the commands run."""
    furnish(tmp_path)
    with (tmp_path / "recipe.py").open("a") as file:
        file.write(TRELLIS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "150")
    monkeypatch.setitem(sample.SAMPLE, "character", 12)
    return tmp_path


def printed(capsys, *words: str) -> str:
    """What a command line that succeeds prints."""
    assert main([*words]) == 0
    return capsys.readouterr().out


def test_a_memory_without_a_length_is_not_called_none(place, capsys):
    text = printed(capsys, "train", "recipe.py:trellis", "--data", "text")
    assert "validation: segments of 8, 8 streams, 3 evaluations and no tolerance, " in text
    assert "the best; segments of 8, 8 streams, at most 30 evaluations, " in text
    text += printed(capsys, "evaluate", "runs/trellis")
    assert "exact: the text is read in one piece" in text
    assert "no memory" not in text
    assert "Memory length" not in text
    assert len(printed(capsys, "generate", "runs/trellis", "--prompt", "ab", "--length", "40")) == 2 + 40 + 1
    for verb in (("evaluate",), ("generate", "--prompt", "ab")):
        sentence = fails(capsys, verb[0], "runs/trellis", *verb[1:], "--memory-length", "5")
        assert "the memory of a TrellisConfig has no length" in sentence


def test_an_overlap_is_named_wherever_a_score_is(place, capsys):
    text = printed(capsys, "train", "recipe.py:deep", "--data", "text")
    words = "segments of 8 (3 repeat the one before), 8 streams, "
    assert f"validation: {words}" in text
    assert f"the best; {words}" in text
    page = (place / "runs/deep/report/index.html").read_text(encoding="utf-8")
    assert words in page
    assert "An explicit network of 4 layers with the weights of one cell" in page
    assert "Milestones(steps=(2, 3), divide=10.0)" in page
    again = printed(capsys, "evaluate", "runs/deep")
    assert "8 tokens" in again
    assert "each reads the last 3 of the one before again" in again
    assert "exact" not in again
    carried = printed(capsys, "evaluate", "runs/deep", "--overlap", "0")
    assert "exact: the text is read in one piece" in carried
    assert "again, unscored" not in carried
    scores = [re.findall(r"Score +│ (\S+)", table) for table in (again, carried)]
    assert [len(found) for found in scores] == [1, 1]
    assert scores[0] != scores[1]
