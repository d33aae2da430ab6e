"""The files that one training step of a recipe runs through: `python benchmarks/files_of_a_step.py [RECIPE]`.

A file counts if a function of it is called during the step, from the segment to the updated weights.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from pathlib import Path
from types import FrameType

import equilibria
from equilibria.lm import recipes
from equilibria.lm.training import Trainer

FOLDER = Path(equilibria.__file__).parent


def files_of_a_step(name: str = "tiny") -> Counter[str]:
    """For each file below src/equilibria, the number of calls during one step of the recipe's last stage."""
    experiment = getattr(recipes, name)()
    trainer = Trainer(experiment, None, experiment.corpus.load())
    trainer.steps_done = experiment.total_steps - 1
    trainer._enter_stage()
    batches = trainer._batches()
    trainer.step(next(batches))  # what is done once, such as a first import, is no part of a step
    trainer.steps_done = experiment.total_steps - 1
    segment, calls = next(batches), Counter[str]()

    def seen(frame: FrameType, event: str, _: object) -> None:
        file = Path(frame.f_code.co_filename)
        if event == "call" and file.is_relative_to(FOLDER):
            calls[str(file.relative_to(FOLDER))] += 1

    sys.setprofile(seen)
    try:
        trainer.step(segment)
    finally:
        sys.setprofile(None)
    return calls


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    calls = files_of_a_step(*sys.argv[1:])
    for file, number in sorted(calls.items()):
        print(f"{number:7,}  {file}")
    print(f"{len(calls)} files, {sum(calls.values()):,} calls")
