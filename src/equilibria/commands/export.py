"""`equilibria export RUN`: the weights of a run as one safetensors file, or the run as a folder for transformers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from torch import Tensor

from equilibria.commands.arguments import Run as Folder
from equilibria.commands.arguments import found, parse
from equilibria.errors import UsageError
from equilibria.layers.linear import fold
from equilibria.lm.report.visible import visible
from equilibria.lm.runs.files import check_own, discard, errors_of_the_disk
from equilibria.lm.runs.pieces import whole
from equilibria.lm.runs.run import Run, Which
from equilibria.lm.runs.shipped import check_writable
from equilibria.lm.runs.trained import load


@dataclasses.dataclass(frozen=True)
class Options:
    """Write the weights of a run, by name, as one safetensors file, with experiment.json and the step as its metadata.

    `safetensors.torch.load_file` reads it, and so does every other library of that format. With --format hf, write a
    folder that `AutoModelForCausalLM.from_pretrained` reads: weights, configuration, tokenizer, and a model card.
    """

    run: Folder
    """The folder that `equilibria train` has written, finished or not, by one process or by many."""
    out: Path | None = None
    """The file, which is replaced if it exists, or with --format hf the folder, which must be new; None for
    RUN/model.safetensors, or RUN/hf."""
    checkpoint: Which = "best"
    """"best", by its validation, or "last"."""
    format: Literal["safetensors", "hf"] = "safetensors"
    """"safetensors" for the weights in one file, "hf" for a folder for Hugging Face's transformers."""
    fold: bool = False
    """Store normalised weights as the plain matrices that they make, for adapters, quantisation and other code."""


def main(arguments: Sequence[str]) -> int:
    """Write the file or the folder, and say where it is."""
    options = parse(Options, arguments, verb="export")
    run = Run.open(found(options.run))
    return _folder(options, run) if options.format == "hf" else _file(options, run)


def _folder(options: Options, run: Run) -> int:
    """Write a folder for transformers."""
    try:
        from equilibria.hf import export
    except ModuleNotFoundError as error:
        raise UsageError(f'--format hf needs {error.name}: pip install "equilibria[hf]"') from None
    from transformers.utils import logging

    logging.disable_progress_bar()
    if options.out is None:
        check_writable(run.path, advice="name a folder with --out.")
    target = run.path / "hf" if options.out is None else options.out
    written = export(run.path, target, checkpoint=options.checkpoint, fold=options.fold)
    print(visible(f"{target}: {written.model.num_parameters():,} weights of step {written.trained.step:,}"))
    return 0


def _file(options: Options, run: Run) -> int:
    """Write one file of weights."""
    from safetensors.torch import save_file

    stored = run.chosen(options.checkpoint)
    target = _target(options, run)
    metadata = {
        "format": "pt",
        "folded": str(options.fold).lower(),
        "step": str(stored.step),
        "experiment": json.dumps(run.stored()),
    }
    beside = target.with_name(f".{target.name}.new")
    target.parent.mkdir(parents=True, exist_ok=True)
    discard(beside)
    try:
        tensors = {name: whole(tensor).contiguous() for name, tensor in stored.model.items()}
        tensors = _folded(run, options.checkpoint) if options.fold else tensors
        with errors_of_the_disk(target.parent):
            save_file(tensors, beside, metadata=metadata)
            beside.replace(target)
    finally:
        discard(beside)
    count = sum(tensor.numel() for tensor in tensors.values())
    print(visible(f"{target}: {count:,} weights of step {stored.step:,}"))
    return 0


def _folded(run: Run, checkpoint: Which) -> dict[str, Tensor]:
    """The weights of the model with plain matrices."""
    model = load(run.path, checkpoint=checkpoint).model
    fold(model)
    return {name: tensor.contiguous() for name, tensor in model.state_dict().items()}


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
