"""Board: the log for TensorBoard."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from equilibria.lm.runs.events import Event


class Board:
    """Writes the numbers of events as TensorBoard scalars, named event/field."""

    def __init__(self, folder: Path, *, step: int) -> None:
        """Write into ``folder``; TensorBoard hides what was written there for steps after ``step``."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError as error:
            message = 'Training(tensorboard=True) needs TensorBoard: pip install "equilibria[tensorboard]"'
            raise ModuleNotFoundError(message, name=error.name) from None
        self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def write(self, event: Event) -> None:
        """Add the numbers of one event."""
        for name, value in _numbers(event):
            self._writer.add_scalar(f"{event['event']}/{name}", value, event["step"])
        self._writer.flush()


def _numbers(event: Event, prefix: str = "") -> Iterable[tuple[str, float]]:
    for name, value in event.items():
        if isinstance(value, dict) and name != "setting":  # settings are not measurements
            yield from _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and name != "step":
            yield prefix + name, float(value)
