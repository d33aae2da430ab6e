"""The tensors that a closure reads: found in a graph, or watched while the closure runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from equilibria.core.transforms import is_of_transform
from equilibria.core.trees import map_tensors, tensors_in


def leaves_below(values: Sequence[Tensor]) -> Iterator[Tensor]:
    """The leaves that can receive a gradient from one of ``values``, in the order in which they are met."""
    yield from (value for value in values if value.requires_grad and value.is_leaf)
    pending: list[Any] = [value.grad_fn for value in values]
    seen = set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None:
            yield variable
        pending.extend(following for following, _ in node.next_functions)


class Constants(TorchFunctionMode):
    """Finds the tensors with gradient that f reads: without graph, nothing that f itself makes requires one."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, Tensor] = {}
        self._complete = False

    def of(self, f: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """f, watched during its first evaluation."""

        def watched(z: Any) -> Any:
            if self._complete:
                return f(z)
            self._complete = True
            with self:
                return f(z)

        return watched

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tensors_in((args, kwargs or {})):
            if tensor.requires_grad:
                self.found[id(tensor)] = tensor
        return func(*args, **(kwargs or {}))


class Unknown(TorchFunctionMode):
    """Finds the tensors that f reads without having been given them, if a transform or a gradient concerns them.

    Args:
        given: a tree of those that f is given; what is made while f runs is known as well.
    """

    def __init__(self, *given: Any) -> None:
        super().__init__()
        self.found: list[Tensor] = []
        self._known = {id(tensor): tensor for tensor in tensors_in(given)}

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tensors_in((args, kwargs or {})):
            concerned = tensor.requires_grad or is_of_transform(tensor)
            if concerned and id(tensor) not in self._known:
                self.found.append(tensor)
        value = func(*args, **(kwargs or {}))
        self._known |= {id(tensor): tensor for tensor in tensors_in(value)}
        return value


class Substitution(TorchFunctionMode):
    """Gives f other tensors for its constants: leaves, so that their gradients are partial ones.

    Captured tensors may depend on each other (memory keys depend on weights). That graph was recorded once, outside f;
    it is backpropagated once, after the reverse pass.
    """

    def __init__(self, known: tuple[int, ...], constants: Sequence[Tensor]) -> None:
        super().__init__()
        self.leaves = [constant.detach().requires_grad_() for constant in constants]
        self._of = dict(zip(known, self.leaves, strict=True))

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = map_tensors(lambda tensor: self._of.get(id(tensor), tensor), (args, kwargs or {}))
        return func(*args, **kwargs)
