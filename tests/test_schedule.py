import itertools
import math

import pytest

from equilibria.gradients import Implicit
from equilibria.solve import Stop
from equilibria.solvers import Anderson
from equilibria.training import Stage, growing_penalty, learning_rate


def rate(step, **changes):
    return learning_rate(step, **({"peak": 1.0, "warmup": 10, "total": 110, "final": 0.1} | changes))


def test_the_first_step_has_the_smallest_rate_and_the_warm_up_is_linear():
    assert [rate(s) for s in (1, 5, 10)] == [0.1, 0.5, 1.0]


def test_half_a_cosine_leads_from_the_peak_to_the_final_rate():
    assert rate(60, total=109) == pytest.approx(0.55)
    assert rate(111) == pytest.approx(0.1)
    assert rate(35, total=109) == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 4)))


@pytest.mark.parametrize("warmup", [0, 1, 9])
def test_no_step_is_wasted_on_a_rate_of_zero(warmup):
    rates = [learning_rate(s, peak=1.0, warmup=warmup, total=10) for s in range(1, 11)]
    assert min(rates) > 0.01
    assert learning_rate(11, peak=1.0, warmup=warmup, total=10) == 0


def test_the_rate_never_jumps():
    rates = [rate(s) for s in range(1, 111)]
    assert max(abs(a - b) for a, b in itertools.pairwise(rates)) <= 0.1 + 1e-12
    assert rates[9:] == sorted(rates[9:], reverse=True)


def test_no_warm_up_begins_near_the_peak_and_the_end_stays():
    assert rate(1, warmup=0) == pytest.approx(1.0, abs=1e-3)
    assert rate(500) == pytest.approx(0.1)


def test_a_warm_up_as_long_as_the_training_is_allowed():
    assert rate(110, warmup=110) == 1.0


def test_steps_are_counted_from_one():
    with pytest.raises(ValueError, match="counted from 1"):
        rate(0)


def grown(steps, **changes):
    stage = Stage("implicit", steps, Anderson(), Stop(), Implicit(), penalty_share=0.4, budget_jitter=2)
    return growing_penalty(stage, **({"first": 1.9, "increment": 0.1, "every": 10} | changes))


def test_a_penalty_grows_every_so_many_steps_and_the_last_part_is_shorter():
    parts = grown(25)
    assert [(part.name, part.penalty, part.steps) for part in parts] == [
        ("implicit γ=1.9", 1.9, 10),
        ("implicit γ=2.0", 2.0, 10),
        ("implicit γ=2.1", 2.1, 5),
    ]
    assert all((part.penalty_share, part.budget_jitter, part.solver) == (0.4, 2, Anderson()) for part in parts)


def test_a_penalty_grows_by_the_steps_of_the_whole_training():
    assert [part.steps for part in grown(25, done=8)] == [2, 10, 10, 3]
    assert [part.steps for part in grown(20, done=10)] == [10, 10]
    assert [part.steps for part in grown(5, done=8, every=100)] == [5]


@pytest.mark.parametrize("done", [0, 3, 10, 19])
@pytest.mark.parametrize("steps", [1, 9, 10, 11, 40])
def test_growing_penalties_cover_the_stage(steps, done):
    parts = grown(steps, done=done)
    assert sum(part.steps for part in parts) == steps
    ends = list(itertools.accumulate((part.steps for part in parts), initial=done))
    assert all(end % 10 == 0 for end in ends[1:-1])
    assert max(part.steps for part in parts) <= 10


def test_penalties_are_round_numbers():
    parts = grown(1000, first=0.1)
    assert [part.penalty for part in parts] == [float(f"{0.1 * k:.1f}") for k in range(1, 101)]
    assert len({part.name for part in parts}) == 100


def test_a_penalty_that_does_not_grow_leaves_one_stage():
    (part,) = grown(25, first=2, increment=0)
    assert (part.name, part.penalty, part.steps) == ("implicit γ=2.0", 2.0, 25)


@pytest.mark.parametrize(
    "wrong", [{"first": -1.0}, {"increment": -0.1}, {"every": 0}, {"done": -1}, {"first": math.nan}]
)
def test_wrong_growths_are_named(wrong):
    with pytest.raises(ValueError, match=rf"growing_penalty\({next(iter(wrong))}=.*at least"):
        grown(25, **wrong)
