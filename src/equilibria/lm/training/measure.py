"""Measurements for a training: peak memory of a step at several depths, and the n-gram baseline."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch

from equilibria.fixed_point import Method
from equilibria.layers.equilibrium import Equilibrium
from equilibria.layers.sequence import Memory
from equilibria.lm.corpora import Corpus, Segment, witten_bell
from equilibria.lm.device import device_of
from equilibria.lm.experiments.stage import network_of
from equilibria.lm.model import LanguageModel, LanguageOutput
from equilibria.lm.model.modes import in_mode
from equilibria.lm.runs.events import Event
from equilibria.peak_memory import PeakMemory


def memory_comparison(
    model: LanguageModel,
    segment: Segment,
    memory: Memory,
    depths: Sequence[int] = (8, 16, 32, 64),
    *,
    method: Method | None = None,
    warm: bool = False,
) -> list[Event]:
    """Peak bytes of one training step, forward and backward: solved by ``method``, and unrolled to each depth.

    Afterwards the weights, the gradients, the mode and the random generators are as before. The result has one row per
    measurement, with label, depth, peak_bytes and evals; a model without equilibrium has one row.

    Args:
        model: a language model.
        segment: a batch, on the model's device.
        memory: the memory of the previous segment.
        depths: numbers of layers of the unrolled networks.
        method: the method of the first row; None for the model's own.
        warm: start the solve of the first row from the last state in the memory.
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


def _peak(
    model: LanguageModel, segment: Segment, memory: Memory, *, method: Method | None, warm: bool = False
) -> tuple[int, LanguageOutput]:
    model.zero_grad(set_to_none=True)
    with PeakMemory(device_of(model)) as peak:
        output = model(segment.tokens, segment.targets, memory, skip=segment.skip, method=method, warm=warm)
        output.loss.backward()
    return peak.peak, output


@contextlib.contextmanager
def _untouched(model: LanguageModel) -> Iterator[None]:
    """Within it, training mode; afterwards modes, gradients and random generators are restored."""
    gradients = [parameter.grad for parameter in model.parameters()]
    device = device_of(model)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), in_mode(model, training=True):
        try:
            yield
        finally:
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter.grad = gradient


def ngram_baseline(corpus: Corpus, orders: Sequence[int] = (1, 2, 3, 4)) -> list[Event]:
    """Validation bits per token of Witten–Bell models of the given orders: one row per order, with label and bits."""
    rows: list[Event] = []
    for order in orders:
        nll = witten_bell(corpus.train.ids, corpus.valid.ids, order, len(corpus.vocabulary))
        rows.append({"label": f"Witten–Bell order {order}", "bits": nll / math.log(2)})
    return rows
