"""Keeper: the checkpoints of a training, which all ranks write and read together."""

from __future__ import annotations

import math

from equilibria.lm.corpora import Language
from equilibria.lm.experiments import Experiment
from equilibria.lm.ranks import Ranks
from equilibria.lm.runs import checkpoint, events
from equilibria.lm.runs.checkpoint import Checkpoint, CheckpointError
from equilibria.lm.runs.files import force
from equilibria.lm.runs.folder import check_shared
from equilibria.lm.runs.run import Run
from equilibria.lm.training.snapshot import save_together


class Keeper:
    """Writes the checkpoints of a run, and finds the newest good one.

    Args:
        run: the run directory; None writes nothing.
        ranks: the processes; each has a keeper, and all of them call every method.
        keep: number of newest checkpoints to keep, besides the best one.

    Raises:
        ValueError: the ranks do not see one folder; on all ranks.
    """

    def __init__(self, run: Run | None, ranks: Ranks, *, keep: int) -> None:
        self._run, self._ranks, self._keep = run, ranks, keep
        check_shared(None if run is None else run.path, ranks)

    def begin(self, experiment: Experiment, language: Language) -> None:
        """Note what the run is trained on.

        Raises:
            ValueError: the run has begun before, or is that of another experiment; on all ranks.
        """
        fault, run = None, self._run
        if run is not None and self._ranks.first:
            try:
                run.go_on(experiment)
                if run.events():
                    raise ValueError(
                        f"{run.path} has begun before, and would be trained from its beginning again in the same log; "
                        "call resume() before fit(), or begin another run: Run.start(folder, experiment)."
                    )
                run.keep(language)
            except ValueError as error:
                fault = error
        fault = self._ranks.of_first(fault)
        if fault is not None:
            raise fault

    def write(self, kept: Checkpoint, *, best: int | None) -> None:
        """Write a checkpoint and remove the oldest ones; ``best`` is the step of the best one, which stays."""
        run = self._run
        if run is None:
            return
        if self._ranks.first:
            force(run.metrics)
        save_together(run.checkpoints, kept, self._ranks)
        if self._ranks.first:
            checkpoint.prune(run.checkpoints, newest=self._keep, best=best)
            run.settle()
        self._ranks.wait()  # settle may have moved the run

    def newest(self) -> Checkpoint | None:
        """The newest good checkpoint, the same on all ranks; None if there are no checkpoints.

        Raises:
            CheckpointError: all checkpoints are damaged.
        """
        run = self._run
        if run is None:
            return None
        found, fault = None, None
        if self._ranks.first:
            try:
                found = run.newest()
            except CheckpointError as error:
                fault = error
        step, fault = self._ranks.of_first((None if found is None else found.step, fault))
        if fault is not None:
            raise fault
        if step is None or self._ranks.first:
            return found
        return checkpoint.load(run.checkpoints / checkpoint.name_of(step), verified=True)

    def cut_log(self, step: int) -> None:
        """Remove the lines of the log that are newer than the checkpoint of ``step``."""
        if self._run is not None and self._ranks.first:
            events.cut(self._run.metrics, step)

    def rollbacks(self) -> int:
        """How often the run has gone back to a checkpoint, by the factor of the learning rate in its log."""
        lines = self._run.events() if self._run is not None and self._ranks.first else []
        factors = [line["factor"] for line in lines if line["event"] == "rolled_back"]
        return self._ranks.of_first(round(-math.log2(min(factors, default=1.0))))

    def discard_after(self, step: int) -> None:
        """Remove the checkpoints after ``step``: they are damaged, and would count as newer than the next ones."""
        if self._run is not None and self._ranks.first:
            checkpoint.discard_after(self._run.checkpoints, step)

    def has(self, step: int) -> bool:
        """True if there is a checkpoint of this step."""
        run = self._run
        return self._ranks.of_first(run is not None and (run.checkpoints / checkpoint.name_of(step)).is_dir())

    def last(self) -> str:
        """The end of an error sentence that names the last checkpoint."""
        kept = checkpoint.all_in(self._run.checkpoints) if self._run is not None else []
        return f"the last checkpoint is {kept[-1]}" if kept else "there is no checkpoint yet"
