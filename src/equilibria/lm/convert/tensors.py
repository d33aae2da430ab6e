"""Tensors: the named tensors of a published file, and which of them have been used."""

from __future__ import annotations

import itertools
import pickle
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from equilibria.errors import EquilibriaError
from equilibria.lm.paths import path_of


class ConversionError(EquilibriaError, ValueError):
    """A file cannot be converted; the message says why, and what to do."""


class Tensors:
    """The named tensors of a file. ``take`` marks a tensor as used, so that ``rest`` are the unread ones.

    Args:
        tensors: by name; what DataParallel, DistributedDataParallel, torch.compile and checkpointing add is removed.
        source: the name of the file, for errors.

    Raises:
        ConversionError: two names are the same without it.
    """

    def __init__(self, tensors: Mapping[str, Tensor], *, source: str) -> None:
        self._tensors: dict[str, Tensor] = {}
        origin: dict[str, str] = {}
        for name, tensor in tensors.items():
            bare = _unwrapped(name)
            if bare in origin:
                raise ConversionError(
                    f"{source} holds both {origin[bare]} and {name}, and only one of them can be the model's; keep the "
                    "names that belong together, and save those."
                )
            self._tensors[bare], origin[bare] = tensor, name
        self.source = source
        self._used: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def names(self) -> list[str]:
        """All names."""
        return list(self._tensors)

    def count(self, name: str) -> int:
        """The number of tensors whose names are ``name`` with 0, 1, 2, … in place of ``{}``."""
        return next(index for index in itertools.count() if name.format(index) not in self)

    def look(self, name: str, *, axes: tuple[int, ...] = ()) -> Tensor:
        """The tensor, without marking it.

        Args:
            name: its name.
            axes: the numbers of axes that it may have; empty for any.

        Raises:
            ConversionError: there is no such tensor, or it has another number of axes.
        """
        if name not in self._tensors:
            raise ConversionError(
                f"{self.source} has no tensor {name!r}, which its format has; was it cut, or saved by other code?"
            )
        tensor = self._tensors[name]
        if axes and tensor.ndim not in axes:
            raise ConversionError(
                f"{self.source} gives {name} the shape {tuple(tensor.shape)}, and in its format it has "
                f"{' or '.join(map(str, axes))} axes; it was saved by a changed code."
            )
        return tensor

    def take(self, name: str, *, axes: tuple[int, ...] = ()) -> Tensor:
        """The tensor in float32, marked as used; the arguments are those of ``look``.

        Raises:
            ConversionError: as ``look``, or its numbers are no weights: not dense and real, or not finite in float32.
        """
        tensor = self.look(name, axes=axes).detach()
        if not tensor.is_floating_point() or tensor.layout != torch.strided or tensor.is_meta:
            kind = "no values" if tensor.is_meta else f"{tensor.dtype} in the layout {tensor.layout}"
            raise ConversionError(
                f"{self.source}: {name} has {kind}, and weights are dense tensors of real numbers, such as "
                "torch.float32; save the state dict of the model that was trained, not of a quantised or empty one."
            )
        weight = tensor.to(torch.float32)
        if not weight.isfinite().all():
            raise ConversionError(
                f"{self.source}: {name} has numbers that are NaN or infinite in float32, so its model predicts "
                "nothing; take a checkpoint from before its training failed."
            )
        self._used.add(name)
        return weight

    def joined(self, others: Tensors) -> Tensors:
        """The tensors of both files.

        Raises:
            ConversionError: both have a tensor of the same name.
        """
        if common := sorted(self._tensors.keys() & others._tensors.keys()):
            raise ConversionError(
                f"{self.source} and {others.source} both hold {common[0]}; name the model's state dict first, and that "
                "of its loss with --criterion."
            )
        return Tensors({**self._tensors, **others._tensors}, source=self.source)

    def check_computed(self, name: str, expected: Tensor) -> None:
        """Mark ``name``, which is computed here instead of read; a file without it is as good.

        Raises:
            ConversionError: the file has other values than ``expected``.
        """
        if name not in self:
            return
        have = self.take(name)
        if have.shape != expected.shape or not torch.allclose(have, expected, rtol=1e-2):  # bfloat16 rounds by 4e-3
            raise ConversionError(
                f"{self.source}: {name} is not what its code computes, and this library computes the same; it was "
                "saved by a changed code, and would be another model here."
            )

    def skip(self, prefixes: Iterable[str]) -> None:
        """Mark all tensors whose names begin with one of the prefixes: copies, and what is computed again."""
        beginnings = tuple(prefixes)
        self._used |= {name for name in self._tensors if name.startswith(beginnings)}

    def rest(self) -> list[str]:
        """The names of the tensors that have not been used."""
        return [name for name in self._tensors if name not in self._used]

    def check_same(self, name: str, other: str) -> None:
        """Mark ``name``, which the authors' code ties to ``other``.

        Raises:
            ConversionError: the two tensors differ.
        """
        tied, origin = self.take(name), self.take(other)
        if not torch.equal(tied, origin):
            raise ConversionError(
                f"{self.source}: {name} and {other} are tied in the authors' code and differ in this file, so their "
                "tie was broken, as by .to() or .double() before a training went on, or they were trained untied; "
                "this library has one tensor for both, so take a file whose tie is whole."
            )


