"""Reports of failed solves: a warning, an error, or nothing.

On a GPU the flags of a solve are read later, at the next solve, backward pass or exit, so that the host need not wait
for the device. Only ``on_failure="raise"`` waits.
"""

from __future__ import annotations

import atexit
import sys
import warnings
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import jaxtyping
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from equilibria.core.diagnosis import FORWARD, Message, Solve, diagnosis
from equilibria.core.solve import Solution
from equilibria.core.stop import Stop
from equilibria.errors import EquilibriaError
from equilibria.torch_private import is_batched

OnFailure = Literal["warn", "raise", "ignore"]
"""The reaction to a solve that does not converge."""
WAYS = ("warn", "raise", "ignore")


class ConvergenceWarning(UserWarning):
    """A forward or backward solve failed, and its result cannot be trusted.

    The message names the solve, the likeliest cause and what to try; later failures of the same kind at the same line
    of the caller give one short sentence each.
    """


class ConvergenceError(EquilibriaError, RuntimeError):
    """The message of a ``ConvergenceWarning``, raised as an error because ``on_failure`` is "raise"."""


def report(solution: Solution, stop: Stop, on_failure: OnFailure, *, of: Solve = FORWARD) -> None:
    """Report the samples of ``solution`` that did not converge; inside vmap, where no value can be read, do nothing.

    Args:
        solution: the result of the solve.
        stop: the stop of the solve; without tolerance it was a network of fixed depth, which cannot fail.
        on_failure: warn, raise or ignore.
        of: which solve it was, for the message.
    """
    if is_heard(stop, on_failure) and not is_batched():
        tell(~solution.converged, lambda: diagnosis(solution, stop, of), on_failure)


def is_heard(stop: Stop, on_failure: OnFailure) -> bool:
    """True if a failed solve with this stop is reported; without a tolerance a solve cannot fail."""
    return stop.has_tolerance and on_failure != "ignore"


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
    while _pending and (wait or _pending[0][1].query()):
        flag, event, message = _pending.popleft()
        event.synchronize()
        if flag:
            _speak(message(), "warn")


_pending: deque[tuple[Tensor, torch.cuda.Event, Callable[[], Message]]] = deque(maxlen=64)
atexit.register(settle, wait=True)


def _speak(message: Message, on_failure: OnFailure) -> None:
    if on_failure == "raise":
        raise ConvergenceError(str(message))
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OWN):
        frame, level = frame.f_back, level + 1
    advised = message.kind, frame.f_code.co_filename, frame.f_lineno
    warnings.warn(f"{message.what}." if advised in ADVISED else str(message), ConvergenceWarning, stacklevel=level)
    ADVISED.add(advised)


ADVISED: set[tuple[str, str, int]] = set()
"""The kinds of failure, with file and line of the caller, for which a warning has already given its advice."""

_OWN = (*(str(Path(path).parent) for path in (torch.__file__, jaxtyping.__file__)), str(Path(__file__).parents[1]), "<")
"""Prefixes of files that are not the user's: a warning names the first line outside them."""


COUPLED = (
    "Either f mixes the samples of the batch (attention over the batch, batch norm in training, a graph whose nodes "
    "are the batch axis): pass coupled=True. Or f does not give the same bits twice (dropout inside it): draw "
    "its masks before the solve."
)
RANDOM = "f does not give the same bits twice (dropout inside it?): draw what is random before the solve."


def check_repeats(
    change: Float[Tensor, " B"], stop: Stop, on_failure: OnFailure, *, eps: float, coupled: bool, of: Solve
) -> None:
    """Report an f whose value has changed when it is evaluated once more at the end of a solve.

    The check is nearly free. It detects an f that mixes samples without ``coupled=True``, or that draws random numbers.

    Args:
        change: the change of the value, relative to its norm; NaN for samples that are not finite anyway.
        stop: the stop of the solve; a change of rtol/10 is allowed.
        on_failure: warn, raise or ignore.
        eps: the rounding unit of f; a change of 30·eps is allowed on top.
        coupled: True if the samples are solved as one problem.
        of: which solve it was, for the message.
    """
    differs = change > 0.1 * stop.rtol + 30 * eps

    def message() -> Message:
        worst = float(torch.where(differs, change, 0.0).max())
        what = (
            f"{of.name}: f was evaluated once more at the end, and its value has changed in {int(differs.sum())} of "
            f"{len(differs)} samples, by up to {worst:.1e} of its norm, so the result is wrong by about that much"
        )
        advice = RANDOM if coupled else COUPLED
        return Message(what, advice, kind=f"{of.name}, {advice}")

    tell(differs, message, on_failure)
