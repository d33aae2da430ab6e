"""The layer, the stack, and the public vocabulary."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch

import equilibria
from equilibria import Anderson, Broyden, ConvergenceWarning, Equilibrium, Implicit, Method, Picard, Stack, Stop, Unroll
from equilibria.cells import AffineCell, AffineConfig

TIGHT = Stop(rtol=1e-10, atol=1e-12, max_evals=100)


def cell(**fields):
    torch.manual_seed(3)
    return AffineCell(AffineConfig(width=6, **fields)).double()


def test_an_affine_equilibrium_is_a_linear_solve():
    layer = Equilibrium(cell(), Anderson(), TIGHT, Implicit(Broyden(), TIGHT))
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    out = layer(x)
    f0 = out.f(torch.zeros_like(out.z))
    columns = [out.f(e.expand_as(f0)) - f0 for e in torch.eye(6, dtype=torch.float64)]
    jacobian = torch.stack([c[0, 0] for c in columns], dim=1)
    expected = torch.linalg.solve(torch.eye(6, dtype=torch.float64) - jacobian, f0[..., None])[..., 0]
    torch.testing.assert_close(out.z, expected)
    assert out.solution.converged.all()


def test_eval_stop_rules_in_eval_mode():
    layer = Equilibrium(cell(), Picard(), Stop(max_evals=3), Implicit(), eval_stop=TIGHT)
    x = torch.randn(1, 2, 6, dtype=torch.float64)
    with pytest.warns(ConvergenceWarning, match="0 of 1 samples converged"):
        assert layer(x).solution.evals == 3 + 1  # the evaluation with graph is counted
    assert layer.eval()(x).solution.converged.all()
    assert "Picard" in repr(layer)


def test_value_and_gradient_are_the_same_in_train_and_eval():
    layer = Equilibrium(cell(), Anderson(), TIGHT, Implicit(Anderson(), TIGHT))
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    (trained,) = torch.autograd.grad(layer(x).z.sum(), x)
    (evaluated,) = torch.autograd.grad(layer.eval()(x).z.sum(), x)
    assert torch.equal(trained, evaluated)
    with torch.no_grad():
        torch.testing.assert_close(layer(x).z, layer.train()(x).z.detach())


def test_gradient_accumulation_is_the_sum():
    layer = Equilibrium(cell(), Anderson(), TIGHT, Implicit(Anderson(), TIGHT))
    xs = torch.randn(3, 2, 3, 6, dtype=torch.float64)
    expected = [torch.autograd.grad(layer(x).z.square().sum(), list(layer.parameters())) for x in xs]
    for x in xs:
        layer(x).z.square().sum().backward()
    for parameter, *parts in zip(layer.parameters(), *expected, strict=True):
        torch.testing.assert_close(parameter.grad, sum(parts))


def test_modules_can_be_copied_and_pickled_after_a_backward_pass():
    layer = Equilibrium(cell(), Anderson(), TIGHT, Implicit())
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    out = layer(x)
    out.z.sum().backward()
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x).z, layer(x).z)


def test_a_stack_of_shared_weights_is_an_unrolled_network():
    shared = cell()
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    stop = Stop(rtol=0, atol=0, max_evals=5, best=False)
    unrolled = Equilibrium(shared, Picard(), stop, Unroll())(x)
    stacked = Stack([shared] * 4)(x)
    torch.testing.assert_close(stacked.z, unrolled.z)
    assert stacked.solution is None
    assert stacked.memory is None
    torch.testing.assert_close(stacked.f(stacked.z), shared(stacked.z, shared.prepare(x)))
    with pytest.raises(ValueError, match="at least one cell"):
        Stack([])


def test_public_names():
    assert sorted(equilibria.__all__) == equilibria.__all__
    for name in equilibria.__all__:
        assert getattr(equilibria, name).__doc__, name


def test_the_mathematics_needs_torch_and_jaxtyping_only():
    allowed = {"torch", "jaxtyping", "equilibria", "wadler_lindig", "typing_extensions"}
    program = f"""
import sys
import torch, jaxtyping
before = set(sys.modules)
import equilibria
new = {{name.split('.')[0] for name in set(sys.modules) - before}}
print(sorted(n for n in new if n not in sys.stdlib_module_names and n not in {allowed!r}))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_a_start_at_the_equilibrium_costs_one_evaluation():
    layer, x = Equilibrium(cell(), Anderson(), TIGHT, Implicit()), torch.randn(2, 3, 6, dtype=torch.float64)
    with torch.no_grad():
        first = layer(x)
        again = layer(x, start=first.z)
    assert first.solution.evals > 3
    assert again.solution.evals == 1
    torch.testing.assert_close(again.z, first.z, rtol=1e-7, atol=1e-7)
    with pytest.raises(ValueError, match="NaN or infinite"):
        layer(x, start=first.z * torch.nan)


@pytest.mark.usefixtures("unhooked")
@pytest.mark.parametrize("method", [Stop(), Anderson(), Method, "implicit"])
def test_the_method_of_a_call_is_a_method(method):
    with pytest.raises(TypeError, match=r"method is .*; it must be a Method, for example Method\(Anderson\(\)\)"):
        Equilibrium(_Halved())(torch.ones(2, 3), method=method)


def test_the_output_of_a_layer_says_where_its_tensor_is():
    out = Equilibrium(_Halved())(torch.ones(2, 3))
    with pytest.raises(AttributeError, match=r"no 'flatten'.*layer\(x\)\.output\.flatten"):
        out.flatten(1)
    assert not hasattr(out, "__torch_function__")
    assert copy.copy(out).z is out.z


class _Halved(torch.nn.Module):
    def forward(self, z, x):
        return 0.5 * z + x
