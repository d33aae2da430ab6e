import itertools
import math

import pytest
import torch

from equilibria.core.stop import Stop
from equilibria.fixed_point import Method
from equilibria.gradients import Implicit
from equilibria.lm.experiments import Cosine, Milestones, NonMonotone, Plateau, Stage, growing_penalty, learning_rate
from equilibria.lm.experiments.decay import Validated
from equilibria.solvers import Anderson

METHOD = Method(Anderson(), Stop(), Implicit())


def rate(step, **changes):
    return learning_rate(step, **({"peak": 1.0, "warmup": 10, "total": 110, "final": 0.1} | changes))


def test_the_first_step_has_the_smallest_rate_and_the_warm_up_is_linear():
    assert [rate(s) for s in (1, 5, 10)] == [0.1, 0.5, 1.0]


def test_half_a_cosine_leads_from_the_peak_to_the_final_rate():
    assert rate(60, total=109) == pytest.approx(0.55)
    assert rate(111) == pytest.approx(0.1)
    assert rate(35, total=109) == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 4)))


def test_a_cosine_from_the_start_has_the_rates_of_the_authors_loop():
    """Written as in their code: the rate is set after each step, by a warm-up or by the cosine of the step's number."""
    peak, warmup, total, current, theirs = 2.5e-4, 7, 30, 2.5e-4, {}
    for done in range(1, total + 1):
        theirs[done] = current
        warming = done < warmup
        current = peak * done / warmup if warming else 0.5 * peak * (1 + math.cos(math.pi * done / total))
    mine = {
        step: learning_rate(step, peak=peak, warmup=warmup, total=total, decay=Cosine(origin="start"))
        for step in range(warmup + 1, total + 1)
    }
    assert mine == pytest.approx({step: theirs[step] for step in mine}, rel=1e-12)
    assert mine[warmup + 1] < 0.9 * peak  # the jump


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


def test_milestones_divide_the_rate_after_each_of_them():
    rates = [rate(s, warmup=2, decay=Milestones(steps=(4, 6), divide=10.0)) for s in range(1, 9)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 1.0, 0.1, 0.1, 0.01, 0.01])


def test_a_milestone_within_the_warm_up_divides_what_comes_after():
    rates = [rate(s, warmup=3, decay=Milestones(steps=(2,), divide=2.0)) for s in range(1, 6)]
    assert rates == pytest.approx([1 / 3, 2 / 3, 1.0, 0.5, 0.5])


@pytest.mark.parametrize(
    ("peak", "expected"), [(20.0, [20.0, 5.0, 1.25, 0.3125, 0.078125, 0.01953125, 0.01953125]), (0.01, [0.01] * 7)]
)
def test_a_rate_at_or_below_the_floor_is_not_divided_again(peak, expected):
    """As in the code of TrellisNet: `if lr > 0.02: lr /= 4`."""
    rates = [rate(5, peak=peak, warmup=1, decay=NonMonotone(), divisions=count) for count in range(7)]
    assert rates == pytest.approx(expected)
    assert rate(1, peak=1.0, warmup=2, decay=NonMonotone(), divisions=3) == 0.5  # the warm-up is not divided


def divided_at(decay, losses):
    """The validations, from 1, after which the rate is divided."""
    validated, places = Validated(), []
    for place, loss in enumerate(losses, start=1):
        before, validated = validated.divisions, validated.after(loss, decay)
        places += [place] * (validated.divisions - before)
    return places


def test_the_non_monotone_criterion_is_that_of_awd_lstm():
    """Written as in the code: the loss is compared before it joins the list."""
    generator = torch.Generator().manual_seed(0)
    losses = (torch.rand(60, generator=generator) + torch.linspace(2, 0, 60)).tolist()
    expected, best_val_loss, nonmono = [], [], 4
    for place, val_loss in enumerate(losses, start=1):
        if len(best_val_loss) > nonmono and val_loss > min(best_val_loss[:-nonmono]):
            expected.append(place)
        best_val_loss.append(val_loss)
    assert divided_at(NonMonotone(window=4), losses) == expected
    assert 0 < len(expected) < 50


def test_worse_than_the_last_few_only_divides_nothing():
    assert divided_at(NonMonotone(window=2), [5.0, 4.0, 3.0, 3.5, 3.9]) == []  # all below 4, the best but two
    assert divided_at(NonMonotone(window=2), [5.0, 3.0, 4.0, 4.0, 3.5]) == [5]


@pytest.mark.parametrize("patience", [0, 1, 3])
def test_a_plateau_is_that_of_torch(patience):
    generator = torch.Generator().manual_seed(patience)
    losses = (torch.rand(80, generator=generator) + torch.linspace(1, 0, 80)).tolist()
    optimiser = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimiser, factor=0.5, patience=patience, eps=0)
    validated, decay = Validated(), Plateau(patience=patience, divide=2.0)
    for loss in losses:
        scheduler.step(loss)
        validated = validated.after(loss, decay)
        mine = rate(9, warmup=1, decay=decay, divisions=validated.divisions)
        assert mine == pytest.approx(optimiser.param_groups[0]["lr"], rel=1e-9)
    assert validated.divisions > 2


def test_a_loss_that_is_not_finite_is_worse_than_any_other():
    assert divided_at(NonMonotone(window=1), [1.0, 1.0, math.nan]) == [3]
    assert divided_at(Plateau(patience=0), [1.0, math.inf]) == [2]


def test_where_the_model_changes_losses_are_forgotten_and_divisions_are_not():
    validated = Validated().after(1.0, Plateau(patience=0)).after(2.0, Plateau(patience=0))
    assert (validated.losses, validated.divisions) == ((1.0, 2.0), 1)
    assert validated.without_losses() == Validated(losses=(), divisions=1)


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (Milestones, {"steps": ()}),
        (Milestones, {"steps": (5, 5)}),
        (Milestones, {"steps": (0, 5)}),
        (Milestones, {"steps": (5,), "divide": 1.0}),
        (NonMonotone, {"window": 0}),
        (NonMonotone, {"divide": 0.25}),
        (NonMonotone, {"floor": -1.0}),
        (Plateau, {"patience": -1}),
        (Plateau, {"divide": math.inf}),
        (Plateau, {"threshold": math.nan}),
    ],
)
def test_wrong_decays_are_named(kind, wrong):
    with pytest.raises(ValueError, match=rf"{kind.__name__}\({list(wrong)[-1]}=.*try "):
        kind(**wrong)


def grown(steps, **changes):
    stage = Stage("implicit", steps, METHOD, penalty_share=0.4, budget_jitter=2)
    return growing_penalty(stage, **({"first": 1.9, "increment": 0.1, "every": 10} | changes))


def test_a_penalty_grows_every_so_many_steps_and_the_last_part_is_shorter():
    parts = grown(25)
    assert [(part.name, part.penalty, part.steps) for part in parts] == [
        ("implicit γ=1.9", 1.9, 10),
        ("implicit γ=2.0", 2.0, 10),
        ("implicit γ=2.1", 2.1, 5),
    ]
    assert all((part.penalty_share, part.budget_jitter, part.method) == (0.4, 2, METHOD) for part in parts)


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
