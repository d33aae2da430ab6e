"""The settings of a training in groups, one per topic; ``Training`` has one of each."""

from __future__ import annotations

import dataclasses
import os
from typing import Literal

from equilibria.checks import check_at_least, check_fields, check_kind
from equilibria.lm.experiments.checks import above_zero, at_most, finite
from equilibria.lm.experiments.decay import CATALOGUE, Cosine, Decay, NonMonotone
from equilibria.lm.ranks import Parallel

MOST_THREADS = 1024
"""More threads help on no machine, and OpenMP ends the process if the system cannot give it a thread."""
LONGEST_WAIT = 1e7
"""Seconds, i.e. 115 days; much longer times overflow the clock of the process group."""


@dataclasses.dataclass(frozen=True)
class Batches:
    """How the training text is divided into batches."""

    batch_size: int = 8
    """Streams of text that are read side by side."""
    segment_length: int = 64
    """Tokens of each stream per step; corpora of independent sequences take whole sequences."""
    overlap: int = 0
    """Tokens that a segment shares with the previous one, read again and not scored; 0 to carry the memory instead."""

    def __post_init__(self) -> None:
        check_fields(self)
        finite(self)
        check_at_least(self, batch_size=1, segment_length=1, overlap=0)
        if self.overlap >= self.segment_length:
            raise ValueError(too_long("overlap", self.overlap, self.segment_length, of="Batches"))


@dataclasses.dataclass(frozen=True)
class Optimisation:
    """How the gradient changes the weights."""

    optimiser: Literal["adam", "adamw", "sgd", "asgd"] = "adam"
    """Adam, Adam with decoupled weight decay, SGD, or SGD with averaged weights once decay=NonMonotone triggers."""
    learning_rate: float = 1e-3
    """The largest learning rate, at the end of the warm-up."""
    warmup: int = 0
    """Steps in which the learning rate grows from 0."""
    decay: Decay = dataclasses.field(default_factory=Cosine)
    """How the learning rate falls after the warm-up."""
    final_learning_rate: float = 0.0
    """Final learning rate of the cosine schedule."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of Adam's two moments."""
    epsilon: float = 1e-8
    """Added to the root of Adam's second moment."""
    momentum: float = 0.0
    """Momentum of SGD."""
    weight_decay: float = 0.0
    """Weight decay per step, times the learning rate; all but "adamw" add it to the gradient after clipping."""
    clip: float | None = 0.25
    """Largest Euclidean norm of the whole gradient; None for no limit."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic inside the model; weights and the solvers' algebra stay float32. Use bfloat16 for rtol ≥ 1e-2 only."""

    def __post_init__(self) -> None:
        check_kind("decay", self.decay, Decay, "Cosine()")
        check_fields(self)
        finite(self)
        check_at_least(self, warmup=0, weight_decay=0, final_learning_rate=0)
        above_zero(self, "learning_rate", "clip", "epsilon")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"Optimisation(betas={self.betas}): both decays lie in [0, 1); try (0.9, 0.999).")
        if not 0 <= self.momentum < 1:
            raise ValueError(
                f"Optimisation(momentum={self.momentum}): momentum is in [0, 1); try 0.9 with optimiser='sgd', or 0."
            )
        if self.momentum and self.optimiser != "sgd":
            raise ValueError(
                f"Optimisation(momentum={self.momentum}, optimiser={self.optimiser!r}): only 'sgd' has momentum; give "
                "optimiser='sgd', or momentum=0."
            )
        self._check_decay()

    def _check_decay(self) -> None:
        if self.optimiser == "asgd" and not isinstance(self.decay, NonMonotone):
            raise ValueError(
                f"Optimisation(optimiser='asgd', decay={self.decay}): averaging begins when NonMonotone triggers; "
                "give decay=NonMonotone(), or optimiser='sgd'."
            )
        if self.final_learning_rate and not isinstance(self.decay, Cosine) and type(self.decay) in CATALOGUE:
            raise ValueError(
                f"Optimisation(final_learning_rate={self.final_learning_rate}, decay={self.decay}): only a cosine "
                "has a final rate; give decay=Cosine(), or final_learning_rate=0."
            )


@dataclasses.dataclass(frozen=True)
class Validation:
    """How the validation text is read, and how often."""

    valid_every: int = 500
    """Steps between two validations."""
    eval_batch_size: int = 8
    """Streams that are read side by side; with 1 every token except the first is scored."""
    eval_segment_length: int | None = None
    """Tokens of each stream per solve; None for segment_length."""
    eval_overlap: int | None = None
    """Tokens that a segment shares with the previous one; None for overlap."""
    valid_segments: int | None = None
    """Number of segments per validation; None for all."""

    def __post_init__(self) -> None:
        check_fields(self)
        finite(self)
        check_at_least(self, valid_every=1, eval_batch_size=1, eval_segment_length=1, valid_segments=1, eval_overlap=0)


