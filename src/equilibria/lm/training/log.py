"""Log: writes the events of a training to metrics.jsonl and a tracker, and calls ``on_event``."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from equilibria.lm.corpora import Corpus
from equilibria.lm.device import device_of
from equilibria.lm.evaluation import mean_summary
from equilibria.lm.model import LanguageModel
from equilibria.lm.ranks import ALONE, Ranks
from equilibria.lm.runs.events import Event
from equilibria.lm.runs.run import Run
from equilibria.lm.score import Evaluation
from equilibria.lm.training.step import Step
from equilibria.lm.training.tracker import Tracker, TrackerError, numbers_of, tracker_of

_log = logging.getLogger(__name__)


class Log:
    """The log of one training; it also measures time and speed.

    Args:
        run: the run directory; None writes no file.
        on_event: a function that receives each event after it was written.
        ranks: the processes; all log the same events, and the first one writes them.
    """

    def __init__(self, run: Run | None, on_event: Callable[[Event], None] | None, ranks: Ranks = ALONE) -> None:
        self._run, self._on_event = (run, on_event) if ranks.first else (None, None)
        self._ranks = ranks
        self._tracker: Tracker | None = None
        self._seconds, self._since = 0.0, time.perf_counter()
        self._tokens, self._busy = 0, 0.0

    @property
    def seconds(self) -> float:
        """Duration of the run in seconds, including the time before it was resumed."""
        return self._seconds + time.perf_counter() - self._since

    def resume(self, seconds: float) -> None:
        """Count the time from now on, after ``seconds`` of earlier training."""
        self._seconds, self._since = seconds, time.perf_counter()

    def open_tracker(self, name: str, config: Mapping[str, Any], *, step: int) -> None:
        """Also send the events after ``step`` to a tracker, with the experiment as plain values.

        Raises:
            ModuleNotFoundError: its package is not installed.
            TrackerError: it cannot begin; all ranks raise.
        """
        fault = None
        if self._run is not None:
            try:
                self._tracker = tracker_of(name, self._run, config, step=step)
            except (ModuleNotFoundError, TrackerError) as error:
                fault = error
        fault = self._ranks.of_first(fault)
        if fault is not None:
            raise fault

    def close(self) -> None:
        """Close the tracker, if there is one."""
        tracker, self._tracker = self._tracker, None
        if tracker is not None:
            try:
                tracker.close()
            except Exception as error:
                _log.warning("The tracker did not close (%s: %s).", type(error).__name__, error)

    def _track(self, event: Event) -> None:
        """Send the numbers of an event to the tracker. One that fails is closed: the training must not end with it."""
        if self._tracker is None:
            return
        try:
            self._tracker.log(event["step"], numbers_of(event))
        except Exception as error:
            text = "The tracker failed at step %d (%s: %s) and gets no more numbers; metrics.jsonl has all of them."
            _log.warning(text, event["step"], type(error).__name__, error)
            tracker, self._tracker = self._tracker, None
            with contextlib.suppress(Exception):
                tracker.close()

    def write(self, event: str, *, step: int, **fields: Any) -> None:
        """Write one event to all outputs."""
        line: Event = {"event": event, "step": step, **fields}
        if self._run is not None:
            self._run.append(line)
        self._track(line)
        if self._on_event is not None:
            self._on_event(line)

    def start_of(self, model: LanguageModel, corpus: Corpus) -> None:
        """Write the start event: sizes of model and corpus, device, and version of PyTorch."""
        splits = {split: getattr(corpus, split) for split in ("train", "valid", "test")}
        sizes: dict[str, Any] = {split: len(stream) for split, stream in splits.items()}
        if (text := corpus.spelling) is not None:
            sizes["bytes"] = {split: text.text_bytes(part.ids) for split, part in splits.items()}
        self.write(
            "start",
            step=0,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            ranks=self._ranks.size,
            corpus={"name": corpus.name, "unit": corpus.unit, "vocabulary": len(corpus.vocabulary), **sizes},
            device=str(device_of(model)),
            threads=torch.get_num_threads(),
            torch=torch.__version__,
        )

    def count(self, step: Step, seconds: float) -> None:
        """Count the tokens and the time of one step, for the speed in the next step event."""
        self._tokens, self._busy = self._tokens + step.tokens, self._busy + seconds

    def step(self, step: Step, *, number: int, stage: str) -> None:
        """Write a training step, which waits for the device.

        ``step_seconds`` is the time of the steps since the last step event, without what lies between them, and
        ``tokens_per_second`` their tokens divided by it.
        """
        loss = float(step.loss)
        forward, backward, added = self._ranks.means(
            mean_summary(step.solutions), mean_summary(step.adjoints), _floats(extra=step.extra, penalty=step.penalty)
        )
        assert added is not None
        evals = [solution.evals for solution in step.solutions]
        tokens, busy = self._tokens, self._busy
        self._tokens, self._busy = 0, 0.0
        self.write(
            "step",
            step=number,
            stage=stage,
            loss=loss,
            bits=loss / math.log(2),
            learning_rate=step.learning_rate,
            gradient_norm=float(step.gradient_norm),
            tokens=step.tokens,
            seconds=self.seconds,
            step_seconds=busy,
            tokens_per_second=tokens / busy if busy else None,
            forward=forward,
            backward=backward,
            rank_evals=None if self._ranks.alone else self._ranks.of_all(evals),
            extra=added.get("extra"),
            penalty=added.get("penalty"),
        )

    def radius(self, radius: Tensor, *, step: int, stage: str) -> None:
        """Write the spectral radius of the Jacobian, its mean and maximum over the streams."""
        fields = {"mean": float(radius.mean()), "max": float(radius.max())}
        self.write("spectral_radius", step=step, stage=stage, **fields)

    def valid(self, evaluation: Evaluation, *, step: int, stage: str, best: bool, setting: dict[str, Any]) -> None:
        """Write a validation with its settings, both as requested and as applied."""
        self.write(
            "valid",
            step=step,
            stage=stage,
            nats=evaluation.nll_per_token,
            bits=evaluation.bits,
            bits_per_byte=evaluation.bits_per_byte,
            perplexity=evaluation.perplexity,
            accuracy=evaluation.accuracy,
            tokens=evaluation.tokens,
            bytes=evaluation.bytes,
            forward=evaluation.forward,
            seconds=self.seconds,
            best=best,
            setting={**setting, **dataclasses.asdict(evaluation.setting)},
        )


def _floats(**tensors: Tensor | None) -> dict[str, float]:
    return {name: float(tensor) for name, tensor in tensors.items() if tensor is not None}
