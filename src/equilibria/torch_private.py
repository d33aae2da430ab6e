"""Every private name of PyTorch that this library uses, each behind a function that says what it is for.

PyTorch may change such a name in any release. No other file of the library has one (a test looks for them), so that a
new version of PyTorch is a question about this file alone. Tried with: TRIED.
What to do if a name is gone is the last sentence of its docstring.
"""

from __future__ import annotations

import contextlib
import functools
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import torch
import torch._functorch.config as _functorch_config
from torch import Tensor, UntypedStorage, nn
from torch.autograd import forward_ad
from torch.autograd.function import FunctionCtx
from torch.autograd.graph import Node
from torch.nn.utils import parametrize
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

_P = ParamSpec("_P")
_T = TypeVar("_T")

TRIED = ("2.11.0", "2.13.0", "2.14.1", "2.15.0")
"""The versions of PyTorch with which the tests of the core, the solvers, the gradients and the layers passed."""

_functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]


# ---------------------------------------------------------------- transforms of torch.func and the older vmap


def is_transformed() -> bool:
    """True while a transform of torch.func (grad, vjp, jvp, vmap or a composition) is running.

    Rules that store things in closures then take the functional way. If it goes: always take the functional way.
    """
    return _functorch.peek_interpreter_stack() is not None


def is_in_make_fx() -> bool:
    """True while ``make_fx``, and with it ``torch.func.linearize``, records the operations as a graph without values.

    If it goes: return False; these then end in an error of PyTorch's own.
    """
    tracer = sys.modules.get("torch.fx.experimental.proxy_tensor")  # loading it takes long
    return tracer is not None and tracer.get_proxy_mode() is not None


def is_batched() -> bool:
    """True inside torch.func.vmap, where no decision can depend on a value.

    If it goes: try ``bool(tensor.sum() > 0)`` and catch its error.
    """
    return _count(_functorch.TransformType.Vmap) > 0


def forward_modes() -> int:
    """The number of nested torch.func.jvp that are running; PyTorch returns 0 for two, so they are refused.

    If it goes: refuse torch.func.jvp altogether.
    """
    return _count(_functorch.TransformType.Jvp)


def _count(kind: Any) -> int:
    return sum(level.key() == kind for level in _functorch.get_interpreter_stack() or [])


def is_of_transform(tensor: Tensor) -> bool:
    """True for a tensor that a transform of torch.func tracks, and that f reads without being given it.

    If it goes: the closure cannot be searched; ask for such tensors as operands.
    """
    return _functorch.is_functorch_wrapped_tensor(tensor)


def transforms() -> int:
    """The number of nested transforms of torch.func that are running.

    If it goes: see ``outside``.
    """
    return len(_functorch.get_interpreter_stack() or [])


def outside(tensor: Tensor, depth: int) -> Tensor:
    """The tensor as it is outside of all but the first ``depth`` transforms: what they have wrapped, itself.

    If it goes: return the tensor, and refuse an f that uses torch.func inside a transform.
    """
    while _functorch.maybe_get_level(tensor) > depth:
        tensor = _functorch.get_unwrapped(tensor)
    return tensor


def is_many(cotangent: Tensor) -> bool:
    """True if a backward pass runs for many cotangents at once, under either vmap.

    If it goes: refuse ``is_grads_batched=True``.
    """
    return is_transformed() or is_of_older_vmap(cotangent)


def is_of_older_vmap(tensor: Tensor) -> bool:
    """True for many tensors in one, as ``is_grads_batched=True`` and ``jacobian(vectorize=True)`` make them.

    If it goes: return False; those two then end in an error of PyTorch's own.
    """
    return _functorch.is_legacy_batchedtensor(tensor)


