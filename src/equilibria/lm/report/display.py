"""The display of `train` while it runs: a live panel on a terminal, one line per log entry elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.status import Status
from rich.table import Table
from rich.text import Text

from equilibria.lm.experiments.experiment import Experiment
from equilibria.lm.report import formats
from equilibria.lm.report.record import Event
from equilibria.lm.report.summary import Row
from equilibria.lm.report.visible import visible


class Display:
    """Takes the events of a training and shows them.

    Args:
        console: where to.
        experiment: what is trained.
        unit: what one token is: "character", "word" or "symbol".
        quiet: show nothing.
    """

    def __init__(self, console: Console, experiment: Experiment, *, unit: str, quiet: bool = False) -> None:
        self._console, self._total, self._unit, self._quiet = console, experiment.total_steps, unit, quiet
        self._stages = [stage.name for stage in experiment.stages]
        self._fixed = {
            stage.name for stage in experiment.stages if not (stage.method and stage.method.stop.has_tolerance)
        }
        self._live: Live | None = None
        self._latest: dict[str, Event] = {}
        self._first: Event | None = None
        self._conditions = ""

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Within it the panel is on the terminal; afterwards its last state stays there."""
        if self._quiet or not self._console.is_terminal:
            yield
            return
        with Live(self._panel(), console=self._console, refresh_per_second=8, transient=False) as self._live:
            yield

    def resumed(self, step: int) -> None:
        """Say that the training continues after ``step``, that it is complete, or that there is no checkpoint yet."""
        if self._quiet:
            return
        place = f"continuing after step {step:,} of {self._total:,}" if step else "no checkpoint here yet: starting"
        if step >= self._total:
            place = f"all {self._total:,} steps are done: nothing is left to train"
        self._console.print(place, highlight=False)

    def show(self, event: Event) -> None:
        """Show one event."""
        self._latest[event["event"]] = event
        if event["event"] == "step" and self._first is None:
            self._first = event
        if self._quiet:
            return
        for line in (self._setting(event), self._line(event)):
            if line is not None:
                self._console.print(literal(line, "dim"), soft_wrap=self._live is None)
        if self._live is not None:
            self._live.update(self._panel())

    def _setting(self, event: Event) -> str | None:
        """How validation is measured, said once: where it has changed, as where a stage has another budget."""
        conditions = formats.conditions(event) if event["event"] == "valid" else ""
        if not conditions or conditions == self._conditions:
            return None
        self._conditions = conditions
        return f"step {event['step']:,}  validation: {conditions}"

    def _line(self, event: Event) -> str | None:
        """The event as a line, if it deserves one: on a terminal the steps are in the panel."""
        kind, number = event["event"], f"step {event['step']:,}"
        if kind == "step" and self._live is None:
            return self._step_line(event)
        if kind == "stage":
            return f"{number}  stage {event['stage']} begins"
        if kind == "valid":
            cost = self._solve(event["stage"], event.get("forward"))
            solves = f", {cost[0].replace('evaluations', 'evals')}, {cost[2]}" if cost else ""
            right = "" if event.get("accuracy") is None else f", {formats.percent(event['accuracy'])} right"
            best = ", best of its stage" if event.get("best") else ""
            return f"{number}  valid {formats.full_score(event, self._unit)}{right}{solves}{best}"
        if kind == "rolled_back":
            return (
                f"{number}  step {event['failed_step']:,} was not finite: continuing from this checkpoint with "
                f"{event['factor']:g} times the learning rate"
            )
        if kind == "unconverged":
            return f"{number}  {formats.percent(event['share'])} of the samples did not converge: {event['policy']}"
        return None

    def _step_line(self, event: Event) -> str:
        parts = [f"step {event['step']:,}/{self._total:,} {event['stage']}"]
        parts += [f"loss {event['loss']:.4f} nats", f"{formats.score(event, self._unit)}", _speed(event)]
        for name in ("forward", "backward"):
            if event.get(name):
                parts += [name, *self._solve(event["stage"], event[name])]
        return "  ".join(part for part in [*parts, formats.clock(event["seconds"])] if part)

    def _solve(self, stage: str, solve: Event | None) -> list[str]:
        """Cost, exactness and success of the solves, in words."""
        if not solve:
            return []
        success = "fixed depth" if stage in self._fixed else f"{formats.percent(solve['converged'])} converged"
        return [f"{solve['evals']:.0f} evaluations", f"residual {formats.residual(solve['residual'])}", success]

    def _panel(self) -> Group:
        step = self._latest.get("step", {})
        done = step.get("step", 0)
        bar = ProgressBar(total=self._total, completed=done, width=max(20, min(self._console.width - 44, 50)))
        head = Table.grid(padding=(0, 1))
        head.add_row(literal(self._stage(step), "bold"), bar, f"{done:,}/{self._total:,}", self._times(step))
        return Group(head, self._figures(step))

    def _stage(self, step: Event) -> str:
        name = step.get("stage") or self._latest.get("stage", {}).get("stage") or "starting"
        return f"{name} {self._stages.index(name) + 1}/{len(self._stages)}" if name in self._stages else name

    def _times(self, step: Event) -> str:
        first, seconds = self._first, step.get("seconds", 0.0)
        if first is None or step["step"] <= first["step"]:
            return formats.clock(seconds)
        # The speed of this session only: a resumed run may be on a faster machine than before.
        pace = (seconds - first["seconds"]) / (step["step"] - first["step"])
        return f"{formats.clock(seconds)}, {formats.clock(pace * (self._total - step['step']))} left"

    def _figures(self, step: Event) -> Table:
        table = Table.grid(padding=(0, 3))
        if step:
            score = literal(formats.score(step, self._unit))
            table.add_row("training", score, f"{step['loss']:.3f} nats", _speed(step))
        valid = self._latest.get("valid")
        if valid:
            score = literal(formats.full_score(valid, self._unit))
            table.add_row("validation", score, f"{valid['nats']:.3f} nats", _at(valid))
        for name in ("forward", "backward"):
            if step.get(name):
                table.add_row(name, *self._solve(step["stage"], step[name]))
        return table


def _at(event: Event) -> str:
    return f"at step {event['step']:,}"


def _speed(event: Event) -> str:
    speed = event.get("tokens_per_second")
    return f"{formats.count(speed)} tokens/s" if speed else ""


def literal(text: str, style: str = "") -> Text:
    """``text`` as it is, for rich: [red] is no markup in it, and control characters are visible."""
    return Text(visible(text), style=style)


def waiting(what: str) -> Status:
    """While it is entered, stderr shows what happens, if it is a terminal; stdout is left to the results."""
    return Console(stderr=True, highlight=False).status(literal(what))


def summary_table(rows: list[Row], title: str) -> Table:
    """The summary as a table for the terminal."""
    table = Table(title=literal(title), title_justify="left", title_style="bold", show_header=False, padding=(0, 1))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for row in rows:
        table.add_row(literal(row.label), literal(row.value), literal(row.beside))
    return table
