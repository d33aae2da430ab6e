"""Training: the numbers by which the weights of a model are trained."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from typing import Any, Literal

import torch

from equilibria.training.decay import CATALOGUE, Cosine, Decay, NonMonotone
from equilibria.training.ranks import KINDS, Parallel

MOST_THREADS = 1024
"""No machine gains from more; OpenMP ends the process where the system refuses it a thread."""
LONGEST_WAIT = 1e7
"""Seconds: 115 days; a clock overflows somewhere beyond."""
LARGEST = torch.finfo(torch.float32).max
"""Settings are multiplied with float32 weights, and PyTorch refuses a factor that float32 cannot hold."""
LARGEST_SEED = 2**63 - 1
"""What PyTorch's generators take."""


@dataclasses.dataclass(frozen=True)
class Training:
    """How the weights are trained, and what is written down meanwhile."""

    batch_size: int = 8
    """Streams of text that are read side by side."""
    segment_length: int = 64
    """Tokens of each stream in one step; corpora of independent sequences take whole ones."""
    overlap: int = 0
    """Tokens that a segment shares with the one before: read anew, without memory, and not scored; 0 for memory."""
    learning_rate: float = 1e-3
    """The largest learning rate, at the end of the warm-up."""
    warmup: int = 0
    """Steps in which the learning rate grows from 0."""
    decay: Decay = dataclasses.field(default_factory=Cosine)
    """How the learning rate falls after the warm-up."""
    final_learning_rate: float = 0.0
    """What the learning rate falls towards, along half a cosine; a step after the last would have it."""
    optimiser: Literal["adam", "adamw", "sgd", "asgd"] = "adam"
    """Adam, Adam with decoupled weight decay, SGD, or SGD with averaged weights once decay=NonMonotone triggers."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of Adam's two moments."""
    epsilon: float = 1e-8
    """Added to the root of Adam's second moment."""
    momentum: float = 0.0
    """Share of the last update that SGD repeats, before the learning rate."""
    weight_decay: float = 0.0
    """Weight decay per step, times the learning rate; all but "adamw" add it to the gradient, after the clipping."""
    clip: float | None = 0.25
    """Largest Euclidean norm of the whole gradient; None for no limit."""
    seed: int = 0
    """Draws the initial weights, the dropout masks and the probes of the penalty."""
    device: str = "auto"
    """"cpu", "cuda", "cuda:1", …; "auto" takes a GPU if there is one."""
    parallel: Parallel = "none"
    """How the model is spread over the processes of a torchrun: a replica each ("ddp"), or a shard each ("fsdp")."""
    accumulate: int = 1
    """Parts of a batch that are computed one after the other, for less memory."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic inside the model; weights and the solvers' algebra are float32. For tolerances of 1e-2 and above."""
    unconverged: Literal["continue", "raise budget", "skip step", "stop"] = "continue"
    """What to do in a step in which more samples than ``tolerated`` do not converge, forward or backward."""
    tolerated: float = 0.5
    """Share of the samples of a step that may fail before ``unconverged`` acts."""
    rollbacks: int = 2
    """How often a run goes back to its newest checkpoint, each time with half the learning rate, when loss or gradient
    is not finite; then it stops."""
    rank_timeout: float = 600.0
    """Seconds after which a process that waits for a lost one gives up."""
    threads: int | None = None
    """Threads of PyTorch on the CPU; None leaves them as they are."""
    compile: bool = False
    """Whether cells are compiled (torch.compile): about a minute at the start, and another for each new batch size."""
    log_every: int = 10
    """Steps between two lines of the log."""
    valid_every: int = 500
    """Steps between two validations."""
    checkpoint_every: int = 500
    """Steps between two checkpoints; a validation that is the best one makes one too."""
    keep: int = 2
    """Newest checkpoints that stay, besides the best one."""
    eval_batch_size: int = 8
    """Streams that are read side by side in validation; 1 scores every token but the first."""
    eval_segment_length: int | None = None
    """Tokens of each stream in one step of validation; None for segment_length."""
    eval_overlap: int | None = None
    """Tokens that a segment of the validation shares with the one before; None for overlap."""
    valid_segments: int | None = None
    """Segments of the validation text that are read; None for all."""
    yardstick: bool = True
    """Whether corpora of characters get Witten–Bell n-grams of order 1 to 4 as a yardstick, at the start."""
    spectral_radius: int = 40
    """Power iterations for the spectral radius of the Jacobian at each validation; 0 for none."""
    measure_memory: bool = True
    """Whether the memory of a training step is measured at the end, beside that of the same cell unrolled."""
    memory_depths: tuple[int, ...] = (8, 16, 32, 64)
    """Depths of the unrolled networks in that measurement."""
    tensorboard: bool = False
    """Whether the log is written for TensorBoard as well."""

    def __post_init__(self) -> None:
        finite(self)
        at_least(self, 1, "batch_size", "segment_length", "log_every", "valid_every", "checkpoint_every", "keep")
        at_least(self, 1, "eval_batch_size", "eval_segment_length", "valid_segments", "threads", "accumulate")
        at_least(self, 0, "warmup", "seed", "spectral_radius", "weight_decay", "final_learning_rate")
        at_least(self, 0, "overlap", "eval_overlap", "rollbacks")
        _above_zero(self, "learning_rate", "clip", "epsilon", "rank_timeout")
        _at_most(self, MOST_THREADS, "threads", advice=f"this machine has {os.cpu_count()} cores, and None takes them")
        _at_most(self, LONGEST_WAIT, "rank_timeout", advice="try 600")
        _at_most(self, LARGEST_SEED, "seed", advice="try 0")
        if 0 < self.spectral_radius < 3:
            raise ValueError(f"Training(spectral_radius={self.spectral_radius}): 3 iterations at least; try 40, or 0.")
        self._check_parts()
        self._check_optimiser()
        self._check_overlaps()

    @property
    def evaluation(self) -> dict[str, Any]:
        """How the validation text is read, by the names of ``evaluate``."""
        return {
            "batch_size": self.eval_batch_size,
            "segment_length": self.eval_segment_length or self.segment_length,
            "overlap": self.overlap if self.eval_overlap is None else self.eval_overlap,
        }

    def _check_parts(self) -> None:
        if self.parallel not in KINDS:
            raise ValueError(f"Training(parallel={self.parallel!r}): it is 'none', 'ddp' or 'fsdp'.")
        if self.unconverged not in (policies := ("continue", "raise budget", "skip step", "stop")):
            raise ValueError(
                f"Training(unconverged={self.unconverged!r}): it is one of {', '.join(map(repr, policies))}."
            )
        if not 0 <= self.tolerated < 1:
            raise ValueError(f"Training(tolerated={self.tolerated}): a share in [0, 1); try 0.5.")
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(f"Training(precision={self.precision!r}): it is 'float32' or 'bfloat16'.")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"Training(batch_size={self.batch_size}, accumulate={self.accumulate}): the rows of a batch are "
                "divided evenly; give an accumulate that divides the batch size, or 1."
            )
        if self.parallel == "fsdp" and self.optimiser == "asgd":
            raise ValueError(
                "Training(parallel='fsdp', optimiser='asgd'): averages are not kept in shards; give parallel='ddp'."
            )

    def _check_optimiser(self) -> None:
        if self.optimiser not in ("adam", "adamw", "sgd", "asgd"):
            raise ValueError(f"Training(optimiser={self.optimiser!r}): it is 'adam', 'adamw', 'sgd' or 'asgd'.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"Training(betas={self.betas}): both decays lie in [0, 1); try (0.9, 0.999).")
        if not 0 <= self.momentum < 1 or (self.momentum and self.optimiser != "sgd"):
            raise ValueError(
                f"Training(momentum={self.momentum}, optimiser={self.optimiser!r}): a share in [0, 1), for 'sgd' only; "
                "try 0.9, or 0 for none."
            )
        if self.optimiser == "asgd" and not isinstance(self.decay, NonMonotone):
            raise ValueError(
                f"Training(optimiser='asgd', decay={self.decay}): the averaging begins where NonMonotone triggers; "
                "give decay=NonMonotone(), or optimiser='sgd'."
            )
        if self.final_learning_rate and not isinstance(self.decay, Cosine) and type(self.decay) in CATALOGUE:
            raise ValueError(
                f"Training(final_learning_rate={self.final_learning_rate}, decay={self.decay}): only a cosine falls "
                "towards a final rate; give decay=Cosine(), or final_learning_rate=0."
            )

    def _check_overlaps(self) -> None:
        """An overlap of the evaluation that is too long must not come out after hours."""
        length, overlap = self.evaluation["segment_length"], self.evaluation["overlap"]
        for name, shared, whole in (
            ("overlap", self.overlap, self.segment_length),
            ("eval_overlap", overlap, length),
        ):
            if shared >= whole:
                raise ValueError(
                    f"Training({name}={shared}): segments of {whole} tokens share less than that with the one before; "
                    f"give at most {whole - 1}, or 0 for none."
                )


def at_least(value: object, least: int, *names: str) -> None:
    """Refuse numbers of a dataclass that are there and too small."""
    for name in names:
        number = getattr(value, name)
        if number is not None and number < least:
            raise ValueError(f"{type(value).__name__}({name}={number}): it must be at least {least}.")


def finite(value: object) -> None:
    """Refuse floats anywhere in a tree of dataclasses that are no numbers of float32: NaN, infinity, 1e39.

    Raises:
        ValueError: names the field by its path from ``value``.
    """
    for path, number in _floats(value):
        if not abs(number) <= LARGEST:
            raise ValueError(
                f"{type(value).__name__}({path}={number}): it must be a finite number, at most {LARGEST:.1e} in "
                "magnitude; leave it out for its default."
            )


def _floats(value: object) -> Iterator[tuple[str, float]]:
    """Every float in the tree, each with its path: "stages.0.penalty"."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    else:
        parts = [(str(place), part) for place, part in enumerate(value)] if isinstance(value, tuple) else []
    for name, part in parts:
        if isinstance(part, float):
            yield name, part
        else:
            yield from ((f"{name}.{path}", number) for path, number in _floats(part))


def _at_most(value: object, most: float, name: str, *, advice: str) -> None:
    number = getattr(value, name)
    if number is not None and number > most:
        largest = "2⁶³ − 1" if most == LARGEST_SEED else f"{most:,.0f}"
        raise ValueError(f"{type(value).__name__}({name}={number}): it must be at most {largest}; {advice}.")


def _above_zero(value: object, *names: str) -> None:
    for name in names:
        number = getattr(value, name)
        if number is not None and not 0 < number < float("inf"):
            raise ValueError(f"{type(value).__name__}({name}={number}): it must be a finite number above 0.")