def by_older_vmap(of_all: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """Apply ``of_all`` to a tensor of ``is_grads_batched=True``, unwrapped so that the axis of its copies is first.

    If it goes: refuse ``is_grads_batched=True``.
    """
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    copies = torch._remove_batch_dim(tensor, level, 1, 0)  # pyright: ignore[reportPrivateImportUsage]
    return torch._add_batch_dim(of_all(copies), 0, level)  # pyright: ignore[reportPrivateImportUsage]


# ---------------------------------------------------------------- forward mode


def is_forward_mode() -> bool:
    """True inside ``torch.autograd.forward_ad.dual_level`` and torch.func.jvp.

    If it goes: look for tangents with ``unpack_dual`` at every call.
    """
    return forward_ad._current_level >= 0


def without_forward_mode() -> contextlib.AbstractContextManager[Any]:
    """A context in which operators compute no tangents; what ``torch.no_grad`` is to backward mode.

    If it goes: take the primal of every tensor that f reads, as an operand.
    """
    return forward_ad._set_fwd_grad_enabled(mode=False)


# ---------------------------------------------------------------- the running backward pass


def task() -> int:
    """The number of the running backward pass; -1 if none is running.

    If it goes: count the passes by a callback at the end of each.
    """
    return torch._C._current_graph_task_id()


def is_last() -> bool:
    """True if the running backward pass releases the graph, so that no other can follow.

    If it goes: return False, which keeps the graph of f for as long as the solution lives.
    """
    return not torch._C._autograd._get_current_graph_task_keep_graph()  # pyright: ignore[reportAttributeAccessIssue]


def will_run(node: Node) -> bool:
    """True if the backward pass that is running goes through this node, which is not a leaf.

    It tells ``backward(inputs=…)`` apart. If it goes: return True, which costs products without a use.
    """
    return torch._C._will_engine_execute_node(node)


def is_wanted(node: Any) -> bool:
    """True if the backward pass that is running goes through this node of ``next_functions``, which may be None.

    It is always True for a leaf. If it goes: return ``node is not None``, which costs products without a use.
    """
    return node is not None and (getattr(node, "variable", None) is not None or will_run(node))


def at_the_end(call: Callable[[], None]) -> None:
    """Run ``call`` at the end of the running backward pass; it is dropped if that pass fails.

    If it goes: call ``torch.autograd.graph.register_multi_grad_hook``, whose hook runs once the gradients are there.
    """
    torch.autograd.Variable._execution_engine.queue_callback(call)  # pyright: ignore[reportAttributeAccessIssue]


def hooks_on_saved_tensors() -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]] | None:
    """The innermost pair of active hooks on saved tensors (pack, unpack), such as those of a checkpoint, or None.

    If it goes: return None; a checkpoint is then recomputed once per VJP.
    """
    return torch._C._autograd._top_saved_tensors_default_hooks(False)  # pyright: ignore[reportAttributeAccessIssue]


def tracking_functions() -> list[FunctionCtx]:
    """The contexts of the autograd functions whose forward pass is running, and whose results will have a graph.

    The reentrant checkpoint of PyTorch is one. A function with ``setup_context`` is not found, since its forward pass
    does not know its context. If it goes: return []; results that leave a reentrant checkpoint then lose their graph.
    """
    if torch._C._is_fwd_grad_enabled():  # the forward pass of a function disables both modes
        return []
    found, frame = [], sys._getframe()
    while frame is not None:
        if (code := frame.f_code).co_name == "forward" and code.co_argcount > 0:
            context = frame.f_locals.get(code.co_varnames[0])
            if isinstance(context, FunctionCtx) and context.next_functions:  # pyright: ignore
                found.append(context)
        frame = frame.f_back
    return found


# ---------------------------------------------------------------- operators, tensors, modules and process groups


def product_by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b of matrices of float32 on a CPU, computed by oneDNN, without graph.

    If it goes: ``torch.nn.functional.linear``.
    """
    return torch.ops.mkldnn._linear_pointwise.default(_dense(x), _dense(weight), bias, "none", [], "")


@contextlib.contextmanager
def denormals_are_zero() -> Iterator[None]:
    """Within it, numbers smaller than every normal one (1e-38 in float32) are 0 on the CPU.

    It holds for this thread, and for those that PyTorch starts within it. Products with denormal numbers take Intel's
    processors many times as long as others. PyTorch does not tell its setting, but Python's numbers obey the same one.
    If it goes: ``torch.set_flush_denormal(False)`` at the end.
    """
    before = _LEAST * _ONE == 0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


_LEAST, _ONE = math.ulp(0.0), 1.0


def softmax_backward(g: Tensor, weights: Tensor) -> Tensor:
    """The gradient of the scores from that of their softmax over the last axis, as autograd computes it.

    If it goes: weights · (g − Σ g · weights).
    """
    return torch.ops.aten._softmax_backward_data.default(g, weights, -1, weights.dtype)


def _dense(matrix: Tensor) -> Tensor:
    """The matrix in one piece of memory: a part of a wider one takes oneDNN ten times as long."""
    return matrix if matrix.is_contiguous() or matrix.t().is_contiguous() else matrix.contiguous()


def version(tensor: Tensor) -> int:
    """The number of changes in place that the tensor has seen; an error for tensors of inference mode.

    It notices an f that changes its argument, and weights that an optimiser has moved. If it goes: compare a clone.
    """
    return tensor._version


def storage_key(storage: UntypedStorage) -> int:
    """A number that no other living storage has, also if both are empty.

    If it goes: the address of its data, and no key for an empty one.
    """
    return storage._cdata


def is_traced() -> bool:
    """True while torch.compile, torch.export or torch.jit.trace makes a program, which serves other sizes, too.

    If it goes: ``torch.compiler.is_compiling()`` alone, and sizes decide nothing in what jit.trace may see.
    """
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]


def is_compiled(module: nn.Module) -> bool:
    """True if ``module.compile()`` was called, so that a call runs compiled code.

    If it goes: an option of ``Equilibrium`` that says so.
    """
    return module._compiled_call_impl is not None


def as_written(module: nn.Module) -> Callable[..., Any]:
    """A call of the module with all its hooks, which runs the code of ``forward`` also after ``module.compile()``.

    If it goes: ``module.forward``, and refuse hooks of a compiled module.
    """
    return module._call_impl


def hooks_of_calls(module: nn.Module) -> tuple[list[Callable[..., Any]], list[Callable[..., Any]]]:
    """The hooks of the module's calls, and those of their backward passes. If it goes: return [], []."""
    forward = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    return forward, [*module._backward_pre_hooks.values(), *module._backward_hooks.values()]


