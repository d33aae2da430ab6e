"""How a solve that fails is heard: a warning, an error, or nothing.

On a GPU the flag of a solve is read later, at the next solve, backward pass or exit, so that the device never waits for
the host; ``on_failure="raise"`` waits.
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

from equilibria.core.solve import Solution
from equilibria.core.stop import Stop
from equilibria.core.transforms import is_batched
from equilibria.errors import EquilibriaError

OnFailure = Literal["warn", "raise", "ignore"]
"""What happens when a solve does not converge."""
WAYS = ("warn", "raise", "ignore")


class ConvergenceWarning(UserWarning):
    """A forward or backward solve failed, and its result cannot be trusted; the message says what to try."""


class ConvergenceError(EquilibriaError, RuntimeError):
    """What ``ConvergenceWarning`` says, raised as an error because ``on_failure="raise"`` asks for it."""


def report(solution: Solution, stop: Stop, on_failure: OnFailure, *, of: str) -> None:
    """Say that samples of ``solution`` did not converge, if some did not; inside vmap nothing can be asked of it.

    Args:
        solution: of the solve.
        stop: its tolerances; without any it was a network of fixed depth, which cannot fail.
        on_failure: warn, raise or ignore.
        of: which solve, for the message.
    """
    if is_heard(stop, on_failure) and not is_batched():
        tell(~solution.converged, lambda: f"{of}: {solution}", on_failure)


def is_heard(stop: Stop, on_failure: OnFailure) -> bool:
    """True if a failure of a solve with this stop is told; without a tolerance a solve cannot fail."""
    return stop.has_tolerance and on_failure != "ignore"


def tell(flags: Bool[Tensor, " B"], message: Callable[[], str], on_failure: OnFailure) -> None:
    """Warn or raise with ``message()`` if one of ``flags`` is set; late on a GPU, where only ``raise`` waits.

    Ask ``is_heard`` first, which spares the work that the flags take.
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
    """Give the warnings of earlier solves on a GPU whose flags have arrived."""
    while _pending and (wait or _pending[0][1].query()):
        flag, event, message = _pending.popleft()
        event.synchronize()
        if flag:
            _speak(message(), "warn")


_pending: deque[tuple[Tensor, torch.cuda.Event, Callable[[], str]]] = deque(maxlen=64)
atexit.register(settle, wait=True)


def _speak(message: str, on_failure: OnFailure) -> None:
    if on_failure == "raise":
        raise ConvergenceError(message)
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OWN):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, ConvergenceWarning, stacklevel=level)


_OWN = (*(str(Path(path).parent) for path in (torch.__file__, jaxtyping.__file__)), str(Path(__file__).parents[1]), "<")
"""Files that are not the user's: the warning names the first line outside them."""


COUPLED = (
    "Either f mixes the samples of the batch (attention over the batch, batch norm in training, a graph whose nodes "
    "are the batch axis): say coupled=True. Or f does not give the same bits twice (dropout inside it): draw the masks "
    "before the solve."
)
RANDOM = "f does not give the same bits twice (dropout inside it?): draw what is random before the solve."


def check_repeats(
    change: Float[Tensor, " B"], stop: Stop, on_failure: OnFailure, *, eps: float, coupled: bool, of: str
) -> None:
    """Say that f, evaluated once more at the end of a solve, has another value there than it had in the solve.

    This is nearly free, and notices an f that mixes samples without saying so, or that draws random numbers.

    Args:
        change: of the value, relative to its norm; NaN for samples that are not finite anyway.
        stop: the tolerances of the solve; a tenth of them is allowed.
        on_failure: warn, raise or ignore.
        eps: rounding of f; 30 of it are allowed.
        coupled: the samples are said to be one problem.
        of: which solve, for the message.
    """
    differs = change > 0.1 * stop.rtol + 30 * eps

    def message() -> str:
        worst = float(torch.where(differs, change, 0.0).max())
        return (
            f"{of}: f was evaluated once more at the end, and its value has changed in {int(differs.sum())} of "
            f"{len(differs)} samples, by up to {worst:.1e} of its norm, so the result is wrong by about that much. "
            f"{RANDOM if coupled else COUPLED}"
        )

    tell(differs, message, on_failure)
