"""States: trees of tensors whose leaves have the batch as first axis, and their flat form ``[B N]``.

Solvers see a state as one matrix with a row per sample; ``Layout`` packs and unpacks it. Where f couples the samples,
the whole state is one problem, and its matrix has one row.

Letters: B batch, N flattened state; B is 1 in a matrix of coupled samples.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from equilibria.core.trees import DifferentTrees, in_order_of, inverse, memory_order
from equilibria.torch_private import TreeSpec, keystr, tree_flatten, tree_flatten_with_path, tree_leaves, tree_unflatten

State = Any
"""A tensor ``[B *shape]``, or a dict, tuple, named tuple or list of states, nested to any depth.

Leaves are real and floating, lie on one device and have one batch size; their shapes and dtypes may differ. Where f
couples the samples, the leaves may have any shape.
"""


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """One tensor of a state, described without its batch axis."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    order: tuple[int, ...]
    """The axes in the order in which they lie in memory, the batch first."""
    size: int
    """Number of entries per row."""
    plain: bool
    """True if the tensor lies in memory in the order of its axes."""
    coupled: bool
    """True if the tensor is one row and has no batch axis."""

    @classmethod
    def of(cls, tensor: Tensor, *, coupled: bool) -> _Leaf:
        rows = tensor[None] if coupled else tensor
        own = tuple(range(rows.ndim))
        axes = own if rows.is_contiguous() else (0, *memory_order(rows, range(1, rows.ndim)))
        order = axes if axes != own and rows.permute(axes).is_contiguous() else own
        shape = tuple(rows.shape[1:])
        return cls(
            shape=shape,
            dtype=tensor.dtype,
            order=order,
            size=math.prod(shape),
            plain=order == own,
            coupled=coupled,
        )

    def flat(self, tensor: Tensor, dtype: torch.dtype) -> Float[Tensor, "B N"]:
        """The tensor as rows in ``dtype``: a view where dtype and memory order allow it."""
        if self.coupled:
            tensor = tensor[None]
        if not self.plain:
            tensor = tensor.permute(self.order)
        rows = tensor.reshape(tensor.shape[0], self.size)
        return rows if rows.dtype == dtype else rows.to(dtype)

    def shaped(self, rows: Float[Tensor, "B N"]) -> Tensor:
        """The reverse of ``flat``, in the leaf's own dtype."""
        if rows.dtype != self.dtype:
            rows = rows.to(self.dtype)
        if self.plain:
            tensor = rows.view(rows.shape[0], *self.shape)
        else:
            lying = rows.view(len(rows), *(self.shape[axis - 1] for axis in self.order[1:]))
            tensor = lying.permute(inverse(self.order))
        return tensor[0] if self.coupled else tensor


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """How the leaves of a state lie side by side in one row per sample."""

    leaves: tuple[_Leaf, ...]
    spec: TreeSpec
    device: torch.device
    dtype: torch.dtype
    """The dtype of the rows: float64 if a leaf has it, else float32."""
    single: bool
    """True if the state is one tensor and not a tree."""
    exact: bool
    """True if every leaf has the dtype of the rows, so that unpacking rounds nothing."""
    coupled: bool = False
    """True if the whole state is one row."""

    @classmethod
    def of(cls, z0: State, *, coupled: bool = False) -> Layout:
        """The layout of the state ``z0``.

        Args:
            z0: the state.
            coupled: f mixes the samples, so that the whole state is one row, and its leaves may have any shape.

        Raises:
            TypeError: a leaf is not a real floating tensor.
            ValueError: a leaf has no batch axis, a sample is empty, or the leaves differ in batch size or device.
        """
        tensors, spec = tree_flatten(z0)
        _check_leaves(z0, tensors, coupled=coupled)
        dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
        return cls(
            leaves=tuple(_Leaf.of(tensor, coupled=coupled) for tensor in tensors),
            spec=spec,
            device=tensors[0].device,
            dtype=dtype,
            single=isinstance(z0, Tensor),
            exact=all(t.dtype == dtype for t in tensors),
            coupled=coupled,
        )

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of entries per row of each leaf; they add up to N."""
        return tuple(leaf.size for leaf in self.leaves)

    def widened(self) -> Layout:
        """The layout of the same state with every leaf in the dtype of the rows."""
        leaves = tuple(dataclasses.replace(leaf, dtype=self.dtype) for leaf in self.leaves)
        return dataclasses.replace(self, leaves=leaves, exact=True)

    def divisible(self) -> Layout:
        """The layout of a batch of such states, in which each row, coupled or not, is one sample."""
        leaves = tuple(dataclasses.replace(leaf, coupled=False) for leaf in self.leaves)
        return dataclasses.replace(self, leaves=leaves, coupled=False)

    def pack(self, z: State) -> Float[Tensor, "B N"]:
        """The state as rows in ``dtype``; a single leaf is a view where its dtype and memory order allow."""
        if self.single:
            return self.leaves[0].flat(z, self.dtype)
        parts = [leaf.flat(t, self.dtype) for leaf, t in zip(self.leaves, tree_leaves(z), strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def unpack(self, flat: Float[Tensor, "B N"]) -> State:
        """The state that ``flat`` holds; a single leaf is a view if it has the dtype of the rows."""
        if self.single:
            return self.leaves[0].shaped(flat)
        pieces = zip(self.leaves, flat.split(self.sizes, dim=1), strict=True)
        return tree_unflatten([leaf.shaped(piece.contiguous()) for leaf, piece in pieces], self.spec)

    def aligned(self, value: Any) -> State:
        """The value of f with the entries of its dicts in the order of z0.

        Raises:
            TypeError: its structure differs from that of z0.
        """
        if self.single and isinstance(value, Tensor):
            return value
        leaves, spec = tree_flatten(value)
        if spec == self.spec and all(isinstance(leaf, Tensor) for leaf in leaves):
            return value
        try:
            return in_order_of(tree_unflatten(range(len(self.leaves)), self.spec), value)
        except DifferentTrees:
            raise TypeError(
                f"f returned {described(value, coupled=self.coupled)}, and the state is {self.described()}; f must "
                "return a state that is built like z0, with the same keys and as many tensors."
            ) from None

    def cast(self, value: State) -> State:
        """The state with every leaf in its own dtype, since autocast may have changed it."""
        if self.single:
            return value.to(self.leaves[0].dtype)
        tensors = tree_leaves(value)
        cast = [tensor.to(leaf.dtype) for leaf, tensor in zip(self.leaves, tensors, strict=True)]
        return tree_unflatten(cast, self.spec)

    def dtypes(self) -> str:
        """The dtypes of the leaves, for messages."""
        return " and ".join(sorted({str(leaf.dtype).removeprefix("torch.") for leaf in self.leaves}))

    def described(self) -> str:
        """The structure of the state, with the shapes of its leaves, for messages."""
        return described(tree_unflatten([_Dims(leaf.shape, leaf.coupled) for leaf in self.leaves], self.spec))


def described(value: Any, *, coupled: bool = False) -> str:
    """The structure of a value in one line: {'a': (B, 3), 'b': (B, 2)}."""
    if isinstance(value, Tensor):
        return str(_Dims(tuple(value.shape if coupled else value.shape[1:]), coupled))
    if isinstance(value, dict):
        parts = (f"{key!r}: {described(part, coupled=coupled)}" for key, part in value.items())
        return "{" + ", ".join(parts) + "}"
    if isinstance(value, tuple | list):
        ends = "[]" if isinstance(value, list) else "()"
        return ends[0] + ", ".join(described(part, coupled=coupled) for part in value) + ends[1]
    return str(value) if isinstance(value, _Dims) else type(value).__name__


@dataclasses.dataclass(frozen=True)
class _Dims:
    """The shape of a leaf, as messages show it."""

    shape: tuple[int, ...]
    coupled: bool = False

    def __str__(self) -> str:
        return str(self.shape) if self.coupled else f"({', '.join(['B', *map(str, self.shape)])})"


def check_finite(z0: State, *, coupled: bool = False) -> None:
    """Raise a ValueError that names the samples of a start that are NaN or infinite, or on the meta device."""
    tensors = [z0.detach()] if isinstance(z0, Tensor) else [tensor.detach() for tensor in tree_leaves(z0)]
    if any(tensor.is_meta for tensor in tensors):
        raise ValueError(
            "z0 is on the meta device, whose tensors hold no numbers, and a solve decides by numbers; put the model "
            "and its inputs on a real device first, model.to_empty(device=…)."
        )
    if all(math.isfinite(tensor.sum()) or bool(torch.isfinite(tensor).all()) for tensor in tensors):
        return
    if coupled:
        bad = sum(int((~torch.isfinite(tensor)).sum()) for tensor in tensors)
        total = sum(tensor.numel() for tensor in tensors)
        raise ValueError(f"z0 is NaN or infinite in {bad} of its {total} numbers; start from finite values.")
    batch = len(tensors[0])
    finite = torch.stack([torch.isfinite(t.reshape(batch, -1)).all(dim=1) for t in tensors]).all(dim=0)
    bad = (~finite).nonzero().flatten().tolist()
    raise ValueError(f"z0 is NaN or infinite in {len(bad)} of {batch} samples ({bad[:8]}); start from finite values.")


def _check_leaves(z0: State, tensors: Sequence[Any], *, coupled: bool) -> None:
    if not tensors:
        raise ValueError(f"z0 is {z0!r}, which holds no tensor; a state has at least one.")
    for path, leaf in [((), z0)] if isinstance(z0, Tensor) else tree_flatten_with_path(z0)[0]:
        _check_leaf(f"z0{keystr(path)}", leaf, coupled=coupled)
    devices = {str(tensor.device) for tensor in tensors}
    if len(devices) > 1:
        raise ValueError(f"the leaves of z0 are on {', '.join(sorted(devices))}; put all of them on one device.")
    if not coupled:
        _check_batch(tensors)


def _check_batch(tensors: Sequence[Tensor]) -> None:
    if max(tensor.ndim for tensor in tensors) < 2:
        raise ValueError(
            f"z0 has shape {' and '.join(str(tuple(t.shape)) for t in tensors)}; a state has a batch axis first and at "
            "least one axis after it, (B, *state): try z0[None] or coupled=True for one problem, z0[:, None] for a "
            "batch of scalar ones."
        )
    batches = {len(tensor) for tensor in tensors}
    if len(batches) > 1:
        raise ValueError(
            f"the leaves of z0 hold {', '.join(map(str, sorted(batches)))} samples; all leaves have the same batch "
            "size, as their first axis. If they form one problem together, pass coupled=True."
        )


def is_distributed(tensor: Tensor) -> bool:
    """True for a DTensor, whose parts lie on several processes."""
    return hasattr(tensor, "full_tensor")


def _check_leaf(name: str, leaf: Any, *, coupled: bool) -> None:
    if not isinstance(leaf, Tensor):
        raise TypeError(
            f"{name} is {type(leaf).__name__}; a state is one tensor (B, *state), or a dict, tuple or list of such "
            "tensors."
        )
    if leaf.is_nested or leaf.layout is not torch.strided:
        kind = "a nested tensor: pad its samples to one shape" if leaf.is_nested else f"{leaf.layout}: give .to_dense()"
        raise TypeError(f"{name} is {kind}; a state is dense.")
    if is_distributed(leaf):
        raise TypeError(
            f"{name} is a DTensor, and a solve decides by numbers of its own process: give z0.full_tensor(), or the "
            "samples of this process alone, z0.to_local(), and inputs of the same kind."
        )
    if leaf.ndim < 1 and not coupled:
        raise ValueError(
            f"{name} is a single number; a state has a batch axis first: try z0.reshape(1, 1), or coupled=True."
        )
    if leaf.is_complex():
        raise TypeError(
            f"{name} has dtype {leaf.dtype}; a state is real: give torch.view_as_real(z0) and let f convert it with "
            "torch.view_as_complex, which keeps gradients."
        )
    if leaf.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(
            f"{name} has dtype {leaf.dtype}; a state is real and floating: float64, float32, bfloat16, float16."
        )
    if not coupled and 0 in leaf.shape[1:]:
        raise ValueError(
            f"{name} has shape {tuple(leaf.shape)}, so that a sample is empty; give every sample at least one number."
        )
