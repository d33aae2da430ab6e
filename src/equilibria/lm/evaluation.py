"""evaluate: the loss of a model on a stream, read segment by segment.

Letters: B batch, T time, V vocabulary.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from equilibria.checks import check_flag, check_kind, check_whole, range_of
from equilibria.core.solve import Solution
from equilibria.fixed_point import Method
from equilibria.layers.cell import Cell
from equilibria.layers.equilibrium import Equilibrium
from equilibria.lm.corpora import Segment, Segments, Stream, Vocabulary
from equilibria.lm.device import device_of, to
from equilibria.lm.model import LanguageModel, LanguageOutput
from equilibria.lm.model.modes import eval_mode
from equilibria.lm.ranks import ALONE, Ranks, reshard
from equilibria.lm.score import Evaluation, Setting
from equilibria.stability import spectral_radius


def evaluate(
    model: LanguageModel,
    stream: Stream,
    *,
    batch_size: int = 1,
    segment_length: int | None = None,
    overlap: int = 0,
    max_segments: int | None = None,
    method: Method | None = None,
    warm: bool = False,
    depth: int | None = None,
    ranks: Ranks = ALONE,
    vocabulary: Vocabulary | None = None,
    official: bool = False,
) -> Evaluation:
    """The score of the model on the stream, in evaluation mode and without gradients.

    The score is exact with ``batch_size=1``. With a larger batch, as in published scores, the stream is cut into that
    many parts of equal length, each of which begins without a past; a remainder is not scored.

    Args:
        model: the model, in any mode; the mode is restored.
        stream: the text or the episodes to score.
        batch_size: number of parts of the stream that are read side by side.
        segment_length: tokens of each part per solve; not needed for streams of episodes.
        overlap: tokens that a segment shares with the previous one, read again and not scored; with 0 the memory is
            carried instead.
        max_segments: read at most this many segments; None for all.
        method: the method of the solves; None for the model's own in evaluation.
        warm: start each solve from the last state in the memory.
        depth: number of layers of an explicit network to use; None for all.
        ranks: processes that share the batch if it can be divided evenly; otherwise each reads all of it.
        vocabulary: the vocabulary of the text, to count its bytes; None counts none, as for a synthetic task.
        official: divide the tokens into rows first, as the published codes do; see ``Segments``.

    Raises:
        ValueError: an argument is out of its range, or the stream is too short for the batch.
    """
    check_whole("evaluate", batch_size=batch_size)
    check_whole("evaluate", optional=True, max_segments=max_segments)
    check_flag("evaluate", warm=warm)
    _check_fit(model, stream, vocabulary, depth)
    if max_segments is not None and max_segments < 1:
        raise ValueError(f"evaluate(max_segments={max_segments}): at least 1 segment is scored; None scores them all.")
    if batch_size % ranks.size:
        ranks = ALONE
    segments = Segments(
        stream,
        batch_size=batch_size // ranks.size,
        length=segment_length,
        overlap=overlap,
        rank=ranks.rank,
        world_size=ranks.size,
        official=official,
    )
    began, device, how = time.perf_counter(), device_of(model), {"method": method, "warm": warm, "depth": depth}
    totals, memory = _Totals(answers=stream.answers or stream.episode, vocabulary=vocabulary), None
    with eval_mode(model):
        for segment in itertools.islice(segments.one_epoch(), max_segments):
            totals.count(segment)
            segment = to(segment, device)
            past = None if segment.resets else memory
            output = model(segment.tokens, segment.targets, past, skip=segment.skip, **how)
            memory = output.memory
            totals.add(model, segment, output)
    reshard(model)
    totals.share(ranks)
    setting = Setting(
        batch_size=batch_size,
        segment_length=stream.episode or segment_length or len(stream),
        overlap=overlap,
        max_segments=max_segments,
        **_layer_setting(model.layer, method, carried=overlap == 0),
        tokens=totals.tokens,
        stream_tokens=len(stream),
        official=official,
    )
    return totals.evaluation(setting, seconds=time.perf_counter() - began)


def _check_fit(model: LanguageModel, stream: Stream, vocabulary: Vocabulary | None, depth: int | None) -> None:
    """Raise an error if the model cannot read the stream, or has another vocabulary or no depth."""
    check_kind("stream", stream, Stream, "Stream.of_text(vocabulary.encode(text))")
    size = model.vocabulary_size
    low, high = range_of(stream.tokens, stream.targets)
    if low < 0 or high >= size:
        raise ValueError(
            f"evaluate: the stream has the id {low if low < 0 else high}, and the model knows 0 … {size - 1}; encode "
            "the text with the vocabulary that the model was trained with."
        )
    if vocabulary is not None and len(vocabulary) != size:
        raise ValueError(
            f"evaluate: the vocabulary has {len(vocabulary):,} tokens and the model {size:,}; give the one that the "
            "model was trained with, or, if the model is padded to more tokens, vocabulary=None, which counts no bytes."
        )
    if depth is not None and isinstance(model.layer, Equilibrium):
        raise ValueError(
            f"evaluate(depth={depth}): the layer of this model is an Equilibrium, which has no number of layers; leave "
            "depth out, or limit the evaluations with method=….with_budget(…)."
        )


def _layer_setting(layer: nn.Module, method: Method | None, *, carried: bool) -> dict[str, Any]:
    """Memory length, budget and tolerances of a layer in evaluation, by the names of ``Setting``."""
    configs = (getattr(cell, "config", None) for cell in layer.modules() if isinstance(cell, Cell))
    lengths = (getattr(config, "memory", None) for config in configs)
    longest = max((length for length in lengths if isinstance(length, int)), default=None)
    if method is None and isinstance(layer, Equilibrium):
        method = layer.evaluation_method
    stop = None if method is None else method.stop
    return {
        "memory_length": longest if carried or longest is None else 0,
        "max_evals": None if stop is None else stop.max_evals,
        "rtol": None if stop is None else stop.rtol,
        "atol": None if stop is None else stop.atol,
    }


class _Totals:
    """Sums over segments."""

    def __init__(self, *, answers: int | None, vocabulary: Vocabulary | None) -> None:
        self._answers, self._vocabulary, self._bytes = answers, vocabulary, 0
        self._nll, self.tokens, self._right, self._asked = 0.0, 0, 0, 0
        self._forward: dict[str, tuple[float, int]] = {}

    def count(self, segment: Segment) -> None:
        """Count the bytes of a segment's scored text, before it goes to a device."""
        if self._vocabulary is not None:
            scored = slice(segment.skip, None)
            self._bytes += self._vocabulary.byte_count(segment.tokens[:, scored], segment.targets[:, scored])

    def add(self, model: LanguageModel, segment: Segment, output: LanguageOutput) -> None:
        count = segment.scored
        self.tokens += count
        self._nll += float(output.nll.double().sum())
        if output.solution is not None:
            for name, value in summary(output.solution).items():
                total, weight = self._forward.get(name, (0.0, 0))
                known = math.isfinite(value)  # a residual that is never finite is left out of the mean
                self._forward[name] = (total + count * value, weight + count) if known else (total, weight)
        if self._answers is not None:
            guesses = model.read(output.layer.output[:, -self._answers :]).argmax(dim=-1)
            targets = segment.targets[:, -self._answers :]
            self._right += int((guesses == targets).sum())
            self._asked += targets.numel()

    def share(self, ranks: Ranks) -> None:
        """Replace this rank's sums by those over all ranks."""
        if ranks.alone:
            return
        own = {"nll": self._nll, "tokens": self.tokens, "right": self._right, "asked": self._asked}
        own["bytes"] = self._bytes
        every = ranks.of_all((own, self._forward))
        self._nll, self.tokens = (sum(one[name] for one, _ in every) for name in ("nll", "tokens"))
        self._right, self._asked = (sum(one[name] for one, _ in every) for name in ("right", "asked"))
        self._bytes = sum(one["bytes"] for one, _ in every)
        forwards = [forward for _, forward in every]
        self._forward = {
            name: (sum(forward[name][0] for forward in forwards), sum(forward[name][1] for forward in forwards))
            for name in self._forward
        }

    def evaluation(self, setting: Setting, *, seconds: float) -> Evaluation:
        return Evaluation(
            nll_per_token=self._nll / self.tokens,
            setting=setting,
            forward={name: total / (weight or math.nan) for name, (total, weight) in self._forward.items()} or None,
            accuracy=self._right / self._asked if self._asked else None,
            seconds=seconds,
            bytes=None if self._vocabulary is None else self._bytes,
            unit="token" if self._vocabulary is None else self._vocabulary.unit,
        )


