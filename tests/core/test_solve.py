"""The loop: stopping, freezing, budget, trace, containment, refusals."""

import dataclasses
import math

import pytest
import torch

from equilibria import AffineMap, Anderson, Broyden, Picard, Solver, Status, Stop, fixed_point, solve

HALVE = Stop(rtol=0, atol=1e-3, max_evals=100)


def halving(z):
    return z / 2


@dataclasses.dataclass(frozen=True)
class Recorder(Solver):
    """Plain iteration that records its arguments."""

    seen: list

    def init(self, z):
        return 0

    def step(self, f, at, history):
        assert torch.equal(at.r, at.fz - at.z)
        self.seen.append((at.z.clone(), at.active.clone(), f.remaining))
        return at.fz, history + 1


def test_counts_are_exact():
    # |z_k| = 2^-k, residual |f(z) - z| = 2^-(k+1) <= 1e-3 first at k = 9.
    solution = solve(halving, torch.ones(1, 1), Picard(), HALVE)
    assert solution.steps.tolist() == [9]
    assert solution.evals == 10
    assert solution.trace.shape == (10, 1)
    assert solution.z.item() == 2.0**-9
    assert solution.fz.item() == 2.0**-10


def test_residual_is_relative_to_f():
    solution = solve(halving, torch.ones(2, 3), Picard(), HALVE)
    assert torch.equal(solution.residual, torch.ones(2))  # |z/2 - z| / |z/2|


def test_a_sample_that_is_done_is_never_moved_again():
    recorder = Recorder([])
    start = torch.tensor([[1.0], [1024.0]])
    solution = solve(halving, start, recorder, HALVE)
    assert solution.steps.tolist() == [9, 19]
    assert solution.z.flatten().tolist() == [2.0**-9, 2.0**-9]
    rows = torch.stack([z[0, 0] for z, _, _ in recorder.seen[10:]])
    assert rows.unique().tolist() == [2.0**-9]
    assert [a.tolist() for _, a, _ in recorder.seen][9:11] == [[False, True], [False, True]]
    assert solution.trace[9:, 0].unique().numel() == 1


@pytest.mark.parametrize("budget", [1, 2, 3, 7])
def test_the_budget_is_kept_and_counted(budget):
    calls = []

    def f(z):
        calls.append(1)
        return z / 2 + 1

    solution = solve(f, torch.ones(2, 4), Picard(), Stop(rtol=0, atol=0, max_evals=budget))
    assert solution.evals == len(calls) == budget == len(solution.trace)
    assert (solution.status == Status.BUDGET_SPENT).all()


def test_no_tolerance_means_fixed_depth():
    stop = Stop(rtol=0, atol=0, max_evals=13, best=False)
    solution = solve(torch.cos, torch.zeros(1, 1, dtype=torch.float64), Picard(), stop)
    z = 0.0
    for _ in range(12):
        z = math.cos(z)
    assert solution.z.item() == pytest.approx(z, abs=1e-15)
    # Even a start that is an exact fixed point is iterated, since its gradient needs the steps.
    assert solve(halving, torch.zeros(1, 1), Picard(), stop).steps.tolist() == [12]


def test_best_and_last_iterate():
    def f(z):  # leaves the neighbourhood of its fixed point 0
        return -1.5 * z

    start = torch.ones(1, 1)
    assert solve(f, start, Picard(), Stop(max_evals=6)).z.item() == 1.0
    assert solve(f, start, Picard(), Stop(max_evals=6, best=False)).z.item() == -(1.5**5)

    def worse_then_better(z):
        return torch.where(z > 3, z * 0.5, z + 1.5)

    solution = solve(worse_then_better, start, Picard(), Stop(rtol=1e-9, max_evals=5))
    assert solution.residual.item() == pytest.approx(min(solution.trace.flatten().tolist()))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("solver", [Picard(), Anderson(), Broyden()])
