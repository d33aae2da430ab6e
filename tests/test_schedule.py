import itertools
import math

import pytest

from equilibria.training import learning_rate


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
