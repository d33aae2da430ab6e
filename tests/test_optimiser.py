"""SGD and NT-ASGD: what one step does, when a rate holds, what is averaged and since when."""

import contextlib
import copy
import dataclasses
import math

import pytest
import torch
from torch import nn

from equilibria.lm.evaluation import evaluate
from equilibria.lm.experiments import Milestones, NonMonotone
from equilibria.lm.experiments.decay import Validated
from equilibria.lm.runs import Run
from equilibria.lm.runs.weights import load_weights
from equilibria.lm.training import Trainer
from equilibria.lm.training.optimiser import (
    averaged,
    build_optimiser,
    note_validation,
    restart_averages,
)
from equilibria.lm.training.step import set_learning_rate
from small_experiment import corpus, experiment, same_bits, trained_weights

WINDOW = NonMonotone(window=1, divide=4.0, floor=0.0)


class Descent:
    """A linear model on noise, trained with the optimiser of an experiment."""

    def __init__(self, **training):
        torch.manual_seed(0)
        self.experiment = experiment(**({"warmup": 0, "learning_rate": 0.5} | training))
        self.model = nn.Linear(3, 2)
        self.optimiser = build_optimiser(self.model, self.experiment.training.optimisation)
        self.validated, self.done, self.iterates = Validated(), 0, []

    def step(self) -> float:
        self.done += 1
        settings, total = self.experiment.training.optimisation, self.experiment.total_steps
        rate = set_learning_rate(self.optimiser, settings, self.done, self.validated, total=total)
        self.model.zero_grad()
        gradient(self.model, self.done)
        self.optimiser.step()
        self.iterates.append(self.weights())
        return rate

    def validate(self, *losses: float) -> None:
        for loss in losses:
            settings = self.experiment.training.optimisation
            self.validated = note_validation(self.optimiser, self.validated, settings, loss)

    def weights(self) -> list[torch.Tensor]:
        return [parameter.detach().clone() for parameter in self.model.parameters()]

    def averages(self) -> list[torch.Tensor]:
        with averaged(self.optimiser):
            return self.weights()


def gradient(model: nn.Module, number: int) -> None:
    noise = torch.randn(5, 3, generator=torch.Generator().manual_seed(number))
    model(noise).sin().sum().backward()


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_sgd_is_gradient_and_weight_decay_times_the_rate():
    descent = Descent(optimiser="sgd", weight_decay=0.1, decay=Milestones(steps=(1,), divide=5.0))
    for rate in (0.5, 0.1):
        twin = copy.deepcopy(descent.model)
        assert descent.step() == pytest.approx(rate)
        gradient(twin, descent.done)
        expected = [p.detach() - rate * (p.grad + 0.1 * p.detach()) for p in twin.parameters()]
        torch.testing.assert_close(descent.weights(), expected)


def test_momentum_repeats_a_share_of_the_last_update():
    descent = Descent(optimiser="sgd", momentum=0.5, decay=WINDOW)
    before = descent.weights()
    descent.step()
    first, middle = descent.weights(), copy.deepcopy(descent.model)
    descent.step()
    gradient(middle, 2)
    update = [0.5 * (f - b) - 0.5 * p.grad for f, b, p in zip(first, before, middle.parameters(), strict=True)]
    torch.testing.assert_close(descent.weights(), [f + u for f, u in zip(first, update, strict=True)])


@pytest.mark.parametrize("warmup", [0, 6])
def test_before_the_trigger_and_after_it_asgd_steps_as_sgd_does(warmup):
    """Bit for bit, while the rate changes from step to step, and without a division of the rate."""
    numbers = {"warmup": warmup, "weight_decay": 0.01, "decay": WINDOW}
    plain, averaging = Descent(optimiser="sgd", **numbers), Descent(optimiser="asgd", **numbers)
    for number in range(12):
        if number == 5:
            averaging.validate(1.0, 1.0, 2.0)
            assert averaging.validated.divisions == 1
        assert plain.step() == averaging.step()
        assert same(plain.weights(), averaging.weights())


def test_a_rate_holds_in_the_step_that_it_is_set_for():
    """PyTorch's ASGD alone would take the step with the rate of the step before."""
    descent = Descent(optimiser="asgd", decay=WINDOW)
    descent.step()
    for rate in (0.25, 0.0):
        changed = descent.experiment.training.changed(learning_rate=rate or 1e-30)
        descent.experiment = dataclasses.replace(descent.experiment, training=changed)
        before, twin = descent.weights(), copy.deepcopy(descent.model)
        descent.step()
        gradient(twin, descent.done)
        expected = [b - rate * p.grad for b, p in zip(before, twin.parameters(), strict=True)]
        torch.testing.assert_close(descent.weights(), expected)


def test_there_is_no_average_before_the_trigger_and_then_it_is_that_of_the_weights_since():
    descent = Descent(optimiser="asgd", decay=WINDOW)
    for _ in range(4):
        descent.step()
        descent.validate(3.0)
        assert same(descent.averages(), descent.weights())
        with averaged(descent.optimiser) as averaging:
            assert not averaging
    descent.validate(4.0)  # worse than the best but one
    with averaged(descent.optimiser) as averaging:
        assert averaging
    assert same(descent.averages(), descent.weights())
    for count in range(1, 8):
        descent.step()
        kept = descent.iterates[5:] or descent.iterates[-1:]  # those since the second step after the trigger
        assert len(kept) == max(1, count - 1)
        expected = [torch.stack(parts).mean(dim=0) for parts in zip(*kept, strict=True)]
        torch.testing.assert_close(descent.averages(), expected)
    assert not same(descent.averages(), descent.weights())


