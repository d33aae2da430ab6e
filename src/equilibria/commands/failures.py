"""Counts the solves of a generated text that failed, for one note at its end instead of a warning per place."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from equilibria import ConvergenceWarning
from equilibria.layers.equilibrium import LayerOutput
from equilibria.lm.runs.trained import Trained


class Failures:
    """Solves, and those of them that ended without meeting their tolerance."""

    def __init__(self, loaded: Trained) -> None:
        self._solves, self._failed = 0, 0
        method = loaded.stage.evaluation_method
        self._has_tolerance = method is not None and method.stop.has_tolerance

    def count(self, layer: Any, given: Any, output: LayerOutput) -> None:
        """The forward hook of the layer."""
        if output.solution is not None and self._has_tolerance:
            self._solves += output.solution.converged.numel()
            self._failed += int((~output.solution.converged).sum())

    def notes(self) -> list[str]:
        """One sentence, if there were any."""
        if not self._failed:
            return []
        return [
            f"{self._failed:,} of {self._solves:,} solves did not converge, so the text may depend on its company; "
            "`equilibria evaluate` tells how the model does on its own corpus."
        ]


@contextmanager
def failures_of(loaded: Trained) -> Iterator[Failures]:
    """Count the failed solves of the model, and give no warning of them, until the block ends."""
    found = Failures(loaded)
    hook = loaded.model.layer.register_forward_hook(found.count)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        try:
            yield found
        finally:
            hook.remove()
