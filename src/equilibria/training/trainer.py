"""Trainer: an experiment's stages, step by step, with log, validation and checkpoints.

Letters: B batch, T time, D width.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from equilibria.corpora import Corpus, Segment, Segments
from equilibria.equilibrium import Equilibrium, Memory
from equilibria.training import checkpoint, metrics
from equilibria.training.comparison import loss_of, memory_comparison
from equilibria.training.decay import Validated
from equilibria.training.device import choose_device, compile_cells, to
from equilibria.training.evaluation import Evaluation, evaluate, jacobian_radius
from equilibria.training.experiment import Experiment
from equilibria.training.log import Log
from equilibria.training.metrics import Event
from equilibria.training.nested import owned
from equilibria.training.optimiser import averaged, build_optimiser, leave_behind, note_validation, set_learning_rate
from equilibria.training.run import Run
from equilibria.training.snapshot import capture, restore
from equilibria.training.step import Step
from equilibria.training.yardstick import yardstick

_log = logging.getLogger(__name__)


class TrainingStopped(Exception):
    """The loss or the gradient is not finite; the weights are those of the step before."""


class Trainer:
    """Trains the model of an experiment on a corpus and writes the run.

    ``Trainer(experiment, run, corpus).fit()`` trains from the beginning; with ``resume()`` before ``fit()`` it goes on
    from the newest checkpoint, and ends with the same weights, bit for bit, as if it had never stopped.

    Args:
        experiment: what is trained.
        run: the directory to write to; None writes nothing.
        corpus: what ``experiment.corpus.load()`` gave, or one of your own.
        on_event: is called with each line of the log.
    """

    def __init__(
        self,
        experiment: Experiment,
        run: Run | None,
        corpus: Corpus,
        *,
        on_event: Callable[[Event], None] | None = None,
    ) -> None:
        training = experiment.training
        if training.threads is not None:
            torch.set_num_threads(training.threads)
        torch.manual_seed(training.seed)
        self.experiment, self.run, self.corpus, self.log = experiment, run, corpus, Log(run, on_event)
        self.device = choose_device(training.device)
        self.model = experiment.build(corpus).to(self.device)
        if training.compile:
            compile_cells(self.model)
        self.optimiser = build_optimiser(self.model, training)
        self.steps_done = 0
        self.memory: Memory = None
        self.best: dict[str, Any] | None = None
        """The best validation of the stage: its step and nats."""
        self.validated = Validated()
        """What the validations have done to the learning rate."""
        self._enter_stage()

    def resume(self) -> int:
        """Go back to the newest good checkpoint of the run, or to the beginning if there is none; returns its step.

        Raises:
            CheckpointError: every checkpoint is damaged, or they are of another model.
        """
        if self.run is None:
            raise ValueError("Trainer(run=None).resume(): there is no run to go on with; give Run.open(folder).")
        found = self.run.newest()
        if found is not None:
            self.memory = restore(found, self.model, self.optimiser, batch_size=self.experiment.training.batch_size)
            self.steps_done, self.best = found.step, found.state["best"]
            self.validated = Validated.stored(found.state.get("validated"))
            self._enter_stage()
            # These are damaged, and the newest are to be those that are written from now on.
            checkpoint.discard_after(self.run.checkpoints, found.step)
        self.log.go_on(found.state["seconds"] if found is not None else 0.0)
        metrics.cut(self.run.metrics, -1 if found is None else found.step)
        _log.info("%s goes on after step %d.", self.run.path, self.steps_done)
        return self.steps_done

    def fit(self) -> None:
        """Train to the end of the last stage.

        Raises:
            TrainingStopped: the loss or the gradient is not finite; names the step.
        """
        training, remaining = self.experiment.training, self.experiment.total_steps - self.steps_done
        if training.tensorboard:
            self.log.open_board(step=self.steps_done)
        if self.steps_done == 0:
            self._begin()
        for segment in itertools.islice(self._segments(), remaining):
            began = time.perf_counter()
            step = self.step(segment)
            self.log.count(step, time.perf_counter() - began)
            self._after(step)
        if training.measure_memory:
            rows = self.memory_comparison(training.memory_depths)
            self.log.write("memory", step=self.steps_done, rows=rows)
        self.log.write("done", step=self.steps_done, seconds=self.log.seconds)

    def step(self, segment: Segment) -> Step:
        """One update of the weights on the next segment; the memory of the streams goes along.

        Raises:
            TrainingStopped: the loss or the gradient is not finite; weights and optimiser are untouched.
        """
        training, model = self.experiment.training, self.model
        rate = set_learning_rate(self.optimiser, self.experiment, self.steps_done + 1, self.validated)
        segment = to(segment, self.device)
        model.train()
        with self.stage.drawn_budget(model.layer):
            output = model(segment.tokens, segment.targets, None if segment.fresh else self.memory, skip=segment.skip)
        loss, penalty = output.nats.detach().mean(), self.stage.drawn_penalty(output)
        (loss_of(output) if penalty is None else loss_of(output) + self.stage.penalty * penalty).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), math.inf if training.clip is None else training.clip)
        if not bool(torch.isfinite(loss) & torch.isfinite(norm)):
            self._stop(loss=float(loss), gradient_norm=float(norm))
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.memory = owned(output.memory)
        self.steps_done += 1
        return Step(
            loss=loss,
            extra=None if output.extra is None else output.extra.detach(),
            penalty=None if penalty is None else penalty.detach(),
            gradient_norm=norm.detach(),
            learning_rate=rate,
            tokens=segment.scored,
            solution=output.solution,
        )

    def validate(self) -> Evaluation:
        """The loss on the validation stream with the stage's solver and stop, logged; the best one is noted.

        It may divide the learning rate, or begin the averaging; once weights are averaged, the averages are scored.
        """
        training, stage = self.experiment.training, self.stage
        whole = {**training.evaluation, "max_segments": training.valid_segments}
        with self.averaged():
            found = evaluate(self.model, self.corpus.valid, **whole)
            nats, step = found.nats_per_token, self.steps_done
            best = math.isfinite(nats) and (self.best is None or nats < self.best["nats"])
            if best:
                self.best = {"step": step, "nats": nats, "stage": stage.name}
            self.log.valid(found, step=step, stage=stage.name, best=best, setting=whole)
            if training.spectral_radius and isinstance(self.model.layer, Equilibrium):
                rows = {"batch_size": whole["batch_size"], "segment_length": whole["segment_length"]}
                radius = jacobian_radius(self.model, self.corpus.valid, **rows, iterations=training.spectral_radius)
                fields = {"stage": stage.name, "mean": float(radius.mean()), "max": float(radius.max())}
                self.log.write("spectral_radius", step=step, **fields)
        self.validated = note_validation(self.optimiser, self.validated, self.experiment, nats)
        return found

    def averaged(self) -> contextlib.AbstractContextManager[bool]:
        """The model with its averaged weights for a while, if there are any; says whether there are."""
        return averaged(self.optimiser)

    def memory_comparison(self, depths: Sequence[int] = (8, 16, 32, 64)) -> list[Event]:
        """Peak bytes of a training step on the next batch, beside those of the same cell unrolled; changes nothing."""
        segment = to(next(iter(self._segments())), self.device)
        return memory_comparison(self.model, segment, None if segment.fresh else self.memory, depths)

    def _begin(self) -> None:
        self.log.start_of(self.model, self.corpus)
        if self.experiment.training.yardstick and self.corpus.unit == "character":
            self.log.write("yardstick", step=0, rows=yardstick(self.corpus))
        self.log.write("stage", step=0, stage=self.stage.name, **{"from": None})

    def _after(self, step: Step) -> None:
        """Log, validation, change of stage and checkpoint, in the order in which a resumed run would have them."""
        training, done, stage = self.experiment.training, self.steps_done, self.stage
        changes = self.experiment.stage_at(done) != self._stage_index
        ends = changes or done == self.experiment.total_steps
        if ends or done == 1 or done % training.log_every == 0:
            self.log.step(step, number=done, stage=stage.name)
        best_before = self.best
        if ends or done % training.valid_every == 0:
            self.validate()
        if changes:
            self._enter_stage()
            self.log.write("stage", step=done, stage=self.stage.name, **{"from": stage.name})
            if self.stage.solves != stage.solves:
                self.best = None  # what solves in another way prepares for this stage, and is not compared with it
                self.validated = leave_behind(self.optimiser, self.validated)
                self.validate()
        if ends or self.best is not best_before or done % training.checkpoint_every == 0:
            self._checkpoint()

    def _enter_stage(self) -> None:
        self._stage_index = self.experiment.stage_at(self.steps_done)
        self.stage = stage = self.experiment.stages[self._stage_index]
        stage.apply_to(self.model.layer)

    def _segments(self) -> Segments:
        training = self.experiment.training
        return Segments(
            self.corpus.train,
            batch_size=training.batch_size,
            length=training.segment_length,
            overlap=training.overlap,
            position=self.steps_done,  # one segment a step
        )

    def _checkpoint(self) -> None:
        if self.run is None:
            return
        state = {"stage": self.stage.name, "position": self.steps_done, "best": self.best, "seconds": self.log.seconds}
        state["validated"] = dataclasses.asdict(self.validated)
        kept = capture(self.model, self.optimiser, self.memory, step=self.steps_done, state=state)
        checkpoint.force(self.run.metrics)
        checkpoint.save(self.run.checkpoints, kept)
        best = None if self.best is None else self.best["step"]
        checkpoint.prune(self.run.checkpoints, newest=self.experiment.training.keep, best=best)

    def _stop(self, *, loss: float, gradient_norm: float) -> None:
        number, fault = self.steps_done + 1, "gradient" if math.isfinite(loss) else "loss"
        self.optimiser.zero_grad()
        self.log.write("stopped", step=number, stage=self.stage.name, loss=loss, gradient_norm=gradient_norm)
        kept = checkpoint.all_in(self.run.checkpoints) if self.run is not None else []
        hint = f"the last checkpoint is {kept[-1]}" if kept else "there is no checkpoint yet"
        raise TrainingStopped(
            f"Step {number} (stage {self.stage.name!r}): the {fault} is not finite, and the weights were left as they "
            f"were; start anew with a lower --training.learning-rate than {self.experiment.training.learning_rate:g}, "
            f"a smaller --training.clip or a Jacobian penalty; {hint}."
        )
