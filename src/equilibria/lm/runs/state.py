"""Validation of the plain values in a checkpoint's state.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NOTES = {
    "stage": (str,),
    "position": (int,),
    "seconds": (int, float),
    "rollbacks": (int,),
    "budget_factor": (int, float),
    "best": (dict, type(None)),
    "validated": (dict, type(None)),
}
"""The values that a training writes, with their types."""


def check_state(state: Mapping[str, Any]) -> None:
    """Raise a ValueError if a value has a type that a training does not write."""
    for name, kinds in NOTES.items():
        if name in state and (not isinstance(state[name], kinds) or isinstance(state[name], bool)):
            raise ValueError(f"{name} is {state[name]!r:.40}")
    best = state.get("best")
    if best is not None:
        step, nll = best.get("step"), best.get("nats")
        if type(step) is not int or not 0 <= step <= state["step"] or not isinstance(nll, int | float | None):
            raise ValueError(f"best is {best!r:.80}")
    validated = state.get("validated")
    if validated is not None and not _are_validations(validated):
        raise ValueError(f"validated is {validated!r:.80}")


def _are_validations(value: Mapping[str, Any]) -> bool:
    losses, divisions = value.get("losses"), value.get("divisions")
    numbers = isinstance(losses, list) and all(type(loss) in (int, float) for loss in losses)
    return numbers and type(divisions) is int and divisions >= 0


def check_kind(value: Any, kind: type, what: str) -> Any:
    """The value itself; a ValueError with ``what`` in its message if the value is not a ``kind``."""
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{value!r:.40} where {what} should be")
    return value