def is_replica(module: nn.Module) -> bool:
    """True if ``nn.DataParallel`` made this copy of a module for one call. Its weights are plain tensors.

    If it goes: True for a module without parameters.
    """
    return getattr(module, "_is_replica", False)


@contextlib.contextmanager
def own_parametrizations() -> Iterator[None]:
    """A context with its own cache of ``torch.nn.utils.parametrize.cached()``, so that no weight enters or leaves it.

    Where no cache is enabled, it changes nothing: the cache is one for all threads, and two of them that put back what
    they found could leave the weights of one to the other. If it goes: say in the documentation that a solve inside
    ``cached()`` loses gradients.
    """
    if not parametrize._cache_enabled:
        yield
        return
    outer, parametrize._cache = parametrize._cache, {}
    try:
        yield
    finally:
        parametrize._cache = outer


def without_donated_buffers() -> contextlib.AbstractContextManager[Any]:
    """A context that disables donated buffers: a compiled backward pass then leaves its saved tensors as they are.

    The VJPs of one adjoint solve run it many times. The setting is read when f is compiled and at each backward pass,
    in the thread where that runs. If it goes: linearise again for each VJP.
    """
    return _functorch_config.patch(donated_buffer=False)


def outside_of_graphs(function: Callable[_P, _T], reason: str) -> Callable[_P, _T]:
    """The function, which ``torch.compile`` then runs as it is; with fullgraph=True its error contains ``reason``.

    It does what ``torch.compiler.disable`` does, but does not load torch._dynamo, which takes a second, for those who
    compile nothing. If it goes: that function.
    """
    disabled: Any = None

    def call(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        nonlocal disabled
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if disabled is None:
            disabled = torch.compiler.disable(function, reason=reason)
        return disabled(*args, **kwargs)

    _eval_frame.set_code_exec_strategy(call.__code__, _SKIPPED)
    marked: Any = functools.wraps(function)(call)
    marked._torchdynamo_disable, marked._torchdynamo_disable_msg = True, reason
    return marked


_eval_frame: Any = torch._C._dynamo.eval_frame  # pyright: ignore[reportAttributeAccessIssue]
_SKIPPED = _eval_frame._FrameExecStrategy(_eval_frame._FrameAction.SKIP, _eval_frame._FrameAction.DEFAULT)
"""A frame that is not traced, though the functions that it calls may be."""


def drop_process_groups(mesh: Any) -> None:
    """Empty the table of process groups that a ``DeviceMesh`` holds, so that destroying a group ends its threads too.

    DTensor's caches never release a mesh. If it goes: nothing, but look for jobs that abort at their exit.
    """
    getattr(mesh, "_pg_registry", {}).clear()


class Operations(TorchDispatchMode):
    """A context manager that sees each operator that runs in it, as ``__torch_dispatch__``.

    If it goes: ``torch.profiler``, which measures memory too, and slowly.
    """


# ---------------------------------------------------------------- trees (optree is the public library of this kind)

TreeSpec = _pytree.TreeSpec
"""The structure of a tree without its leaves."""
tree_flatten = _pytree.tree_flatten
"""The leaves and the structure of a tree."""
tree_unflatten = _pytree.tree_unflatten
"""The tree with these leaves and this structure."""
tree_leaves = _pytree.tree_leaves
"""The leaves of a tree, in order."""
tree_map = _pytree.tree_map
"""The tree, or several of one structure, with a function applied to the leaves."""
tree_flatten_with_path = _pytree.tree_flatten_with_path
"""The leaves of a tree with their paths, and its structure."""
keystr = _pytree.keystr
"""A path as one writes it: ``['a'][0]``."""