_COMPILED = re.compile(r"(?<![^.])(_orig_mod|_checkpoint_wrapped_module)\.")
"""An addition of torch.compile or checkpoint_wrapper to the names below a module, anywhere in the model."""


def _unwrapped(name: str) -> str:
    """The name in the plain model: wrappers of parts are removed anywhere, and those of the whole, in any nesting."""
    name = _COMPILED.sub("", name)
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name


def read(path: Path | str) -> Tensors:
    """The tensors of a file that ``torch.save(model.state_dict(), path)`` has written, by any version of PyTorch.

    Nothing but tensors and plain values is unpickled, so no code of the file runs.

    Raises:
        ConversionError: the file holds something else, such as a whole pickled module.
    """
    path = path_of("read", path=path)
    with path.open("rb") as file:
        start = file.read(9)
    if not start.startswith((b"PK", b"\x80")):  # a zip archive, or a pickle of older versions
        # A safetensors file begins with a number of 8 bytes, the length of the JSON object that follows.
        how = "torch.save(safetensors.torch.load_file(…), …) makes one of safetensors" if start[8:] == b"{" else ""
        raise ConversionError(f"{path} is not a file that torch.save has written{how and f'; {how}'}.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of TorchScript, which is refused below
            found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ConversionError(f"{path} holds a pickled module or other objects, and unpickling these {_CODE}") from None
    except (OSError, *_RAISED) as error:
        if "TorchScript" in str(error):
            raise ConversionError(f"{path} holds a TorchScript module, and loading it {_CODE}") from None
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        raise ConversionError(f"{path} is not a file that torch.save has written, or was cut ({reason}).") from None
    if not _is_state(found):
        raise ConversionError(
            f"{path} holds {_content(found)}, and a state dict holds named tensors; name the file that torch.save(model"
            ".state_dict(), …) has written."
        )
    return Tensors(found, source=str(path))


_CODE = (
    "would run code from the file; load it with the authors' code, where you trust it, and save its "
    "weights: torch.save(model.state_dict(), 'weights.pth')."
)
_RAISED = (RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError, IndexError)
"""Errors that torch.load raises for a file that it did not write."""


def _is_state(found: Any) -> bool:
    """True for named tensors."""
    return (
        isinstance(found, Mapping)
        and bool(found)
        and all(isinstance(name, str) and isinstance(value, Tensor) for name, value in found.items())
    )


def _content(found: Any) -> str:
    """The content, in words, of a file that is no state dict."""
    if isinstance(found, Mapping) and "param_groups" in found:
        return "an optimiser's state"
    inside = [name for name, value in found.items() if _is_state(value)] if isinstance(found, Mapping) else []
    return f"other values around a state dict, which is its entry {inside[0]!r}" if inside else "other values"
