"""Tensors: the named tensors of a published file, and which of them have been used."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from equilibria.errors import EquilibriaError


class ConversionError(EquilibriaError, ValueError):
    """A file cannot be converted; the message says why, and what to do."""


class Tensors:
    """The named tensors of a file. ``take`` marks a tensor as used, so that ``rest`` are the unread ones.

    Args:
        tensors: by name; a "module." in front of a name, from DataParallel, is removed.
        source: the name of the file, for errors.
    """

    def __init__(self, tensors: Mapping[str, Tensor], *, source: str) -> None:
        self._tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
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

    def look(self, name: str) -> Tensor:
        """The tensor, without marking it.

        Raises:
            ConversionError: there is no such tensor.
        """
        if name not in self._tensors:
            raise ConversionError(
                f"{self.source} has no tensor {name!r}, which its format has; was it cut, or saved by other code?"
            )
        return self._tensors[name]

    def take(self, name: str) -> Tensor:
        """The tensor in float32, marked as used."""
        tensor = self.look(name)
        self._used.add(name)
        return tensor.detach().to(torch.float32)

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
        tied, origin = self.take(name), self.look(other).to(torch.float32)
        if not torch.equal(tied, origin):
            raise ConversionError(
                f"{self.source}: {name} and {other} are tied in the authors' code and differ in this file, so their "
                "tie was broken, as by .to() or .double() before a training went on, or they were trained untied; "
                "this library has one tensor for both, so take a file whose tie is whole."
            )


def read(path: Path) -> Tensors:
    """The tensors of a file that ``torch.save(model.state_dict(), path)`` has written, by any version of PyTorch.

    Nothing but tensors and plain values is unpickled, so no code of the file runs.

    Raises:
        ConversionError: the file holds something else, such as a whole pickled module.
    """
    with path.open("rb") as file:
        if not file.read(4).startswith((b"PK", b"\x80")):  # a zip archive, or a pickle of older versions
            raise ConversionError(f"{path} is not a file that torch.save has written.")
    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ConversionError(
            f"{path} holds a pickled module or other objects, and unpickling these would run code from the file; load "
            "it with the authors' code, where you trust it, and save its weights: torch.save(model.state_dict(), "
            "'weights.pth')."
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        raise ConversionError(f"{path} is not a file that torch.save has written ({reason}).") from None
    if not isinstance(found, Mapping) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        kind = "an optimiser's state" if isinstance(found, Mapping) and "param_groups" in found else "other values"
        raise ConversionError(
            f"{path} holds {kind}, and a state dict holds named tensors; name the file that torch.save(model"
            ".state_dict(), …) has written."
        )
    return Tensors(found, source=str(path))
