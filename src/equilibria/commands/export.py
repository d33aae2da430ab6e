"""`equilibria export RUN`: the weights of a run as one safetensors file, whatever wrote its checkpoints."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from equilibria.commands.arguments import Run as Folder
from equilibria.commands.arguments import found, parse
from equilibria.errors import UsageError
from equilibria.lm.report.visible import visible
from equilibria.lm.runs.files import check_own, discard
from equilibria.lm.runs.pieces import whole
from equilibria.lm.runs.run import Run, Which
from equilibria.lm.runs.shipped import check_writable


@dataclasses.dataclass(frozen=True)
class Options:
    """Write the weights of a run, by name, as one safetensors file, with experiment.json and the step as its metadata.

    `safetensors.torch.load_file` reads it, and so does every other library of that format.
    """

    run: Folder
    """The folder that `equilibria train` has written, finished or not, by one process or by many."""
    out: Path | None = None
    """The file; None for RUN/model.safetensors. It is replaced if it exists."""
    checkpoint: Which = "best"
    """"best", by its validation, or "last"."""


def main(arguments: Sequence[str]) -> int:
    """Write the file and say where it is."""
    from safetensors.torch import save_file

    options = parse(Options, arguments, verb="export")
    run = Run.open(found(options.run))
    stored = run.chosen(options.checkpoint)
    target = _target(options, run)
    metadata = {"format": "pt", "step": str(stored.step), "experiment": json.dumps(run.stored())}
    beside = target.with_name(f".{target.name}.new")
    target.parent.mkdir(parents=True, exist_ok=True)
    discard(beside)
    try:
        tensors = {name: whole(tensor).contiguous() for name, tensor in stored.model.items()}
        save_file(tensors, beside, metadata=metadata)
        beside.replace(target)
    finally:
        discard(beside)
    count = sum(tensor.numel() for tensor in tensors.values())
    print(visible(f"{target}: {count:,} weights of step {stored.step:,}"))
    return 0


def _target(options: Options, run: Run) -> Path:
    """The file to write.

    Raises:
        UsageError: something else than a file has its name, such as a folder or a device.
    """
    if options.out is None:
        check_writable(run.path, advice="name the file to write with --out.")
        check_own(run.path / "model.safetensors")
        return run.path / "model.safetensors"
    target = options.out
    if target.name in ("", "..") or (target.exists() and not target.is_file()):
        raise UsageError(f"--out {str(target)!r} is no file that can be written; name one, such as model.safetensors.")
    return target
