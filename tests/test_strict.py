"""The checks under which all other tests run: they see a wrong type or shape wherever it passes."""

import dataclasses
import inspect

import jaxtyping
import pytest
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

import strict
from equilibria import Stop
from equilibria.solvers import Anderson
from equilibria.testing.problems import rows_times
from strict import jaxtyped


@jaxtyped(typechecker=None)
def product(a: "Float[Tensor, 'B N']", b: "Float[Tensor, 'M N']", *, wrong: bool = False) -> "Float[Tensor, 'B M']":
    return a if wrong else a @ b.mT


@jaxtyped
@dataclasses.dataclass
class Pair:
    a: "Float[Tensor, ' N']"
    b: "Float[Tensor, ' N']"
    factor: float = 1.0


def outer(size):
    @jaxtyped
    def inner(x: "Float[Tensor, 'N N']", factor: int = size) -> "Float[Tensor, 'N N']":
        return x[:1] if factor == 3 else x

    return inner


def test_parameters_and_results_are_checked_together():
    a, b = torch.ones(2, 3), torch.ones(4, 3)
    assert product(a, b).shape == (2, 4)
    for wrong in ((a, torch.ones(4, 5)), (a, b.int()), (a, [1.0]), (a[0], b)):
        with pytest.raises(jaxtyping.TypeCheckError):
            product(*wrong)
    with pytest.raises(jaxtyping.TypeCheckError):
        product(a, b, wrong=True)
    with pytest.raises(jaxtyping.TypeCheckError):
        product(a, b, wrong=1)
    with pytest.raises(TypeError, match="missing 1 required"):
        product(a)


def test_fields_are_checked_together():
    assert Pair(torch.ones(2), torch.ones(2), 3).factor == 3  # an int is a float
    for wrong in ((torch.ones(2), torch.ones(3)), (torch.ones(2), torch.ones(2), "3")):
        with pytest.raises(jaxtyping.TypeCheckError):
            Pair(*wrong)


def test_inner_functions_are_checked_with_values_and_axes_of_their_own():
    functions = [outer(size) for size in (2, 3)]
    assert functions[0](torch.ones(2, 2)).shape == (2, 2)
    assert functions[0](torch.ones(5, 5)).shape == (5, 5)
    for number, wrong in ((0, (torch.ones(2, 3),)), (1, (torch.ones(2, 2),)), (0, (torch.ones(2, 2), 0.5))):
        with pytest.raises(jaxtyping.TypeCheckError):
            functions[number](*wrong)


def test_the_library_is_checked():
    for call in (
        lambda: rows_times(torch.ones(2, 3), torch.ones(4, 5)),
        lambda: Anderson(window="3"),
        lambda: Stop(rtol="small"),
    ):
        with pytest.raises(jaxtyping.TypeCheckError):
            call()


def test_the_checks_can_be_left_out(unhooked):
    assert product([1.0], None, wrong=True) == [1.0]


def test_quick_answers_are_those_of_jaxtyping():
    """Of all dtypes and shapes: with letters that are known, new, repeated, and after an answer that was no."""
    axes = ("", "B", "B N", "N N", "B 1 N", "... N")
    hints = [kind[Tensor, letters] for kind in (Float, Int, Bool, Shaped) for letters in axes]
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.complex64)
    shapes = ((), (2,), (3,), (2, 3), (3, 3), (2, 1, 3))
    values = [torch.ones(shape, dtype=dtype) for dtype in dtypes for shape in shapes]
    for first in values[: len(shapes)]:
        for hint in hints:
            quick, slow = (answers(asked, hint, first, values) for asked in (strict.quick, SLOW))
            assert quick == slow
    assert not strict.quick(hints[0], 3.0)


SLOW = inspect.signature(strict.quick).parameters["slow"].default


def answers(asked, hint, first, values):
    """What is said of all values in one call in which ``first`` came before, and the values of the letters then."""
    with strict.context:
        asked(Shaped[Tensor, "B N"], first)
        return [asked(hint, value) for value in values], dict(strict._storage.get_shape_memo()[0])
