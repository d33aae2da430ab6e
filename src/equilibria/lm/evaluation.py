"""evaluate: the loss of a model on a stream, read segment by segment.

Letters: B batch, T time, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from equilibria.core.solve import Solution
from equilibria.fixed_point import Method
from equilibria.layers.cell import Cell
from equilibria.layers.equilibrium import Equilibrium
from equilibria.lm.corpora import SYMBOLS, Segment, Segments, Stream
from equilibria.lm.device import device_of, to
from equilibria.lm.model import LanguageModel, LanguageOutput
from equilibria.lm.model.modes import evaluating
from equilibria.lm.ranks import ALONE, Ranks, let_go
from equilibria.stability import spectral_radius


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a score depends on besides weights and text: it belongs beside every perplexity."""

    batch_size: int
    """Rows that were read side by side; each begins without a past."""
    segment_length: int
    """Tokens of each row in one solve."""
    overlap: int
    """Tokens that a segment shares with the one before, in the place of a memory; 0 for memory."""
    max_segments: int | None
    """The first segments only; None for all."""
    memory_length: int | None
    """Positions of the past that the cell remembers; None for a layer whose memory has no length, 0 with overlap."""
    max_evals: int | None
    """Budget of a solve in evaluations of f; None for a layer that solves nothing."""
    rtol: float | None
    """Relative tolerance of a solve, likewise."""
    atol: float | None
    """Absolute tolerance of a solve, likewise; with both 0 the budget is the depth of a network."""
    tokens: int
    """Tokens that were scored."""
    stream_tokens: int
    """Tokens that the stream has."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What a model scores on a stream, and what its solves cost. Means are weighted by tokens."""

    nats_per_token: float
    """Mean loss, natural logarithm."""
    setting: Setting
    """How it was measured."""
    forward: dict[str, float] | None
    """Means over the solves: evals, residual (relative), converged (share of samples), steps; None without solves."""
    accuracy: float | None
    """Share of the answers of made-up tasks that are right, of the last ten targets of each episode; None for text."""
    seconds: float
    """Time it took."""

    @property
    def tokens(self) -> int:
        """Tokens that were scored."""
        return self.setting.tokens

    @property
    def bits(self) -> float:
        """Bits per token."""
        return self.nats_per_token / math.log(2)

    @property
    def perplexity(self) -> float:
        """exp(nats per token)."""
        return math.exp(min(self.nats_per_token, 700.0))

    @property
    def evals(self) -> float | None:
        """Mean evaluations of f a segment."""
        return self.forward["evals"] if self.forward else None

    @property
    def residual(self) -> float | None:
        """Mean relative residual."""
        return self.forward["residual"] if self.forward else None

    @property
    def converged(self) -> float | None:
        """Share of samples that met the tolerance."""
        return self.forward["converged"] if self.forward else None


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
) -> Evaluation:
    """The mean loss in evaluation mode, without gradients.

    Exact is the score with ``batch_size=1``. With more, as in the published ones, the stream is cut to a multiple of
    it, and each row begins without a past.

    Args:
        model: in any mode; the mode is restored.
        stream: what is scored.
        batch_size: rows that are read side by side.
        segment_length: tokens of each row in one solve; streams of episodes need none.
        overlap: tokens that a segment shares with the one before, read anew and not scored; with 0 the memory is
            carried instead.
        max_segments: read only the first ones; None for all.
        method: how to solve; None for the model's own way in evaluation.
        warm: start each solve from what is remembered of the segment before.
        depth: layers of an explicit network that are used; None for all.
        ranks: share the rows where these can be divided evenly; otherwise each reads them all.
    """
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
    )
    began, device = time.perf_counter(), device_of(model)
    totals, memory = _Totals(answers=None if stream.episode is None else min(SYMBOLS, stream.episode)), None
    with evaluating(model):
        for segment in itertools.islice(segments.one_epoch(), max_segments):
            segment = to(segment, device)
            past, options = None if segment.fresh else memory, {"method": method, "warm": warm, "depth": depth}
            output = model(segment.tokens, segment.targets, past, skip=segment.skip, **options)
            memory = output.memory
            totals.add(model, segment, output)
    let_go(model)
    totals.share(ranks)
    setting = Setting(
        batch_size=batch_size,
        segment_length=stream.episode or segment_length or len(stream),
        overlap=overlap,
        max_segments=max_segments,
        **_layer_setting(model.layer, method, carried=overlap == 0),
        tokens=totals.tokens,
        stream_tokens=len(stream),
    )
    return totals.evaluation(setting, seconds=time.perf_counter() - began)


