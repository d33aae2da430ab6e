"""The checks under which all other tests run: they see a wrong type or shape wherever it passes."""

import dataclasses

import jaxtyping
import pytest
import torch
from jaxtyping import Float
from torch import Tensor

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
