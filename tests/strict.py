"""The type checker of the tests: beartype, with an int allowed where a float is, under jaxtyping's names of axes.

``jaxtyping.jaxtyped`` checks the same and takes twice the time of the tests: it checks parameters before and after each
call, binds them by ``inspect``, and compiles the checks of an inner function again at every call of the outer one.
Here they are checked once, and a ``def`` has its checks compiled once, at its first call. Of the calls of a function
within one test the first ``FIRST`` are checked, and then one in ``EVERY``: the steps of a solve have the same shapes.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
import typing

import jaxtyping
import torch
from beartype import BeartypeConf, beartype
from jaxtyping import _array_types, _storage

compiled = beartype(conf=BeartypeConf(is_pep484_tower=True, violation_type=jaxtyping.TypeCheckError))
context = jaxtyping.jaxtyped("context")
"""One call, in which a letter for an axis has one value."""
FIRST, EVERY = 8, 16
TESTS = [0]
"""Number of tests that have begun."""
CHECKS = {}
"""For each ``def`` with its annotations, the checks of its parameters and of its result."""


def jaxtyped(thing=None, *, typechecker=None):
    """In the place of the decorator of that name: functions with their checks, dataclasses with those of fields."""
    if thing is None:
        return jaxtyped
    if isinstance(thing, type):
        own = dataclasses.is_dataclass(thing) and not any(
            base.__module__.startswith("transformers") for base in thing.__mro__
        )
        if own and not hasattr(thing.__init__, "checked"):
            thing.__init__ = jaxtyped(thing.__init__)
        return thing
    assert isinstance(thing, types.FunctionType), thing
    parameters = result = None
    calls = test = 0

    @functools.wraps(thing)
    def function(*args, **kwargs):
        __tracebackhide__ = True
        nonlocal parameters, result, calls, test
        calls, test = calls + 1 if test == TESTS[0] else 1, TESTS[0]
        if (calls > FIRST and calls % EVERY) or jaxtyping.config.jaxtyping_disable:
            return thing(*args, **kwargs)
        if parameters is None:  # the first call: most processes call a part of the functions
            parameters, result = checks_once(thing)
        with context:
            parameters(*args, **kwargs)
            found = thing(*args, **kwargs)
            return found if result is None else result(found)

    function.checked = True
    function.__code__ = function.__code__.replace(co_filename="<checks>")  # a warning names the file of the caller
    return function


def checks_once(function):
    """As ``checks``, once for every ``def`` with its annotations."""
    key = id(function.__code__), *function.__annotations__.items()
    if key not in CHECKS:
        CHECKS[key] = function.__code__, *checks(function)  # with the code, so that its id is not given to another
    return CHECKS[key][1:]


def checks(function):
    """A function that takes what ``function`` takes, and one that takes its result and returns it (None: anything)."""
    types_of = {name: resolved(hint, function.__globals__) for name, hint in function.__annotations__.items()}
    returned = types_of.pop("return", typing.Any)
    signature = inspect.signature(function)
    bare = [
        one.replace(annotation=one.empty, default=one.empty if one.default is one.empty else None)
        for one in signature.parameters.values()
    ]
    parameters = made(function, f"{inspect.Signature(bare)}: pass")
    parameters.__defaults__, parameters.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    parameters.__annotations__ = types_of
    if returned is typing.Any:
        return compiled(parameters), None
    result = made(function, "(result): return result")
    result.__annotations__ = {"return": returned}
    return compiled(parameters), compiled(result)


def made(function, rest):
    """A new function with the name of ``function``."""
    names = {}
    exec(f"def {function.__name__}{rest}", names)
    new = names[function.__name__]
    new.__module__, new.__qualname__ = function.__module__, function.__qualname__
    return new


def resolved(hint, names):
    """What an annotation stands for; Any, as for jaxtyping, if it names what does not exist yet."""

    def one(value): ...

    one.__annotations__ = {"value": hint}
    try:
        return typing.get_type_hints(one, names, include_extras=True)["value"]
    except Exception:  # array[int], before Python 3.12, is a TypeError
        return typing.Any


def quick(hint, value, slow=_array_types._MetaAbstractArray.__instancecheck__):
    """As jaxtyping's ``isinstance(value, hint)``, but three times as fast in the most frequent case.

    That is a tensor with the right dtype, and with one letter for each of its axes: nothing else is decided here.
    """
    axes, dtypes = AXES.get(hint) or AXES.setdefault(hint, axes_of(hint))
    if axes is None or not isinstance(value, torch.Tensor):
        return slow(hint, value)
    dtype, shape = value.dtype, value.shape
    if dtype not in dtypes:
        dtypes[dtype] = accepts(hint, dtype)
    if not dtypes[dtype] or len(shape) != len(axes) or not _storage._has_shape_memo():
        return slow(hint, value)
    known = _storage._shape_storage.memo_stack[-1][0]
    before = len(known)
    for name, size in zip(axes, shape):  # noqa: B905 (it was compared, and takes time)
        if known.setdefault(name, size) != size:
            for new in list(known)[before:]:
                del known[new]
            return slow(hint, value)
    return True


AXES = {}
"""For each hint the names of its axes, None if it has others than letters, and its answers about dtypes so far."""


def axes_of(hint):
    dims = getattr(hint, "dims", (None,))
    plain = (type(dim) is _array_types._NamedDim and not dim.broadcastable and not dim.treepath for dim in dims)
    if not all(plain) or hint._skip_instancecheck or hint.array_type is not torch.Tensor:
        return None, {}
    return tuple(dim.name for dim in dims), {}


def accepts(hint, dtype):
    """True if the hint is for this dtype, which it names or describes by patterns."""
    name = str(dtype).removeprefix("torch.")
    kinds = (name,) if hint.dtypes is _array_types._any_dtype else hint.dtypes
    return any(name == kind if isinstance(kind, str) else kind.match(name) for kind in kinds)


_array_types._MetaAbstractArray.__instancecheck__ = quick
jaxtyping.jaxtyped = jaxtyped