def _layer_setting(layer: nn.Module, method: Method | None, *, carried: bool) -> dict[str, Any]:
    """Memory, budget and tolerances of a layer in evaluation, each None where it has none."""
    configs = (getattr(cell, "config", None) for cell in layer.modules() if isinstance(cell, Cell))
    lengths = (getattr(config, "memory", None) for config in configs)
    longest = max((length for length in lengths if isinstance(length, int)), default=None)
    if method is None and isinstance(layer, Equilibrium):
        method = layer.evaluation_method
    stop = None if method is None else method.stop
    return {
        "memory_length": longest if carried or longest is None else 0,
        **{name: getattr(stop, name, None) for name in ("max_evals", "rtol", "atol")},
    }


class _Totals:
    """Sums over segments."""

    def __init__(self, *, answers: int | None) -> None:
        self._answers = answers
        self._nats, self.tokens, self._right, self._asked = 0.0, 0, 0, 0
        self._forward: dict[str, tuple[float, int]] = {}

    def add(self, model: LanguageModel, segment: Segment, output: LanguageOutput) -> None:
        count = segment.scored
        self.tokens += count
        self._nats += float(output.nats.double().sum())
        if output.solution is not None:
            for name, value in summary(output.solution).items():
                total, weight = self._forward.get(name, (0.0, 0))
                known = math.isfinite(value)  # a residual that was never finite has no mean
                self._forward[name] = (total + count * value, weight + count) if known else (total, weight)
        if self._answers is not None:
            guesses = model.read(output.layer.output[:, -self._answers :]).argmax(dim=-1)
            targets = segment.targets[:, -self._answers :]
            self._right += int((guesses == targets).sum())
            self._asked += targets.numel()

    def share(self, ranks: Ranks) -> None:
        """Take the sums of all ranks in the place of one's own."""
        if ranks.alone:
            return
        own = {"nats": self._nats, "tokens": self.tokens, "right": self._right, "asked": self._asked}
        every = ranks.of_all((own, self._forward))
        self._nats, self.tokens = (sum(one[name] for one, _ in every) for name in ("nats", "tokens"))
        self._right, self._asked = (sum(one[name] for one, _ in every) for name in ("right", "asked"))
        forwards = [forward for _, forward in every]
        self._forward = {
            name: (sum(forward[name][0] for forward in forwards), sum(forward[name][1] for forward in forwards))
            for name in self._forward
        }

    def evaluation(self, setting: Setting, *, seconds: float) -> Evaluation:
        return Evaluation(
            nats_per_token=self._nats / self.tokens,
            setting=setting,
            forward={name: total / (weight or math.nan) for name, (total, weight) in self._forward.items()} or None,
            accuracy=self._right / self._asked if self._asked else None,
            seconds=seconds,
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
    """The spectral radius of the cell's Jacobian where the solves of the stream's first segment end, one a row.

    That is at the equilibria where the solves converge, and in a stage of fixed depth at the output of that network.

    Above 1 plain iteration diverges there; far above 1 every solver has trouble. The probes are always the same.

    Raises:
        TypeError: the model is no equilibrium.
    """
    if not isinstance(model.layer, Equilibrium):
        raise TypeError(
            f"jacobian_radius needs a model whose layer is an Equilibrium; this one is {type(model.layer)}."
        )
    device = device_of(model)
    segment = to(Segments(stream, batch_size=batch_size, length=segment_length).at(0), device)
    with evaluating(model):
        layer = model(segment.tokens, segment.targets, method=method, warm=warm).layer
        generator = torch.Generator(device).manual_seed(0)
        return spectral_radius(layer.f, layer.z, iterations=iterations, generator=generator)


def summary(solution: Solution) -> dict[str, float]:
    """Cost and success of a solve as plain numbers; reading them waits for the device.

    The residual is the mean of the samples that have a finite one, NaN if none has.
    """
    residual = solution.residual.double()
    return {
        "evals": solution.evals,
        "residual": float(residual[residual.isfinite()].mean()),
        "converged": float(solution.converged.double().mean()),
        "steps": float(solution.steps.double().mean()),
    }


def mean_summary(solutions: Sequence[Solution]) -> dict[str, float] | None:
    """The mean of their summaries, None of none."""
    found = [summary(solution) for solution in solutions]
    return {name: statistics.fmean(one[name] for one in found) for name in found[0]} if found else None
