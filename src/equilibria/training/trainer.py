"""Trainer: an experiment's stages, step by step, with log, validation and checkpoints.

Letters: B batch, T time, D width.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from equilibria.core.solve import Solution
from equilibria.corpora import Corpus, Segment, Segments
from equilibria.errors import EquilibriaError
from equilibria.layers.sequence import Memory
from equilibria.training import checkpoint, metrics
from equilibria.training.checkpoint import Checkpoint, CheckpointError
from equilibria.training.comparison import memory_comparison
from equilibria.training.decay import Validated
from equilibria.training.device import choose_device, compile_cells, to
from equilibria.training.evaluation import Evaluation, evaluate, jacobian_radius
from equilibria.training.experiment import Experiment
from equilibria.training.files import force
from equilibria.training.log import Log
from equilibria.training.metrics import Event
from equilibria.training.optimiser import averaged, build_optimiser, leave_behind, note_validation, set_learning_rate
from equilibria.training.passes import Passes
from equilibria.training.policy import ConvergencePolicy
from equilibria.training.ranks import ALONE, Ranks, let_go, whole
from equilibria.training.run import Run, plain_values
from equilibria.training.snapshot import capture, restore, save_together
from equilibria.training.step import Step
from equilibria.training.text import Language
from equilibria.training.yardstick import yardstick

_log = logging.getLogger(__name__)


class TrainingStopped(EquilibriaError):
    """The loss or the gradient is not finite, or too many solves fail; the weights are those of the step before."""


class NotFinite(TrainingStopped):
    """The loss or the gradient is not finite."""

    loss = gradient_norm = math.nan


class TrainingInterrupted(EquilibriaError):
    """The training was asked to leave, and has written a checkpoint."""


class Trainer:
    """Trains the model of an experiment on a corpus and writes the run.

    ``Trainer(experiment, run, corpus).fit()`` trains from the beginning; with ``resume()`` before ``fit()`` it goes on
    from the newest checkpoint, and ends with the same weights, bit for bit, as if it had never stopped.

    Args:
        experiment: what is trained.
        run: the directory to write to; None writes nothing.
        corpus: what ``experiment.corpus.load()`` gave, or one of your own.
        on_event: is called with each line of the log.
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
        training = experiment.training
        self.language = Language.of(corpus)
        ranks.agree({**plain_values(experiment), **{f"text of {k}": v for k, v in self.language.sums.items()}})
        self.ranks, self.rows = ranks, ranks.share_of(training.batch_size, name="batch_size")
        if self.rows % training.accumulate:
            raise ValueError(
                f"Training(batch_size={training.batch_size}, accumulate={training.accumulate}): each of {ranks.size} "
                f"processes has {self.rows} rows, which are divided evenly; give an accumulate that divides them."
            )
        if training.threads is not None:
            torch.set_num_threads(training.threads)
        torch.manual_seed(training.seed)
        self.experiment, self.run, self.corpus = experiment, run, corpus
        self.log = Log(run, on_event, ranks)
        self.device = choose_device(training.device)
        self.model = experiment.build(corpus).to(self.device)
        if training.compile:
            compile_cells(self.model)
        replica = ranks.spread(self.model, half=training.precision == "bfloat16")
        self.passes = Passes(model=self.model, replica=replica, ranks=ranks, training=training)
        self.optimiser = build_optimiser(self.model, training)
        self.steps_done = 0
        self.policy = ConvergencePolicy(training, ranks)
        self._asked_to_leave = False
        self.leaving = False
        """Set it, at any time, to have a checkpoint written after the step and ``TrainingInterrupted`` raised."""
        self.rollbacks = 0
        """How often the run went back to a checkpoint; each time halves the learning rate."""
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
        self._check_text(self.run)
        found = self._newest(self.run)
        if found is not None:
            self._go_back_to(found)
            self.rollbacks = found.state.get("rollbacks", 0)
        self.ranks.wait()
        if self.ranks.first:
            # These are damaged, and the newest are to be those that are written from now on.
            checkpoint.discard_after(self.run.checkpoints, -1 if found is None else found.step)
            metrics.cut(self.run.metrics, -1 if found is None else found.step)
        self.log.go_on(found.state["seconds"] if found is not None else 0.0)
        _log.info("%s goes on after step %d.", self.run.path, self.steps_done)
        return self.steps_done

    def fit(self) -> None:
        """Train to the end of the last stage.

        A step whose loss or gradient is not finite takes the run back to its newest good checkpoint, with half the
        learning rate, as often as ``Training.rollbacks`` allows.

        Raises:
            TrainingStopped: the loss or the gradient is not finite, or too many solves fail; names the step.
            TrainingInterrupted: ``leaving`` was set; there is a checkpoint of this moment.
        """
        training = self.experiment.training
        if training.tensorboard and self.ranks.first:
            self.log.open_board(step=self.steps_done)
        if self.steps_done == 0:
            self._begin()
        segments = iter(self._segments())
        while self.steps_done < self.experiment.total_steps:
            began = time.perf_counter()
            try:
                step = self.step(next(segments))
            except NotFinite as error:
                self._roll_back(error)
                segments = iter(self._segments())
                continue
            self.log.count(step, time.perf_counter() - began)
            self._after(step)
            if self._asked_to_leave:
                self._leave()
        if training.measure_memory and self.ranks.first and training.parallel != "fsdp":
            rows = self.memory_comparison(training.memory_depths)
            self.log.write("memory", step=self.steps_done, rows=rows)
        self.log.write("done", step=self.steps_done, seconds=self.log.seconds)

    def step(self, segment: Segment) -> Step:
        """One update of the weights on the next segment; the memory of the streams goes along.

        Raises:
            TrainingStopped: the loss or the gradient is not finite; weights and optimiser are untouched.
        """
        training, model = self.experiment.training, self.model
        factor = 0.5**self.rollbacks
        rate = set_learning_rate(self.optimiser, self.experiment, self.steps_done + 1, self.validated, factor=factor)
        segment = to(segment, self.device)
        model.train()
        passed = self.passes.over(segment, self.memory, self.stage, self.policy.method(self.stage))
        norm = whole(nn.utils.clip_grad_norm_(model.parameters(), math.inf if training.clip is None else training.clip))
        loss, asked = self.ranks.mean(torch.stack([passed.loss, passed.loss.new_tensor(float(self.leaving))]))
        if not bool(torch.isfinite(loss) & torch.isfinite(norm)):
            self._not_finite(loss=float(loss), gradient_norm=float(norm))
        if self._converged_enough(passed.solutions):
            self.optimiser.step()
        self.optimiser.zero_grad()
        self._asked_to_leave = bool(asked > 0)
        self.memory = passed.memory
        self.steps_done += 1
        return Step(
            loss=loss,
            extra=passed.extra,
            penalty=passed.penalty,
            gradient_norm=norm.detach(),
            learning_rate=rate,
            tokens=segment.scored * self.ranks.size,
            solutions=passed.solutions,
        )

    def validate(self) -> Evaluation:
        """The loss on the validation stream with the stage's solver and stop, logged; the best one is noted.

        It may divide the learning rate, or begin the averaging; once weights are averaged, the averages are scored.
        """
        training, stage = self.experiment.training, self.stage
        how = {**training.evaluation, "max_segments": training.valid_segments}
        solve = {"method": self.policy.evaluation_method(stage), "warm": stage.warm}
        with self.averaged(), self.passes.arithmetic():
            found = evaluate(self.model, self.corpus.valid, **how, **solve, ranks=self.ranks)
            nats, step = found.nats_per_token, self.steps_done
            best = math.isfinite(nats) and (self.best is None or nats < self.best["nats"])
            if best:
                self.best = {"step": step, "nats": nats, "stage": stage.name}
            self.log.valid(found, step=step, stage=stage.name, best=best, setting=how)
            if training.spectral_radius and stage.method is not None:
                rows = {"batch_size": how["batch_size"], "segment_length": how["segment_length"]}
                choices = {**rows, **solve, "iterations": training.spectral_radius}
                radius = jacobian_radius(self.model, self.corpus.valid, **choices)
                fields = {"stage": stage.name, "mean": float(radius.mean()), "max": float(radius.max())}
                self.log.write("spectral_radius", step=step, **fields)
            let_go(self.model)
        self.validated = note_validation(self.optimiser, self.validated, self.experiment, nats)
        return found

    def averaged(self) -> contextlib.AbstractContextManager[bool]:
        """The model with its averaged weights for a while, if there are any; says whether there are."""
        return averaged(self.optimiser)

    def memory_comparison(self, depths: Sequence[int] = (8, 16, 32, 64)) -> list[Event]:
        """Peak bytes of a training step on the next batch, beside those of the same cell unrolled; changes nothing."""
        segment = to(next(iter(self._segments())), self.device)
        memory, method = None if segment.fresh else self.memory, self.policy.method(self.stage)
        return memory_comparison(self.model, segment, memory, depths, method=method, warm=self.stage.warm)

    def _check_text(self, run: Run) -> None:
        """Raise a ValueError if the corpus is not the text with which the run began."""
        known = run.language
        if known is None:  # a run of a version that kept none
            return
        if changed := known.changed(self.corpus, self.language.sums):
            raise ValueError(
                f"The text of {', '.join(changed)} is not the one with which {run.path} began (their SHA-256 differ), "
                "and the run would go on with another text without a word: bring the old one back, or start a new run "
                "with another --out."
            )

    def _begin(self) -> None:
        if self.run is not None and self.ranks.first:
            self.run.keep(self.language)
        self.log.start_of(self.model, self.corpus)
        if self.experiment.training.yardstick and self.corpus.unit == "character" and self.ranks.first:
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
            if (self.stage.method, self.stage.eval_stop) != (stage.method, stage.eval_stop):
                self.best = None  # what solves in another way prepares for this stage, and is not compared with it
                self.validated = leave_behind(self.optimiser, self.validated)
                self.validate()
        if ends or self.best is not best_before or done % training.checkpoint_every == 0:
            self._checkpoint()

    def _enter_stage(self) -> None:
        self._stage_index = self.experiment.stage_at(self.steps_done)
        self.stage = self.experiment.stages[self._stage_index]

    def _segments(self) -> Segments:
        training = self.experiment.training
        return Segments(
            self.corpus.train,
            batch_size=self.rows,
            length=training.segment_length,
            overlap=training.overlap,
            rank=self.ranks.rank,
            world_size=self.ranks.size,
            position=self.steps_done,  # one segment a step
        )

    def _checkpoint(self) -> None:
        if self.run is None:
            return
        state = {"stage": self.stage.name, "position": self.steps_done, "best": self.best, "seconds": self.log.seconds}
        state |= {"validated": dataclasses.asdict(self.validated), "rollbacks": self.rollbacks}
        state["budget_factor"] = self.policy.factor
        kept = capture(self.model, self.optimiser, self.memory, step=self.steps_done, state=state, ranks=self.ranks)
        if self.ranks.first:
            force(self.run.metrics)
        save_together(self.run.checkpoints, kept, self.ranks)
        if self.ranks.first:
            best = None if self.best is None else self.best["step"]
            checkpoint.prune(self.run.checkpoints, newest=self.experiment.training.keep, best=best)
            self.run.settle()
        self.ranks.wait()  # the run may have taken its place

    def _newest(self, run: Run) -> Checkpoint | None:
        """The newest good checkpoint, the same on all ranks."""
        found, fault = None, None
        if self.ranks.first:
            try:
                found = run.newest()
            except CheckpointError as error:
                fault = error
        step, fault = self.ranks.of_first((None if found is None else found.step, fault))
        if fault is not None:
            raise fault
        if step is None or self.ranks.first:
            return found
        return checkpoint.load(run.checkpoints / checkpoint.name_of(step), verified=True)

    def _go_back_to(self, found: Checkpoint) -> None:
        self.memory = restore(found, self.model, self.optimiser, rows=self.rows, ranks=self.ranks)
        self.steps_done, self.best = found.step, found.state["best"]
        self.validated = Validated.stored(found.state.get("validated"))
        self.policy.factor = found.state.get("budget_factor", 1)
        self._enter_stage()

    def _roll_back(self, error: NotFinite) -> None:
        """Go back to the newest checkpoint, with half the learning rate; the error itself if that is not to be."""
        failed = {"loss": error.loss, "gradient_norm": error.gradient_norm}
        found = None
        if self.run is not None and self.rollbacks < self.experiment.training.rollbacks:
            found = self._newest(self.run)
        if found is None:
            self.log.write("stopped", step=self.steps_done + 1, stage=self.stage.name, **failed)
            raise error
        number = self.steps_done + 1
        self.rollbacks += 1
        self._go_back_to(found)
        if self.run is not None and self.ranks.first:
            metrics.cut(self.run.metrics, found.step)
        self.log.write(
            "rolled_back",
            step=found.step,
            stage=self.stage.name,
            failed_step=number,
            factor=0.5**self.rollbacks,
            **failed,
        )
        _log.warning(
            "Step %d was not finite: going on from the checkpoint of step %d with %g times the learning rate.",
            *(number, found.step, 0.5**self.rollbacks),
        )

    def _leave(self) -> None:
        """Write a checkpoint, unless this step has one, and go."""
        written = self.run is not None and (self.run.checkpoints / checkpoint.name_of(self.steps_done)).is_dir()
        if not self.ranks.of_first(written):
            self._checkpoint()
        raise TrainingInterrupted(f"The training was asked to leave, and did so after step {self.steps_done:,}.")

    def _converged_enough(self, solutions: tuple[Solution, ...]) -> bool:
        """Whether the step may change the weights; acts as ``Training.unconverged`` says if too many solves failed.

        Raises:
            TrainingStopped: it says "stop".
        """
        share, policy, number = (
            self.policy.share_of_failures(solutions, self.stage),
            self.experiment.training.unconverged,
            self.steps_done + 1,
        )
        if not self.policy.too_many(share):
            return True
        self.log.write("unconverged", step=number, stage=self.stage.name, share=share, policy=policy)
        if policy == "raise budget":
            self.policy.raise_budget()
        if policy == "stop":
            self.optimiser.zero_grad()
            self.log.write("stopped", step=number, stage=self.stage.name)
            raise TrainingStopped(
                f"Step {number} (stage {self.stage.name!r}): {share:.0%} of the samples did not converge, and "
                f"{self.experiment.training.tolerated:.0%} are tolerated; raise the stage's budget (stop.max_evals) or "
                "its tolerance, add a Jacobian penalty, or choose another --training.unconverged; "
                f"{self._last_checkpoint()}."
            )
        return policy != "skip step"

    def _not_finite(self, *, loss: float, gradient_norm: float) -> None:
        number, fault = self.steps_done + 1, "gradient" if math.isfinite(loss) else "loss"
        self.optimiser.zero_grad()
        error = NotFinite(
            f"Step {number} (stage {self.stage.name!r}): the {fault} is not finite, and the weights were left as they "
            f"were; start anew with a lower --training.learning-rate than {self.experiment.training.learning_rate:g}, "
            f"a smaller --training.clip or a Jacobian penalty; {self._last_checkpoint()}."
        )
        error.loss, error.gradient_norm = loss, gradient_norm
        raise error

    def _last_checkpoint(self) -> str:
        kept = checkpoint.all_in(self.run.checkpoints) if self.run is not None else []
        return f"the last checkpoint is {kept[-1]}" if kept else "there is no checkpoint yet"