def test_a_second_trigger_does_not_begin_anew_and_a_change_of_the_model_does():
    descent = Descent(optimiser="asgd", decay=WINDOW)
    descent.step()
    descent.validate(1.0, 1.0, 2.0)
    for _ in range(4):
        descent.step()
    before = descent.averages()
    descent.validate(3.0)
    assert descent.validated.divisions == 2
    assert same(descent.averages(), before)
    descent.validated = restart_averages(descent.optimiser, descent.validated)
    assert descent.validated.losses == ()
    assert same(descent.averages(), descent.weights())
    descent.step()
    assert same(descent.averages(), descent.weights())  # no share of the old averages
    for _ in range(2):
        descent.step()
    expected = [torch.stack(parts).mean(dim=0) for parts in zip(*descent.iterates[-2:], strict=True)]
    torch.testing.assert_close(descent.averages(), expected)


def test_the_weights_come_back_bit_for_bit_whatever_happens():
    descent = Descent(optimiser="asgd", decay=WINDOW)
    descent.step()
    descent.validate(1.0, 1.0, 2.0)
    for _ in range(4):
        descent.step()
    before = descent.weights()
    inside = []
    with contextlib.suppress(ZeroDivisionError), averaged(descent.optimiser):
        inside += descent.weights()
        raise ZeroDivisionError
    assert not same(before, inside)
    assert same(before, descent.weights())


def test_sgd_divides_its_rate_where_asgd_begins_to_average():
    descent = Descent(optimiser="sgd", decay=WINDOW)
    rates = []
    for loss in (3.0, 2.0, 3.0, 4.0, math.nan):
        rates.append(descent.step())
        descent.validate(loss)
    assert [*rates, descent.step()] == [0.5, 0.5, 0.5, 0.5, 0.125, 0.03125]
    assert same(descent.averages(), descent.weights())


def scored(monkeypatch, *losses):
    """Lets the validations find these losses, whatever the weights are, and keeps the weights that were scored."""
    remaining, weights = iter(losses), []

    def fake(model, *given, **chosen):
        weights.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return dataclasses.replace(evaluate(model, *given, **chosen), nll_per_token=next(remaining))

    monkeypatch.setattr("equilibria.lm.training.validation.evaluate", fake)
    return weights


def fitted(value):
    events = []
    trainer = Trainer(value, None, corpus(), on_event=events.append)
    trainer.fit()
    return trainer, events


def of(events, kind):
    return [event for event in events if event["event"] == kind]


def test_validations_divide_the_learning_rate(monkeypatch):
    """Those of the shallow stage, at steps 2, 4, 6, do not count for the implicit one; its own divisions stay."""
    scored(monkeypatch, 1.0, 1.0, 9.0, *(3.0, 4.0, 4.0, 2.0, 1.0, 1.0, 5.0))
    decay = NonMonotone(window=1, divide=2.0, floor=0.0)
    _, events = fitted(experiment(valid_every=2, decay=decay, optimiser="sgd", warmup=0, learning_rate=0.4))
    assert [(event["step"], event["nats"]) for event in of(events, "valid")] == [
        *((2, 1.0), (4, 1.0), (6, 9.0)),
        *((6, 3.0), (8, 4.0), (10, 4.0), (12, 2.0), (14, 1.0), (16, 1.0), (18, 5.0)),
    ]
    rates = [event["learning_rate"] for event in of(events, "step")]
    assert rates == pytest.approx([0.4] * 6 + [0.2] * 4 + [0.1] * 8)


def test_milestones_are_steps_of_the_whole_training():
    _, events = fitted(experiment(decay=Milestones(steps=(5, 12)), warmup=0, learning_rate=1e-3))
    rates = [event["learning_rate"] for event in of(events, "step")]
    assert rates == pytest.approx([1e-3] * 5 + [1e-4] * 7 + [1e-5] * 6)


def test_averages_are_validated_kept_and_used_and_training_goes_on_with_the_weights(tmp_path, monkeypatch):
    losses = [3.0, 1.0, 9.0, *(1.0, 2.0, 3.0), *(0.9 - 0.1 * place for place in range(9))]
    weights = scored(monkeypatch, *losses)
    sgd = {"valid_every": 2, "checkpoint_every": 2, "learning_rate": 0.3, "warmup": 0, "spectral_radius": 0}
    value = experiment(optimiser="asgd", decay=NonMonotone(window=1), **sgd)
    run = Run.start(tmp_path / "run", value)
    trainer = Trainer(value, run, corpus())
    trainer.fit()  # the averaging begins at step 10
    scored(monkeypatch, *losses)
    plain, _ = fitted(experiment(optimiser="sgd", decay=Milestones(steps=(100,)), **sgd))
    assert same_bits(trained_weights(trainer), trained_weights(plain))
    with averaged(trainer.optimiser) as averaging:
        averages = trained_weights(trainer)
    assert averaging
    assert not same_bits(averages, trained_weights(trainer))
    assert same_bits(averages, weights[-1])
    assert run.best().step == 18
    model = value.build(corpus())
    load_weights(model, run.best().model)
    assert same_bits(model.state_dict(), averages)
