"""Trainer: trains the stages of an experiment step by step, with log, validations and checkpoints."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from equilibria.errors import EquilibriaError
from equilibria.layers.sequence import Memory
from equilibria.lm.corpora import Corpus, Language, Segment, Segments
from equilibria.lm.device import choose_device, to
from equilibria.lm.experiments import Experiment
from equilibria.lm.experiments.serialise import to_json
from equilibria.lm.ranks import ALONE, Ranks
from equilibria.lm.runs.checkpoint import Checkpoint
from equilibria.lm.runs.events import Event
from equilibria.lm.runs.run import Run, plain_values
from equilibria.lm.score import Evaluation
from equilibria.lm.training.compilation import compile_cells
from equilibria.lm.training.keeper import Keeper
from equilibria.lm.training.log import Log
from equilibria.lm.training.measure import memory_comparison, ngram_baseline
from equilibria.lm.training.optimiser import build_optimiser
from equilibria.lm.training.policy import ConvergencePolicy, NotFinite
from equilibria.lm.training.snapshot import capture, restore
from equilibria.lm.training.step import Accumulation, Step, set_learning_rate
from equilibria.lm.training.validation import Validations
from equilibria.torch_private import denormals_are_zero

_log = logging.getLogger(__name__)


class TrainingInterrupted(EquilibriaError):
    """The training was interrupted on request, after writing a checkpoint."""


class Trainer:
    """Trains the model of an experiment on a corpus and writes the run.

    ``Trainer(experiment, run, corpus).fit()`` trains from the beginning; with ``resume()`` before ``fit()`` it
    continues from the newest checkpoint, and ends with the same weights, bit for bit, as if it had never stopped.

    Args:
        experiment: the experiment to train.
        run: the run directory; None writes nothing.
        corpus: the result of ``experiment.corpus.load()``, or a corpus of your own.
        on_event: a function that receives each event of the log.
        ranks: the processes that train together; each has a ``Trainer``, and the first one writes.
    """

    def __init__(
        self,
        experiment: Experiment,
        run: Run | None,
        corpus: Corpus,
        *,
        on_event: Callable[[Event], None] | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        training, devices = experiment.training, experiment.training.devices
        self.language = Language.of(corpus)
        texts = {f"text of {k}": v for k, v in self.language.sums.items()}
        ranks.agree({**plain_values(experiment), **texts, "vocabulary": corpus.vocabulary.digest})
        self.ranks, self.streams = ranks, ranks.share_of(training.batches.batch_size, parts=devices.accumulate)
        if devices.threads is not None:
            torch.set_num_threads(devices.threads)
        torch.manual_seed(training.seed)
        self.experiment, self.run, self.corpus = experiment, run, corpus
        self.log = Log(run, on_event, ranks)
        self.device = choose_device(devices.device)
        self.model = experiment.build(corpus, counted=True).to(self.device)
        if devices.compile:
            compile_cells(self.model)
        replica = ranks.spread(self.model, bfloat16=training.optimisation.precision == "bfloat16")
        self.accumulation = Accumulation(
            model=self.model, replica=replica, ranks=ranks, training=training, device=self.device
        )
        self.optimiser = build_optimiser(self.model, training.optimisation)
        self.policy = ConvergencePolicy(training, ranks, self.log)
        self.keeper = Keeper(run, ranks, keep=training.faults.keep)
        self.steps_done = 0
        self.leaving = False
        """Set it to True, at any time, to write a checkpoint after the step and raise ``TrainingInterrupted``."""
        self._asked_to_leave = False  # on any rank
        self.memory: Memory = None
        self.validations = Validations(experiment, corpus, self.optimiser, self.log)
        self._enter_stage()

    def resume(self) -> int:
        """Restore the newest good checkpoint of the run, or the beginning if there is none; returns the step.

        Raises:
            CheckpointError: all checkpoints are damaged, or they are of another model.
            ValueError: there is no run, or it was started with another text.
        """
        if self.run is None:
            raise ValueError("Trainer(run=None).resume(): there is no run to continue; give Run.open(folder).")
        if self.run.language is not None:  # runs of old versions have none
            self.run.language.check_same(self.corpus, self.language, run=str(self.run.path))
        found = self.keeper.newest()
        if found is not None:
            self._go_back_to(found)
            self.policy.rollbacks = found.state.get("rollbacks", 0)
        if self.ranks.first:
            self.run.go_on(self.experiment)  # not before: another text must not leave its settings in the run
        self.ranks.wait()
        step = -1 if found is None else found.step
        self.keeper.discard_after(step)
        self.keeper.cut_log(step)
        self.policy.rollbacks = max(self.policy.rollbacks, self.keeper.rollbacks())  # a checkpoint tells earlier ones
        self.log.resume(0.0 if found is None else found.state.get("seconds", 0.0))
        _log.info("%s continues after step %d.", self.run.path, self.steps_done)
        return self.steps_done

    def fit(self) -> None:
        """Train to the end of the last stage.

        After a step whose loss or gradient is not finite, the run returns to its newest good checkpoint and continues
        with half the learning rate, at most ``Faults.rollbacks`` times.

        Raises:
            TrainingStopped: the loss or the gradient is not finite, or too many solves fail; names the step.
            TrainingInterrupted: ``leaving`` was set; a checkpoint of the last step has been written.
            TrackerError: the tracker could not begin; nothing was trained.
            ValueError: the run has begun before and is not resumed, or is that of another experiment.
        """
        name = self.experiment.training.log.tracker_name
        self.log.open_tracker(name, to_json(self.experiment), step=self.steps_done)
        try:
            self._train()
        finally:
            self.log.close()

    def _train(self) -> None:
        settings = self.experiment.training.log
        if self.steps_done == 0:
            self._begin()
        else:
            self.keeper.cut_log(self.steps_done)  # an end that an earlier call has written is none
        batches = self._batches()
        while self.steps_done < self.experiment.total_steps:
            began = time.perf_counter()
            try:
                step = self.step(next(batches))
            except NotFinite as error:
                self._roll_back(error)
                batches = self._batches()
                continue
            self.log.count(step, time.perf_counter() - began)
            self._after(step)
            if self._asked_to_leave:
                if not self.keeper.has(self.steps_done):
                    self._checkpoint()
                raise TrainingInterrupted(f"The training was interrupted on request after step {self.steps_done:,}.")
        if settings.measure_memory and self.ranks.first and self.ranks.parallel != "fsdp":
            self.log.write("memory", step=self.steps_done, rows=self.memory_comparison(settings.memory_depths))
        self.log.write("done", step=self.steps_done, seconds=self.log.seconds)

    @denormals_are_zero()
    def step(self, segment: Segment) -> Step:
        """Update the weights on ``segment``, carrying the memory of the streams from step to step.

        The segment is on the device of the model.

        Raises:
            TrainingStopped: the loss or the gradient is not finite, or too many solves fail; weights and optimiser are
                unchanged.
        """
        number, stage = self.steps_done + 1, self.stage
        self.model.train()
        effect, factor = self.validations.effect, self.policy.rate_factor
        training, total = self.experiment.training.optimisation, self.experiment.total_steps
        rate = set_learning_rate(self.optimiser, training, number, effect, total=total, factor=factor)
        method = self.policy.method(stage)
        step = self.accumulation.step(segment, self.memory, stage, method=method, learning_rate=rate)
        leaving = self.leaving
        if self.ranks.size > 1:  # they log one loss, and leave after the same step
            loss, share = self.ranks.mean(torch.stack([step.loss, step.loss.new_tensor(float(leaving))]))
            step, leaving = dataclasses.replace(step, loss=loss), bool(share > 0)
        try:
            self.policy.check_finite(step, number=number, stage=stage, last=self.keeper.last)
            if self.policy.accepts(step, number=number, stage=stage, last=self.keeper.last):
                self.optimiser.step()
        finally:
            self.optimiser.zero_grad()
        self._asked_to_leave, self.memory = leaving, step.memory
        self.steps_done = number
        return step

    def validate(self) -> Evaluation:
        """Evaluate on the validation stream with the stage's method, and log it; it may divide the learning rate."""
        method = self.policy.evaluation_method(self.stage)
        return self.validations.score(self.accumulation, step=self.steps_done, stage=self.stage, method=method)

    def memory_comparison(self, depths: Sequence[int] = (8, 16, 32, 64)) -> list[Event]:
        """Peak bytes of a training step on the next batch, solved and unrolled; see ``memory_comparison``."""
        segment = next(self._batches())
        memory, method = None if segment.resets else self.memory, self.policy.method(self.stage)
        return memory_comparison(self.model, segment, memory, depths, method=method, warm=self.stage.warm)

    def _begin(self) -> None:
        self.keeper.begin(self.experiment, self.language)
        self.log.start_of(self.model, self.corpus)
        if self.experiment.training.log.baseline and self.corpus.unit == "character" and self.ranks.first:
            self.log.write("baseline", step=0, rows=ngram_baseline(self.corpus))
        self.log.write("stage", step=0, stage=self.stage.name, **{"from": None})

    def _after(self, step: Step) -> None:
        """Log, validation, change of stage and checkpoint, in an order that a resumed run reproduces."""
        training, done, stage = self.experiment.training, self.steps_done, self.stage
        changes = self.experiment.stage_at(done) != self._stage_index
        ends = changes or done == self.experiment.total_steps
        if ends or done == 1 or done % training.log.log_every == 0:
            self.log.step(step, number=done, stage=stage.name)
        best_before = self.validations.best
        if ends or done % training.validation.valid_every == 0:
            self.validate()
        if changes:
            self._enter_stage()
            self.log.write("stage", step=done, stage=self.stage.name, **{"from": stage.name})
            if not self.stage.solves_like(stage):
                self.validations.restart()
                self.validate()
        if ends or self.validations.best is not best_before or done % training.faults.checkpoint_every == 0:
            self._checkpoint()

    def _enter_stage(self) -> None:
        self._stage_index = self.experiment.stage_at(self.steps_done)
        self.stage = self.experiment.stages[self._stage_index]

    def _segments(self) -> Segments:
        batches, ranks = self.experiment.training.batches, self.ranks
        return Segments(
            self.corpus.train,
            batch_size=self.streams,
            length=batches.segment_length,
            overlap=batches.overlap,
            rank=ranks.rank,
            world_size=ranks.size,
            position=self.steps_done,  # one segment per step
        )

    def _batches(self) -> Iterator[Segment]:
        """The segments from the next step on, on the device of the model."""
        return (to(segment, self.device) for segment in self._segments())

    def _checkpoint(self) -> None:
        if self.run is None:
            return
        state = {"stage": self.stage.name, "position": self.steps_done, "seconds": self.log.seconds}
        state |= {**self.validations.state(), **self.policy.state()}
        kept = capture(self.model, self.optimiser, self.memory, step=self.steps_done, state=state, ranks=self.ranks)
        best = self.validations.best
        self.keeper.write(kept, best=None if best is None else best["step"])

    def _go_back_to(self, found: Checkpoint) -> None:
        depth = self.experiment.stages[self.experiment.stage_at(max(0, found.step - 1))].depth
        self.memory = restore(found, self.model, self.optimiser, streams=self.streams, depth=depth, ranks=self.ranks)
        self.steps_done = found.step
        self.validations.restore(found.state)
        self.policy.factor = found.state.get("budget_factor", 1)
        self._enter_stage()

    def _roll_back(self, error: NotFinite) -> None:
        """Return to the newest checkpoint with half the learning rate; raise the error if that is not possible."""
        found = self.keeper.newest() if self.policy.may_roll_back else None
        if found is None:
            self.policy.note_end(error, stage=self.stage)
            raise error
        self.policy.rollbacks += 1
        self._go_back_to(found)
        self.keeper.cut_log(found.step)
        self.policy.note_rollback(error, step=found.step, stage=self.stage)