def test_a_nonfinite_sample_leaves_its_neighbours_bits(solver, bad):
    weight = 0.2 * torch.randn(6, 6)
    x = torch.randn(4, 6)
    poisoned = x.clone()
    poisoned[2, 3] = bad
    start, stop = torch.zeros(4, 6), Stop(rtol=1e-5, max_evals=40)
    good = solve(lambda z: z @ weight + x, start, solver, stop)
    mixed = solve(lambda z: z @ weight + poisoned, start, solver, stop)
    others = [0, 1, 3]
    assert mixed.status.tolist() == [0, 0, int(Status.NONFINITE), 0]
    assert torch.equal(mixed.z[others], good.z[others])
    assert torch.equal(mixed.steps[others], good.steps[others])
    assert torch.equal(mixed.z[2], start[2])  # no finite pair was seen
    assert mixed.fz[2].isnan().all()
    assert "NONFINITE" in str(mixed)


def test_a_sample_that_overflows_keeps_its_best_iterate():
    def f(z):
        return torch.where(z.abs() > 2.5, torch.nan, z * 1.5)

    solution = solve(f, torch.tensor([[1.0], [0.0]]), Picard(), Stop(max_evals=20, best=False))
    assert solution.status.tolist() == [Status.NONFINITE, Status.CONVERGED]
    assert solution.z.tolist() == [[2.25], [0.0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_any_floating_dtype_in_the_same_out(dtype):
    solution = solve(lambda z: z / 2 + 1, torch.zeros(2, 3, 4, dtype=dtype), Anderson(), Stop(rtol=2e-2))
    assert solution.z.dtype == solution.fz.dtype == dtype
    assert solution.z.shape == (2, 3, 4)
    assert solution.residual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert solution.converged.all()


def test_the_residual_is_that_of_the_rounded_state():
    x = torch.randn(3, 8)

    def f(z):
        return (0.4 * z + x.to(z.dtype)).to(z.dtype)

    solution = solve(f, torch.zeros(3, 8, dtype=torch.bfloat16), Broyden(), Stop(rtol=1e-2))
    z = solution.z
    gap = (f(z).float() - z.float()).norm(dim=1) / f(z).float().norm(dim=1)
    torch.testing.assert_close(solution.residual, gap)


def test_affine_maps_are_differentiated_by_their_linear_part():
    f = AffineMap(lambda v: 0.5 * v, torch.ones(2, 3))
    assert torch.equal(f(torch.ones(2, 3)), torch.full((2, 3), 1.5))


REFUSED = {
    "no batch axis": (torch.zeros(5), halving, ValueError, r"shape \(5,\).*z0\[None\]"),
    "empty samples": (torch.zeros(2, 0), halving, ValueError, r"\(2, 0\), so that a sample is empty"),
    "integers": (torch.zeros(2, 5, dtype=torch.long), halving, TypeError, "int64.*float32"),
    "no tensor": ([0.0], halving, TypeError, r"z0\[0\] is float"),
    "f gives no tensor": (
        torch.zeros(2, 5),
        lambda z: [z],
        TypeError,
        r"f returned \[\(B, 5\)\], and the state is \(B, 5\)",
    ),
    "NaN": (torch.tensor([[0.0], [math.nan]]), halving, ValueError, r"1 of 2 samples \(\[1\]\)"),
    "shape": (torch.zeros(2, 5), lambda z: z[:, :3], ValueError, r"from \(2, 5\) to \(2, 3\)"),
    "dtype": (torch.zeros(2, 5), lambda z: z.double(), TypeError, "from torch.float32 to torch.float64"),
    "device": (torch.zeros(2, 5), lambda z: z.to("meta"), ValueError, "from cpu to meta"),
}


@pytest.mark.usefixtures("unhooked")
@pytest.mark.parametrize("case", REFUSED)
def test_wrong_input_gets_one_sentence(case):
    z0, f, error, words = REFUSED[case]
    with pytest.raises(error, match=words) as raised:
        solve(f, z0, Picard(), Stop())
    assert "\n" not in str(raised.value)


@pytest.mark.usefixtures("unhooked")
@pytest.mark.parametrize(
    "fields", [{"max_evals": 0}, {"max_evals": 30.5}, {"rtol": -1.0}, {"atol": math.nan}, {"rtol": math.inf}]
)
def test_a_stop_that_cannot_be_met_is_refused(fields):
    (name,) = fields
    with pytest.raises(ValueError, match=f"Stop\\({name}=.*try"):
        Stop(**fields)


@pytest.mark.parametrize(
    "f", [lambda z: z.mul_(0.5) + 1, lambda z: torch.relu_(z) * 0.5, lambda z: z.view(-1).add_(1).view(z.shape)]
)
def test_a_map_that_changes_its_argument_is_refused(f):
    with torch.no_grad(), pytest.raises(ValueError, match=r"changed its argument z in place.*z.clone\(\)"):
        solve(f, torch.ones(2, 3), Picard(), Stop())
    with torch.inference_mode():
        assert solve(lambda z: z * 0.5 + 1, torch.ones(2, 3), Anderson(), Stop()).converged.all()


def test_a_solution_prints_one_line():
    solution = solve(lambda z: z * 0.5 + 1, torch.ones(2, 3), Picard(), Stop())
    assert repr(solution) == str(solution)
    assert "\n" not in str([solution])


def test_every_status_has_advice():
    assert all(status.advice.endswith(".") for status in Status)
    solution = solve(torch.cos, torch.zeros(2, 1), Picard(), Stop(max_evals=3))
    assert "0 of 2 samples converged, 3 evaluations" in str(solution)
    assert "raise max_evals" in str(solution)


@pytest.mark.parametrize(("dtype", "level"), [(torch.bfloat16, "4e-03"), (torch.float16, "5e-04")])
def test_a_tolerance_below_the_rounding_of_f_is_warned_about(dtype, level):
    z0 = torch.zeros(1, 4)
    said = rf"rtol=0.0001\) is below what {str(dtype)[6:]} resolves.* to {level}"
    with pytest.warns(RuntimeWarning, match=said) as caught:
        solve(halving, z0.to(dtype), Picard(), Stop(rtol=1e-4))
    assert caught[0].filename == __file__
    with pytest.warns(RuntimeWarning, match=said) as caught:
        fixed_point(halving, z0.to(dtype), stop=Stop(rtol=1e-4))
    assert caught[0].filename == __file__
    with torch.autocast("cpu", dtype=dtype), pytest.warns(RuntimeWarning, match="let f compute in float32"):
        solve(halving, z0, Picard(), Stop(rtol=1e-4))
    solve(halving, z0.to(dtype), Picard(), Stop(rtol=2e-2))  # no warning, which would be an error here
    solve(halving, z0, Picard(), Stop(rtol=1e-6))


@pytest.mark.parametrize("z0", [torch.zeros(3, 5), torch.zeros(2, 4), torch.zeros(3, 4, dtype=torch.float64)])
def test_an_error_of_f_at_the_start_says_what_the_start_was(z0):
    weight, x = torch.eye(4), torch.ones(3, 4)
    with pytest.raises(RuntimeError) as error:
        solve(lambda z: torch.tanh(z @ weight + x), z0, Picard(), Stop())
    (note,) = error.value.__notes__
    assert f"z0 = {tuple(z0.shape)} of {str(z0.dtype)[6:]}" in note


def test_an_error_of_f_later_is_left_alone():
    calls = []

    def f(z):
        calls.append(z)
        if len(calls) == 2:
            raise RuntimeError("my own")
        return z + 1

    with pytest.raises(RuntimeError, match="my own") as error:
        solve(f, torch.zeros(1, 2), Picard(), Stop())
    assert not hasattr(error.value, "__notes__")


def test_a_solution_before_the_backward_pass_says_why_it_has_no_adjoint():
    x = torch.ones(1, 2, requires_grad=True)
    solution = fixed_point(lambda z: 0.5 * z + x, torch.zeros(1, 2))
    assert solution.adjoint == []
    assert solution.adjoint[-1:] == []
    with pytest.raises(IndexError, match="each backward pass"):
        assert solution.adjoint[0]
    solution.z.sum().backward()
    assert solution.adjoint[0].converged.all()