@dataclasses.dataclass(frozen=True)
class Logging:
    """Logs and measurements, which have no influence on the weights."""

    log_every: int = 10
    """Steps between two lines of the log."""
    baseline: bool = True
    """Whether corpora of characters get Witten–Bell n-grams of order 1 to 4 as a baseline, at the start."""
    spectral_radius: int = 40
    """Power iterations for the spectral radius of the Jacobian at each validation; 0 for none."""
    measure_memory: bool = True
    """Whether the peak memory of a training step, and of one of the unrolled cell, is measured at the end."""
    memory_depths: tuple[int, ...] = (8, 16, 32, 64)
    """Depths of the unrolled cell in that measurement."""
    tracker: Literal["none", "tensorboard", "trackio", "wandb"] = "none"
    """Where the numbers of the log are sent besides metrics.jsonl: TensorBoard, Trackio or Weights & Biases."""
    tensorboard: bool = False
    """The older name of tracker="tensorboard"."""

    def __post_init__(self) -> None:
        check_fields(self)
        finite(self)
        if self.tensorboard and self.tracker not in ("none", "tensorboard"):
            raise ValueError(
                f"Logging(tracker={self.tracker!r}, tensorboard=True): there is one tracker at a time, and tensorboard "
                "is the older name of tracker='tensorboard'; leave one of the two out."
            )
        check_at_least(self, log_every=1, spectral_radius=0)
        if any(depth < 0 for depth in self.memory_depths):
            raise ValueError(
                f"Logging(memory_depths={self.memory_depths}): a depth counts layers and is at least 0; try (8, "
                "16, 32, 64), or measure_memory=False for no measurement."
            )
        if 0 < self.spectral_radius < 3:
            raise ValueError(
                f"Logging(spectral_radius={self.spectral_radius}): give at least 3 iterations; try 40, or 0 for none."
            )

    @property
    def tracker_name(self) -> str:
        """The tracker, by either name of its setting."""
        return "tensorboard" if self.tensorboard else self.tracker


@dataclasses.dataclass(frozen=True)
class Faults:
    """Checkpoints, and the reaction to failures."""

    checkpoint_every: int = 500
    """Steps between two checkpoints; a best validation also writes one."""
    keep: int = 2
    """Number of newest checkpoints to keep, besides the best one."""
    rollbacks: int = 2
    """Number of times that a run returns to its newest checkpoint, each time with half the learning rate, when the loss
    or the gradient is not finite; after that it stops."""
    unconverged: Literal["continue", "raise_budget", "skip_step", "stop"] = "continue"
    """Action in a step in which more samples than ``tolerated`` do not converge, forward or backward."""
    tolerated: float = 0.5
    """Share of the samples of a step that may fail to converge before ``unconverged`` acts."""

    def __post_init__(self) -> None:
        check_fields(self)
        finite(self)
        check_at_least(self, checkpoint_every=1, keep=1, rollbacks=0)
        if not 0 <= self.tolerated < 1:
            raise ValueError(f"Faults(tolerated={self.tolerated}): tolerated is a share in [0, 1); try 0.5.")


@dataclasses.dataclass(frozen=True)
class Devices:
    """The devices and processes of the computation; they may change the last bits of the weights, and nothing else."""

    device: str = "auto"
    """"cpu", "cuda", "cuda:1", …; "auto" takes a GPU if there is one."""
    threads: int | None = None
    """Threads of PyTorch on the CPU; None does not change the number."""
    compile: bool = False
    """Whether cells are compiled (torch.compile); takes about a minute at the start and for each new batch size."""
    accumulate: int = 1
    """Number of parts of a batch that are computed one after the other, to save memory."""
    parallel: Parallel = "none"
    """How torchrun's processes share the model: each has a replica ("ddp"), or a shard of each parameter ("fsdp")."""
    rank_timeout: float = 600.0
    """Seconds after which a process stops waiting for a lost one."""

    def __post_init__(self) -> None:
        check_fields(self)
        finite(self)
        check_at_least(self, threads=1, accumulate=1)
        above_zero(self, "rank_timeout")
        at_most(self, MOST_THREADS, "threads", advice=f"this machine has {os.cpu_count()} cores; try None")
        at_most(self, LONGEST_WAIT, "rank_timeout", advice="try 600")


def too_long(name: str, overlap: int, length: int, *, of: str) -> str:
    """The error sentence for an overlap that is not shorter than the segment."""
    return (
        f"{of}({name}={overlap}): segments of {length} tokens share fewer than that with the previous one; give at "
        f"most {length - 1}, or 0 for none."
    )
