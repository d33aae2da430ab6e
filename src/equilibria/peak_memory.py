"""PeakMemory: the peak memory of a piece of code."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, UntypedStorage

from equilibria.torch_private import Operations, storage_key, tree_leaves


class PeakMemory:
    """A context manager that measures the peak of live tensor memory, in bytes, relative to its value at entry.

    On the CPU it counts the storages that operators return until they are freed; temporary memory inside an operator is
    not counted. On a GPU it uses ``torch.cuda.max_memory_allocated``.

    ```python
    with PeakMemory() as memory:
        model(tokens, targets).nll.mean().backward()
    print(memory.peak)
    ```

    Args:
        device: the device whose memory is measured.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self._watch = _Watch()
        self._entry = 0

    def __enter__(self) -> PeakMemory:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            self._entry = torch.cuda.memory_allocated(self._device)
        else:
            self._watch.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._device.type != "cuda":
            self._watch.__exit__(*error)

    @property
    def peak(self) -> int:
        """The peak so far, in bytes above the value at entry."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._entry
        return self._watch.peak


class _Watch(Operations):
    """Counts the bytes of each storage that an operator returns and that is not the storage of an earlier tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak = 0, 0
        self._known: dict[int, weakref.ref[UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for storage in _storages((args, kwargs)):
            self._note(storage, size=0)  # existed before entry, or is counted already
        out = func(*args, **(kwargs or {}))
        for storage in _storages(out):
            self._note(storage, size=storage.nbytes())
        self.peak = max(self.peak, self.live)
        return out

    def _note(self, storage: UntypedStorage, *, size: int) -> None:
        key = storage_key(storage)
        if key not in self._known:
            self._known[key] = weakref.ref(storage, lambda _: self._forget(key, size=size))
            self.live += size

    def _forget(self, key: int, *, size: int) -> None:
        self.live -= size
        del self._known[key]


def _storages(tree: Any) -> Iterable[UntypedStorage]:
    return (leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
