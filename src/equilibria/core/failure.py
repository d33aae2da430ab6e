"""Reports of failed solves: a warning, an error, or nothing.

On a GPU the flags of a solve are read later, at the next solve, backward pass or exit, so that the host need not wait
for the device. Only ``on_failure="raise"`` waits.
"""

from __future__ import annotations

import atexit
import threading
import warnings
from collections import deque
from collections.abc import Callable

import torch
from jaxtyping import Bool
from torch import Tensor

from equilibria.core.caller import caller
from equilibria.core.diagnosis import FORWARD, Message, Solve, diagnosis
from equilibria.core.maps import rounding_unit
from equilibria.core.solve import Solution
from equilibria.core.stop import OnFailure, Stop
from equilibria.core.trees import tensors_in
from equilibria.errors import EquilibriaError
from equilibria.torch_private import is_batched


class ConvergenceWarning(UserWarning):
    """A forward or backward solve failed, and its result cannot be trusted.

    The message names the solve, the likeliest cause and what to try; later failures of the same kind at the same line
    of the caller give one short sentence each.
    """


class ConvergenceError(EquilibriaError, RuntimeError):
    """The message of a ``ConvergenceWarning``, raised as an error because ``on_failure`` is "raise"."""


def report(
    solution: Solution, stop: Stop, on_failure: OnFailure, *, of: Solve = FORWARD, eps: float | None = None
) -> None:
    """Report the samples of ``solution`` that did not converge; inside vmap, where no value can be read, do nothing.

    Call ``is_heard`` first.

    Args:
        solution: the result of the solve.
        stop: the stop of the solve.
        on_failure: warn, raise or ignore.
        of: which solve it was, for the message.
        eps: the rounding unit of f; None for that of the solution and of autocast now.
    """
    if not is_batched():
        unit = rounding_unit(tensors_in(solution.z)) if eps is None else eps
        tell(~solution.converged, lambda: diagnosis(solution, stop, of, eps=unit), on_failure)


def tell(flags: Bool[Tensor, " B"], message: Callable[[], Message], on_failure: OnFailure) -> None:
    """Warn or raise with ``message()`` if one of ``flags`` is set; on a GPU a warning comes later, an error at once.

    Call ``is_heard`` first: if it is False, the flags need not be computed.
    """
    settle()
    if flags.is_cuda and on_failure == "warn":
        host = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(flags.any(), non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        _pending.append((host, event, message))
    elif flags.any():
        _speak(message(), on_failure)


def settle(*, wait: bool = False) -> None:
    """Issue the warnings of earlier solves on a GPU whose flags have arrived; with ``wait``, of all earlier solves."""
    while (arrived := _arrived(wait=wait)) is not None:
        flag, event, message = arrived
        event.synchronize()
        if flag:
            _speak(message(), "warn")


def _arrived(*, wait: bool) -> tuple[Tensor, torch.cuda.Event, Callable[[], Message]] | None:
    if not _pending:
        return None
    with _lock:  # another thread may take the same one
        return _pending.popleft() if _pending and (wait or _pending[0][1].query()) else None


_lock = threading.Lock()
_pending: deque[tuple[Tensor, torch.cuda.Event, Callable[[], Message]]] = deque(maxlen=64)
atexit.register(settle, wait=True)


def _speak(message: Message, on_failure: OnFailure) -> None:
    if on_failure == "raise":
        raise ConvergenceError(str(message))
    frame, level = caller()
    advised = message.kind, frame.f_code.co_filename, frame.f_lineno
    warnings.warn(f"{message.what}." if advised in ADVISED else str(message), ConvergenceWarning, stacklevel=level)
    ADVISED.add(advised)


ADVISED: set[tuple[str, str, int]] = set()
"""The kinds of failure, with file and line of the caller, for which a warning has already given its advice."""
