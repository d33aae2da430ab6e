"""The tensors that a closure reads, recorded while it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from equilibria.core.trees import map_tensors, tensors_in
from equilibria.torch_private import is_of_transform, outside, transforms


class Constants(TorchFunctionMode):
    """Records the tensors requiring a gradient that f reads. Without a graph, no result of f's own is among them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, Tensor] = {}
        self._complete = False

    def of(self, f: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """f with its first evaluation recorded."""

        def watched(z: Any) -> Any:
            if self._complete:
                return f(z)
            self._complete = True
            with self:
                value = f(z)
            self._record(value)  # a tensor that f returns may never have been an argument
            return value

        return watched

    def _record(self, tree: Any) -> None:
        self.found |= {id(tensor): tensor for tensor in tensors_in(tree) if tensor.requires_grad}

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._record((args, kwargs))
        return func(*args, **(kwargs or {}))


class Unknown(TorchFunctionMode):
    """Records the tensors that f reads but was not given, if they require a gradient or belong to a transform.

    A transform inside f wraps tensors and unwraps results by operations that this mode does not see. So each tensor is
    recorded as it is outside of such transforms. If ``read_by`` finds one, it evaluates f again: a result of f is then
    a new tensor, and a tensor that f closes over is the same one.

    Args:
        given: the tree of tensors that f is given. Results of f's own operations count as given, too.
    """

    def __init__(self, *given: Any) -> None:
        super().__init__()
        self.found: dict[int, Tensor] = {}
        self._depth = transforms()
        self._known = {id(tensor): tensor for tensor in tensors_in(given)}

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in self._outside((args, kwargs or {})):
            concerned = tensor.requires_grad or is_of_transform(tensor)
            if concerned and id(tensor) not in self._known:
                self.found[id(tensor)] = tensor
        value = func(*args, **(kwargs or {}))
        self._known |= {id(tensor): tensor for tensor in self._outside(value)}
        return value

    def _outside(self, tree: Any) -> list[Tensor]:
        return [outside(tensor, self._depth) for tensor in tensors_in(tree)]

    @classmethod
    def read_by(cls, f: Callable[[Any], Any], z: Any, given: Any) -> Tensor | None:
        """A tensor that f(z) reads and neither is given nor makes itself, or None."""
        with cls(z, given) as first:
            f(z)
        if not first.found:
            return None
        with cls(z, given) as second:  # what the first one found still exists, so that no new tensor has its id
            f(z)
        return next((tensor for i, tensor in first.found.items() if i in second.found), None)


class Substitution(TorchFunctionMode):
    """Replaces the constants that f reads by detached leaves, so that their gradients are partial derivatives.

    Captured tensors may depend on each other (memory keys depend on weights). That graph was recorded once, outside f;
    it is backpropagated once, after the reverse pass.

    Args:
        known: the constants as f knows them, which must stay alive, since they are found by their ``id``.
        constants: the same, with the values that the backward pass has checked.
    """

    def __init__(self, known: Sequence[Tensor], constants: Sequence[Tensor]) -> None:
        super().__init__()
        self.leaves = [constant.detach().requires_grad_() for constant in constants]
        self._of = {id(tensor): leaf for tensor, leaf in zip(known, self.leaves, strict=True)}

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = self.replaced((args, kwargs or {}))
        return func(*args, **kwargs)

    def replaced(self, tree: Any) -> Any:
        """The tree with leaves instead of constants; for the value of f too, which may be a constant itself."""
        return map_tensors(lambda tensor: self._of.get(id(tensor), tensor), tree)