def jacobian_radius(
    model: LanguageModel,
    stream: Stream,
    *,
    batch_size: int = 1,
    segment_length: int | None = None,
    iterations: int = 60,
    method: Method | None = None,
    warm: bool = False,
) -> Float[Tensor, " B"]:
    """The spectral radius of the cell's Jacobian at the final states of the first segment, one value per stream.

    These are equilibria if the solves converge, and the output of the network in a stage of fixed depth. Above 1 plain
    iteration diverges; far above 1 every solver has difficulties. The random probes are the same in every call.

    Args:
        model: a model whose layer is an ``Equilibrium``.
        stream: the text; its first segment is read.
        batch_size: number of parts of the stream that are read side by side.
        segment_length: tokens of each part.
        iterations: power iterations.
        method: the method of the solve; None for the model's own in evaluation.
        warm: as in ``evaluate``.

    Raises:
        TypeError: the model's layer is not an ``Equilibrium``.
    """
    if not isinstance(model.layer, Equilibrium):
        raise TypeError(
            f"jacobian_radius needs a model whose layer is an Equilibrium; this one is {type(model.layer)}."
        )
    device = device_of(model)
    segment = to(Segments(stream, batch_size=batch_size, length=segment_length).at(0), device)
    with eval_mode(model):
        layer = model(segment.tokens, segment.targets, method=method, warm=warm).layer
        generator = torch.Generator(device).manual_seed(0)
        return spectral_radius(layer.f, layer.z, iterations=iterations, generator=generator)


def summary(solution: Solution) -> dict[str, float]:
    """Evaluations, mean residual, share of converged samples and mean steps of a solve; waits for the device.

    The residual is the mean over the samples whose residual is finite, NaN if there are none.
    """
    residual = solution.residual.double()
    return {
        "evals": solution.evals,
        "residual": float(residual[residual.isfinite()].mean()),
        "converged": float(solution.converged.double().mean()),
        "steps": float(solution.steps.double().mean()),
    }


def mean_summary(solutions: Sequence[Solution]) -> dict[str, float] | None:
    """The mean of the summaries of several solves; None if there are no solves."""
    found = [summary(solution) for solution in solutions]
    return {name: statistics.fmean(one[name] for one in found) for name in found[0]} if found else None
