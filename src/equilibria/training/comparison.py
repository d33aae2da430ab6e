"""memory_comparison: a training step of the equilibrium beside that of the same cell unrolled.

Letters: B batch, T time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from equilibria.core.stop import Stop
from equilibria.corpora import Segment
from equilibria.fixed_point import Method
from equilibria.gradients.unroll import Unroll
from equilibria.language import LanguageModel, LanguageOutput
from equilibria.language.modes import in_mode
from equilibria.layers.equilibrium import Equilibrium
from equilibria.layers.sequence import Memory
from equilibria.solvers.picard import Picard
from equilibria.training.device import device_of
from equilibria.training.experiment import Stage
from equilibria.training.memory import PeakMemory
from equilibria.training.metrics import Event


def memory_comparison(
    model: LanguageModel,
    segment: Segment,
    memory: Memory,
    depths: Sequence[int] = (8, 16, 32, 64),
    *,
    method: Method | None = None,
    warm: bool = False,
) -> list[Event]:
    """Peak bytes of one training step, forward and backward: solved by ``method``, then unrolled to each depth.

    Weights, gradients, mode and random generators are afterwards what they were. A model without an equilibrium has
    one row.

    Args:
        model: a language model.
        segment: a batch, on the model's device.
        memory: what the model remembers of the segment before.
        depths: layers of the weight-tied networks of the other rows.
        method: how the first row solves; None for the model's own way.
        warm: the first row starts its solve from what is remembered of the segment before.
    """
    layer = model.layer
    with _untouched(model):
        peak, output = _peak(model, segment, memory, method=method, warm=warm)
        evals = None if output.solution is None else output.solution.evals
        label = type(layer).__name__.lower()
        rows: list[Event] = [{"label": label, "depth": None, "peak_bytes": peak, "evals": evals}]
        if not isinstance(layer, Equilibrium):
            return rows
        for depth in depths:
            peak, _ = _peak(model, segment, memory, method=network_of(depth).method)
            rows.append({"label": "unrolled", "depth": depth, "peak_bytes": peak, "evals": depth + 1})
    return rows


def network_of(depth: int, *, name: str | None = None, steps: int = 1, checkpoint: bool = False) -> Stage:
    """The stage that makes an equilibrium a weight-tied network of ``depth`` layers, by back-propagation."""
    stop = Stop(rtol=0, atol=0, max_evals=depth + 1, best=False)  # the last evaluation tells the residual
    gradient = Unroll(checkpoint=checkpoint)
    return Stage(name=name or f"{depth} layers", steps=steps, method=Method(Picard(), stop, gradient))


def loss_of(output: LanguageOutput) -> Float[Tensor, ""]:
    """What a model without a penalty is trained by: the mean of the nats, and its own losses where it has any."""
    loss = output.nats.mean()
    return loss if output.extra is None else loss + output.extra


def _peak(
    model: LanguageModel, segment: Segment, memory: Memory, *, method: Method | None, warm: bool = False
) -> tuple[int, LanguageOutput]:
    model.zero_grad(set_to_none=True)
    with PeakMemory(device_of(model)) as peak:
        output = model(segment.tokens, segment.targets, memory, skip=segment.skip, method=method, warm=warm)
        loss_of(output).backward()
    return peak.peak, output


@contextlib.contextmanager
def _untouched(model: LanguageModel) -> Iterator[None]:
    """Training mode; afterwards modes, gradients and random generators are what they were."""
    gradients = [parameter.grad for parameter in model.parameters()]
    device = device_of(model)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), in_mode(model, training=True):
        try:
            yield
        finally:
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter.grad = gradient
