"""Training: the settings for training the weights of a model."""

from __future__ import annotations

import dataclasses
from typing import Any

from equilibria.checks import check_at_least, check_fields
from equilibria.lm.experiments.checks import LARGEST_SEED, at_most, finite
from equilibria.lm.experiments.settings import (
    Batches,
    Devices,
    Faults,
    Logging,
    Optimisation,
    Validation,
    too_long,
)
from equilibria.lm.suggestions import nearest_or_all


@dataclasses.dataclass(frozen=True)
class Training:
    """The settings of a training in groups; every name occurs in one group only."""

    batches: Batches = dataclasses.field(default_factory=Batches)
    """How the training text is divided into batches."""
    optimisation: Optimisation = dataclasses.field(default_factory=Optimisation)
    """How the gradient changes the weights."""
    validation: Validation = dataclasses.field(default_factory=Validation)
    """How the validation text is read, and how often."""
    log: Logging = dataclasses.field(default_factory=Logging)
    """Logs and measurements."""
    faults: Faults = dataclasses.field(default_factory=Faults)
    """Checkpoints, and the reaction to failures."""
    devices: Devices = dataclasses.field(default_factory=Devices)
    """The devices and processes of the computation."""
    seed: int = 0
    """Seed of the initial weights, the dropout masks and the probes of the penalty."""

    def __post_init__(self) -> None:
        check_fields(self)
        finite(self)
        check_at_least(self, seed=0)
        at_most(self, LARGEST_SEED, "seed", advice="try 0")
        batch_size, parts = self.batches.batch_size, self.devices.accumulate
        if batch_size % parts:
            raise ValueError(
                f"Training(batch_size={batch_size}, accumulate={parts}): the parts of a batch have equal sizes; give "
                "an accumulate that divides the batch size, or 1."
            )
        if self.devices.parallel == "fsdp" and self.optimisation.optimiser == "asgd":
            raise ValueError(
                "Training(parallel='fsdp', optimiser='asgd'): averaged weights cannot be sharded; give parallel='ddp'."
            )
        length, overlap = self.evaluation["segment_length"], self.evaluation["overlap"]
        if overlap >= length:  # otherwise noticed only at the first validation
            raise ValueError(too_long("eval_overlap", overlap, length, of="Training"))

    @property
    def evaluation(self) -> dict[str, Any]:
        """The arguments of ``evaluate`` for a validation: batch_size, segment_length and overlap."""
        batches, validation = self.batches, self.validation
        return {
            "batch_size": validation.eval_batch_size,
            "segment_length": validation.eval_segment_length or batches.segment_length,
            "overlap": batches.overlap if validation.eval_overlap is None else validation.eval_overlap,
        }

    def changed(self, **settings: Any) -> Training:
        """A copy with other settings, named without their group: ``training.changed(batch_size=16, seed=1)``.

        Raises:
            TypeError: there is no such setting; suggests similar names.
        """
        groups = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        home = {
            setting.name: name
            for name, group in groups.items()
            if dataclasses.is_dataclass(group)
            for setting in dataclasses.fields(group)
        }
        wanted: dict[str, Any] = {}
        for name, value in settings.items():
            if name in groups:
                wanted[name] = value
            elif name not in home:
                raise TypeError(f"Training has no setting {name!r}; {nearest_or_all(name, [*home, *groups])}")
        for name, group in groups.items():
            mine = {key: value for key, value in settings.items() if home.get(key) == name}
            if mine:
                wanted[name] = dataclasses.replace(wanted.get(name, group), **mine)
        return dataclasses.replace(self, **wanted)
