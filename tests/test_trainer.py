import copy
import dataclasses
import functools
import itertools
import json
import logging
import math

import pytest
import torch

from equilibria.__main__ import main
from equilibria.cells import TransformerConfig, TrellisConfig
from equilibria.commands.recipe import experiment_of
from equilibria.core.solve import solve
from equilibria.core.stop import Stop
from equilibria.errors import UsageError
from equilibria.fixed_point import Method
from equilibria.gradients import Implicit, Neumann, Phantom
from equilibria.lm.corpora import Segments, copying, prefix_sums
from equilibria.lm.evaluation import evaluate, jacobian_radius, summary
from equilibria.lm.experiments import NonMonotone, Stage, growing_penalty, learning_rate
from equilibria.lm.model import ExtraLosses, LanguageConfig
from equilibria.lm.recipes import RECIPES
from equilibria.lm.report.record import read
from equilibria.lm.runs import Run, events
from equilibria.lm.runs.memory_length import with_memory
from equilibria.lm.runs.trained import load, with_data
from equilibria.lm.training import Trainer, TrainingStopped
from equilibria.lm.training.measure import ngram_baseline
from equilibria.lm.training.step import drawn_penalty
from equilibria.solvers import Picard
from equilibria.stability import jacobian_penalty
from slow_cases import some_slow
from small_experiment import (
    SOLVER,
    STOP,
    Killed,
    corpus,
    experiment,
    kill_at,
    same_bits,
    trained_weights,
    with_stage,
    without_times,
)
from small_run import fails, furnish

# Small models with random weights are solved here, and whether their solves converge is not the subject.
pytestmark = pytest.mark.filterwarnings("ignore::equilibria.ConvergenceWarning")


def fitted(value, **options):
    events = []
    trainer = Trainer(value, None, corpus(), on_event=events.append, **options)
    trainer.fit()
    return trainer, events


@functools.cache
def once():
    """The trainer and the log of the small experiment, for tests that only look at them."""
    return fitted(experiment())


def copied_model():
    """The model that it trained, for tests that change it."""
    return copy.deepcopy(once()[0].model)


def of(events, kind):
    return [event for event in events if event["event"] == kind]


def test_training_learns():
    value = with_stage(with_stage(experiment(), 0, steps=60), 1, steps=40, penalty=0.0)
    cell = TransformerConfig(width=32, heads=2, inner=64, memory=20, positions="decay")
    _, events = fitted(dataclasses.replace(value, model=LanguageConfig(cell=cell)))
    losses = [event["bits"] for event in of(events, "step")]
    assert losses[0] > 4
    assert of(events, "valid")[-1]["bits"] < 3


def test_a_step_has_no_denormal_numbers():
    value = experiment()
    corpus = value.corpus.load()
    trainer, seen = Trainer(value, None, corpus), []
    trainer.model.layer.register_forward_hook(lambda *_: seen.append(bool(torch.full((1,), 1e-39) * 1.0 == 0)))
    segment = next(iter(Segments(corpus.train, batch_size=value.training.batches.batch_size, length=20).one_epoch()))
    trainer.step(segment)
    assert seen == [torch.set_flush_denormal(False)]  # True where the processor can do it
    assert torch.full((1,), 1e-39) * 1.0 != 0


def test_the_log_says_what_happened_in_order():
    trainer, events = once()
    assert [event["event"] for event in events[:3]] == ["start", "baseline", "stage"]
    assert [event["step"] for event in of(events, "step")] == list(range(1, 19))
    assert [event["learning_rate"] for event in of(events, "step")] == [
        learning_rate(s, peak=1e-2, warmup=3, total=18) for s in range(1, 19)
    ]
    assert [(event["step"], event["from"], event["stage"]) for event in of(events, "stage")] == [
        (0, None, "shallow"),
        (6, "shallow", "implicit"),
    ]
    assert events[-1]["event"] == "done"
    assert events[0]["parameters"] == sum(p.numel() for p in trainer.model.parameters())
    json.dumps(events)


def test_both_settings_are_validated_at_the_switch():
    _, events = once()
    at_switch = [event for event in events if event["step"] == 6 and event["event"] in ("valid", "stage")]
    assert [(event["event"], event["stage"]) for event in at_switch] == [
        ("valid", "shallow"),
        ("stage", "implicit"),
        ("valid", "implicit"),
    ]
    assert at_switch[0]["forward"]["evals"] == 4
    assert at_switch[0]["nats"] != at_switch[2]["nats"]


def test_forward_and_backward_solves_are_logged():
    _, events = once()
    shallow, implicit = of(events, "step")[0], of(events, "step")[-1]
    assert shallow["forward"]["evals"] == 4
    assert shallow["backward"] is None
    for cost in (implicit["forward"], implicit["backward"]):
        assert 1 < cost["evals"] <= 9
        assert 0 <= cost["converged"] <= 1
        assert 0 < cost["residual"] < 1
    assert implicit["seconds"] > shallow["seconds"] > 0
    assert implicit["tokens"] == 80


def test_the_speeds_in_the_log_cover_every_step():
    trainer, events = fitted(experiment(log_every=4))
    steps = of(events, "step")
    assert len(steps) < 18
    tokens = sum(trainer._segments().at(position).scored for position in range(18))
    assert sum(event["tokens_per_second"] * event["step_seconds"] for event in steps) == pytest.approx(tokens)
    assert 0 < sum(event["step_seconds"] for event in steps) < events[-1]["seconds"]


def test_penalties_are_drawn():
    _, events = once()
    drawn = [event["penalty"] is not None for event in of(events, "step") if event["stage"] == "implicit"]
    assert 1 <= sum(drawn) <= 11
    assert all(event["penalty"] is None for event in of(events, "step") if event["stage"] == "shallow")


def test_a_step_is_the_textbook_step():
    """Loss plus penalty, clipped by the global norm, one step of Adam: written out by hand."""
    value = with_stage(experiment(clip=0.3), 0, penalty=0.5, gradient=Implicit(), steps=1)
    cell = dataclasses.replace(value.model.cell, dropout=0.0, attention_dropout=0.0)
    value = dataclasses.replace(value, model=dataclasses.replace(value.model, cell=cell, dropout=0.0))
    trainer, twin = Trainer(value, None, corpus()), Trainer(value, None, corpus())
    segment = next(iter(trainer._segments()))
    torch.manual_seed(3)
    step = trainer.step(segment)
    torch.manual_seed(3)
    output = twin.model(segment.tokens, segment.targets, method=value.stages[0].training_method)
    penalty = jacobian_penalty(output.layer.f, output.solution.point).mean()
    (output.nll.mean() + 0.5 * penalty).backward()
    parameters = list(twin.model.parameters())
    norm = torch.stack([p.grad.norm() for p in parameters]).norm()
    optimiser = torch.optim.Adam(parameters, lr=learning_rate(1, peak=1e-2, warmup=3, total=17))
    for p in parameters:
        p.grad *= min(1.0, 0.3 / float(norm))
    optimiser.step()
    assert float(step.gradient_norm) == pytest.approx(float(norm), rel=1e-5)
    for mine, theirs in zip(trainer.model.parameters(), parameters, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=2e-6)


def test_the_penalty_is_that_of_the_jacobian_at_the_equilibrium():
    """At z* and not at f(z*), which a loosely converged solve tells apart; J by the rows of a dense Jacobian."""
    value = experiment()
    value = dataclasses.replace(value, model=dataclasses.replace(value.model, dropout=0.0))
    model = value.model.build(9)
    cell = model.layer.cell
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.mul_(8)
    tokens = torch.arange(12).view(2, 6) % 9
    stop = Stop(rtol=0, atol=0, max_evals=2)
    for gradient in (Implicit(solver=SOLVER, stop=STOP), Phantom(steps=2), Neumann(terms=1)):
        stage = Stage(name="implicit", steps=1, method=Method(SOLVER, stop, gradient), penalty=1.0)
        output = model(tokens, tokens, method=stage.training_method)
        torch.manual_seed(5)
        found = drawn_penalty(stage, output, None)
        with torch.no_grad():
            point = solve(output.layer.f, torch.zeros_like(output.layer.z), SOLVER, stop).z
        assert torch.equal(output.solution.point, point)
        plain = dataclasses.replace(stage, penalty=0.0).training_method
        assert model(tokens, tokens, method=plain).solution.point is None  # a state less in memory
        assert not torch.allclose(output.layer.z, point, rtol=1e-2)
        torch.manual_seed(5)
        noise = torch.randn(point.shape)
        dense = torch.autograd.functional.jacobian(output.layer.f, point).flatten(3)
        expected = torch.einsum("btd,btdn->n", noise, dense).square().mean()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


@pytest.mark.slow
def test_the_penalty_lowers_the_jacobian():
    def penalty_after(weight):
        value = with_stage(with_stage(experiment(), 0, steps=1), 1, steps=40, penalty=weight, penalty_share=1.0)
        trainer, _ = fitted(value)
        segment = next(iter(trainer._segments()))
        output = trainer.model.eval()(segment.tokens, segment.targets)
        return float(jacobian_penalty(output.layer.f, output.layer.z.detach(), samples=8).mean().detach())

    assert penalty_after(5.0) < 0.8 * penalty_after(0.0)


def test_the_same_experiment_gives_the_same_bits_and_another_seed_others():
    first, second, third = once()[0], *(fitted(experiment(seed=seed))[0] for seed in (0, 1))
    assert same_bits(trained_weights(first), trained_weights(second))
    assert not same_bits(trained_weights(first), trained_weights(third))


def test_memory_is_carried_and_reset_where_an_epoch_begins():
    trainer = Trainer(experiment(), None, corpus())
    segments = trainer._segments()
    assert trainer.memory is None
    for segment in (segments.at(0), segments.at(1)):
        trainer.step(segment)
    assert trainer.memory.z.shape == (4, 30, 8)
    trainer.step(dataclasses.replace(segments.at(len(segments)), position=2))
    assert trainer.memory.z.shape == (4, 20, 8)
    assert not trainer.memory.z.requires_grad


def with_model(value, **changes):
    return dataclasses.replace(value, model=dataclasses.replace(value.model, **changes))


def test_the_models_own_losses_are_added_to_the_loss_and_logged_apart():
    losses = ExtraLosses(activation=0.7, temporal_activation=0.3)
    plain = with_model(experiment(clip=None), dropout=0.0)
    trainer = Trainer(with_model(plain, losses=losses), None, corpus())
    twin, without = (Trainer(plain, None, corpus()) for _ in range(2))
    segment = next(iter(trainer._segments()))
    torch.manual_seed(3)
    step = trainer.step(segment)
    torch.manual_seed(3)
    nothing = without.step(segment)
    torch.manual_seed(3)
    output = twin.model(segment.tokens, segment.targets, method=plain.stages[0].method)
    states = output.layer.output
    extra = 0.7 * states.square().mean() + 0.3 * states.diff(dim=1).square().mean()
    (output.nll.mean() + extra).backward()
    extra = extra.detach()
    norm = torch.stack([p.grad.norm() for p in twin.model.parameters()]).norm()
    assert nothing.extra is None
    assert float(step.loss) == pytest.approx(float(nothing.loss))  # the mean of the nats alone
    assert float(step.extra) == pytest.approx(float(extra), rel=1e-5)
    assert float(step.gradient_norm) == pytest.approx(float(norm), rel=1e-5)
    assert float(step.gradient_norm) != pytest.approx(float(nothing.gradient_norm), rel=1e-3)


def test_what_is_added_stands_in_the_log():
    _, events = fitted(with_model(experiment(), losses=ExtraLosses(activation=1.0)))
    assert all(event["extra"] > 0 for event in of(events, "step"))
    _, events = once()
    assert all(event["extra"] is None for event in of(events, "step"))


def test_segments_with_overlap_are_read_without_memory_and_scored_in_part():
    value = experiment(overlap=15, eval_overlap=5, valid_segments=None, warmup=0)
    trainer, twin = Trainer(value, None, corpus()), Trainer(value, None, corpus())
    first, second = itertools.islice(trainer._segments(), 2)
    steps = []
    for segment in (first, second):
        torch.manual_seed(1)
        steps.append(trainer.step(segment))
    assert [step.tokens for step in steps] == [4 * 20, 4 * 5]
    torch.manual_seed(1)
    twin.step(first)
    torch.manual_seed(1)
    nats = twin.model(second.tokens, second.targets, None, method=value.stages[0].method).nll.detach()
    assert float(steps[1].loss) == pytest.approx(float(nats[:, 15:].mean()), rel=1e-5)
    assert float(steps[1].loss) != pytest.approx(float(nats.mean()), rel=1e-5)
    found = trainer.validate()
    assert (found.setting.overlap, found.setting.memory_length) == (5, 0)
    assert found.tokens == 198  # two rows of 99


def test_an_evaluation_with_overlap_scores_every_token_once_with_the_past_of_its_segment():
    model = experiment().build(corpus()).eval()
    valid = corpus().valid
    found = evaluate(model, valid, segment_length=30, overlap=20)
    nats, tokens = 0.0, valid.tokens[None]
    for start in range(0, 199, 10):
        piece = slice(start, start + 30)
        with torch.no_grad():
            scores = model(tokens[:, piece], valid.targets[None, piece]).nll
        nats += float(scores[:, 20 if start else 0 :].sum())
        if start + 30 >= 199:
            break
    assert (found.tokens, found.setting.overlap, found.setting.segment_length) == (199, 20, 30)
    assert found.nll_per_token == pytest.approx(nats / 199, rel=1e-5)
    assert found.nll_per_token != pytest.approx(evaluate(model, valid, segment_length=30).nll_per_token, rel=1e-6)


def test_the_command_reads_with_the_overlap_of_the_training_or_another(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    furnish(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    value = with_data(experiment_of("recipe.py:small"), tmp_path / "text")
    numbers = {"overlap": 3, "measure_memory": False, "spectral_radius": 0}
    value = dataclasses.replace(value, training=value.training.changed(**numbers))
    Trainer(value, Run.start(tmp_path / "run", value), value.corpus.load()).fit()
    loaded = load(tmp_path / "run")
    for chosen, overlap in (((), 3), (("--overlap", "5"), 5), (("--overlap", "0"), 0)):
        assert main(["evaluate", "run", "--max-segments", "4", *chosen]) == 0
        text = " ".join(capsys.readouterr().out.split())
        stream = loaded.corpus.valid
        expected = evaluate(loaded.model, stream, segment_length=8, overlap=overlap, max_segments=4)
        assert f"{expected.bits:.4f} bits" in text
        assert (f"reads the last {overlap} of the one before again" in text) == (overlap > 0)
        assert ("Memory length" in text) == (overlap == 0)
        assert f"{expected.tokens} of {len(stream)}" in text
        assert expected.tokens == 8 + 3 * (8 - overlap)
    assert "at most 7" in fails(capsys, "evaluate", "run", "--overlap", "8")
    assert "--overlap -1: it must be at least 0" in fails(capsys, "evaluate", "run", "--overlap", "-1")


@pytest.mark.parametrize("overlap", [0, 12])
def test_a_trellis_is_trained_validated_and_measured(tmp_path, overlap):
    cell = TrellisConfig(width=6, hidden=5, outputs=6, dropout=0.2, weight_dropout=0.2, std=0.3)
    value = with_model(
        experiment(overlap=overlap, measure_memory=True, memory_depths=(2,), optimiser="sgd", decay=NonMonotone()),
        cell=cell,
        losses=ExtraLosses(activation=2.0, temporal_activation=1.0),
    )
    run = Run.start(tmp_path / "run", value)
    trainer = Trainer(value, run, corpus())
    trainer.fit()
    events = run.events()
    assert [event["step"] for event in of(events, "step")] == list(range(1, 19))
    assert all(math.isfinite(event["loss"]) and event["extra"] > 0 for event in of(events, "step"))
    setting = of(events, "valid")[-1]["setting"]
    assert (setting["memory_length"], setting["overlap"], setting["max_evals"]) == (None, overlap, 8)
    assert of(events, "spectral_radius")[-1]["mean"] > 0
    assert [row["depth"] for row in of(events, "memory")[0]["rows"]] == [None, 2]
    assert all(row["peak_bytes"] > 0 for row in of(events, "memory")[0]["rows"])
    resumed = Trainer(value, run, corpus())
    assert resumed.resume() == 18
    assert same_bits(trained_weights(resumed), trained_weights(trainer))
    with pytest.raises(UsageError, match="the memory of a TrellisConfig has no length"):
        with_memory(value, 3)


@pytest.mark.parametrize(
    ("task", "answers"),
    [(copying(blank=5, train=4, valid=4, test=4), 10), (prefix_sums(length=6, train=4, valid=4, test=4), 6)],
    ids=["copying", "prefix sums"],
)
def test_the_answers_of_a_trellis_are_read_off_its_output(task, answers):
    """Its state is wider than what the head reads."""
    config = LanguageConfig(cell=TrellisConfig(width=6, hidden=5, outputs=6))
    model = config.build(len(task.vocabulary), method=experiment().stages[1].method)
    found = evaluate(model, task.valid, batch_size=2)
    with torch.no_grad():
        model.eval()
        segments = list(Segments(task.valid, batch_size=2).one_epoch())
        right = [_right(model, piece, answers) for piece in segments]
    assert found.accuracy == pytest.approx(float(torch.stack(right).double().mean()))


def _right(model, piece, answers):
    return model.logits(piece.tokens)[0][:, -answers:].argmax(dim=-1) == piece.targets[:, -answers:]


@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_a_non_finite_number_stops_the_run_before_the_weights_change(tmp_path, fault):
    run = Run.start(tmp_path / "run", experiment())
    trainer = Trainer(experiment(), run, corpus())
    before, segments = {}, iter(trainer._segments())
    for _ in range(3):
        trainer.step(next(segments))
    weight = trainer.model.head.bias
    if fault == "loss":
        weight.data[0] = math.nan
    else:
        weight.register_hook(lambda gradient: gradient / 0)
    before = trained_weights(trainer)
    moments = [state["exp_avg"].clone() for state in trainer.optimiser.state.values()]
    with pytest.raises(TrainingStopped, match=rf"Step 4 \(stage 'shallow'\): the {fault} is not finite"):
        trainer.step(next(segments))
    after = trained_weights(trainer)
    assert all(torch.equal(before[name].nan_to_num(), after[name].nan_to_num()) for name in before)
    kept = [state["exp_avg"] for state in trainer.optimiser.state.values()]
    assert all(torch.equal(a, b) for a, b in zip(moments, kept, strict=True))
    with pytest.raises(TrainingStopped):  # there is no checkpoint to go back to
        trainer.fit()
    (event,) = of(run.events(), "stopped")
    assert event["step"] == 4


def test_training_in_bfloat16_is_near_that_in_float32():
    losses = []
    for trainer, log in (once(), fitted(experiment(precision="bfloat16"))):
        assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())
        losses.append(torch.tensor([event["loss"] for event in of(log, "step")]))
    assert not torch.equal(*losses)
    torch.testing.assert_close(*losses, rtol=0.02, atol=0)


def poisoned(trainer, step, *, times):
    """The loss of this step is not finite, so many times; returns the steps that are taken."""
    whole, taken, left = trainer.accumulation.step, [], [None] * times

    def over(*given, **named):
        passed = whole(*given, **named)
        taken.append(trainer.steps_done + 1)
        if taken[-1] == step and left:
            left.pop()
            return dataclasses.replace(passed, loss=passed.loss * math.nan)
        return passed

    object.__setattr__(trainer.accumulation, "step", over)
    return taken


def test_a_step_that_is_not_finite_takes_the_run_back_to_a_checkpoint(tmp_path):
    value = experiment(rollbacks=2)
    run = Run.start(tmp_path / "run", value)
    trainer = Trainer(value, run, corpus())
    taken = poisoned(trainer, 9, times=3)
    with pytest.raises(TrainingStopped, match="Step 9"):
        trainer.fit()
    assert taken == [1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9]
    assert [event["factor"] for event in of(run.events(), "rolled_back")] == [0.5, 0.25]
    assert of(run.events(), "stopped")[0]["step"] == 9
    again = Trainer(value, run, corpus())
    assert again.resume() == 8
    again.fit()  # nothing is wrong with it now
    assert of(run.events(), "done")


def test_a_rollback_halves_the_learning_rate_and_a_resumed_run_remembers(tmp_path):
    value = experiment(rollbacks=1, checkpoint_every=1)
    run = Run.start(tmp_path / "run", value)
    trainer = Trainer(value, run, corpus(), on_event=kill_at(11))
    poisoned(trainer, 9, times=1)
    with pytest.raises(Killed):
        trainer.fit()
    again = Trainer(value, run, corpus())
    assert again.resume() == 10
    again.fit()
    rates = {event["step"]: event["learning_rate"] for event in of(run.events(), "step")}
    _, undisturbed = fitted(value)
    expected = {event["step"]: event["learning_rate"] for event in of(undisturbed, "step")}
    assert rates == {step: rate * (0.5 if step >= 9 else 1) for step, rate in expected.items()}


@pytest.mark.parametrize("line", ["rolled_back", *some_slow("step")])
def test_a_rollback_that_no_checkpoint_has_seen_yet_is_remembered(tmp_path, line):
    """A fault that does not come twice, such as one of the machine: the log alone tells of it."""
    value = experiment(rollbacks=2)
    whole = Run.start(tmp_path / "whole", value)
    uninterrupted = Trainer(value, whole, corpus())
    poisoned(uninterrupted, 9, times=1)
    uninterrupted.fit()
    run, seen = Run.start(tmp_path / "run", value), []

    def on_event(event):
        seen.append(event["event"])
        if "rolled_back" in seen and event["event"] == line:
            raise Killed

    trainer = Trainer(value, run, corpus(), on_event=on_event)
    poisoned(trainer, 9, times=1)
    with pytest.raises(Killed):
        trainer.fit()
    again = Trainer(value, run, corpus())
    assert (again.resume(), again.policy.rollbacks) == (8, 1)
    again.fit()
    assert without_times(run.events()) == without_times(whole.events())
    assert same_bits(trained_weights(again), trained_weights(uninterrupted))


def stopped_at_step_9(tmp_path, value, *, times):
    """The trainer of a run whose faults at step 9 were more than its rollbacks."""
    trainer = Trainer(value, Run.start(tmp_path / "run", value), corpus())
    poisoned(trainer, 9, times=times)
    with pytest.raises(TrainingStopped, match="Step 9"):
        trainer.fit()
    return trainer


def test_a_resumed_run_has_spent_what_it_had_spent(tmp_path):
    value = experiment(rollbacks=2)
    run = stopped_at_step_9(tmp_path, value, times=3).run
    lines = without_times(run.events())
    again = Trainer(value, run, corpus())
    again.resume()
    taken = poisoned(again, 9, times=1)
    with pytest.raises(TrainingStopped, match="Step 9"):
        again.fit()
    assert taken == [9]
    assert without_times(run.events()) == lines


@pytest.mark.parametrize("policy", ["continue", "raise_budget", "skip_step", "stop"])
def test_what_happens_when_solves_fail_is_a_choice(tmp_path, policy):
    value = with_stage(experiment(unconverged=policy, tolerated=0.2), 1, stop=Stop(rtol=1e-6, max_evals=3))
    run = Run.start(tmp_path / "run", value)
    trainer = Trainer(value, run, corpus())
    if policy == "stop":
        with pytest.raises(TrainingStopped, match="did not converge, and 20% are tolerated"):
            trainer.fit()
        assert trainer.steps_done == 6
        return
    before = {}
    trainer.log._on_event = lambda event: before.setdefault(event["step"], trained_weights(trainer))
    trainer.fit()
    found = of(run.events(), "unconverged")
    assert {event["policy"] for event in found} == (set() if policy == "continue" else {policy})
    if policy == "raise_budget":
        method = trainer.policy.method(trainer.stage)
        assert method.stop.max_evals == 24
        assert method.gradient.stop.max_evals == 64
        assert of(run.events(), "step")[-1]["forward"]["evals"] > 4  # the stage's own budget, and one for the graph
        assert of(run.events(), "valid")[-1]["setting"]["max_evals"] == 24
    if policy == "skip_step":
        assert len(found) == 12
        assert all(torch.equal(before[7][name], before[18][name]) for name in before[7])


def test_evaluation_counts_every_token_once_and_carries_memory():
    model = copied_model()
    valid = corpus().valid
    one_piece = evaluate(model, valid, batch_size=1, segment_length=25)
    assert one_piece.tokens == 199
    nats, memory = 0.0, None
    model.eval()
    with torch.no_grad():
        for segment in Segments(valid, batch_size=1, length=25).one_epoch():
            output = model(segment.tokens, segment.targets, memory)
            nats, memory = nats + float(output.nll.sum()), output.memory
    assert one_piece.nll_per_token == pytest.approx(nats / 199, rel=1e-6)
    assert one_piece.perplexity == pytest.approx(math.exp(one_piece.nll_per_token))
    assert one_piece.bits == pytest.approx(one_piece.nll_per_token / math.log(2))
    assert one_piece.accuracy is None
    assert evaluate(model, valid, batch_size=2, segment_length=25, max_segments=2).tokens == 100


def test_evaluation_draws_nothing_and_keeps_the_mode():
    model = copied_model()
    model.train()
    state = torch.get_rng_state()
    evaluate(model, corpus().valid, segment_length=30)
    assert torch.equal(state, torch.get_rng_state())
    assert model.training


def test_evaluation_gives_each_part_its_own_mode_back():
    model = copied_model()
    model.train()
    model.head.eval()
    modes = [module.training for module in model.modules()]
    evaluate(model, corpus().valid, segment_length=30, max_segments=1)
    jacobian_radius(model, corpus().valid, segment_length=30, iterations=3)
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("number", [0, -1])
def test_evaluating_nothing_is_refused(number):
    model = experiment().build(corpus())
    with pytest.raises(ValueError, match=rf"max_segments={number}\): at least 1"):
        evaluate(model, corpus().valid, segment_length=30, max_segments=number)


def test_samples_that_were_never_finite_do_not_count_in_the_mean_residual():
    def solved(*residual):
        solution = solve(torch.cos, torch.zeros(len(residual), 1), Picard(), Stop())
        return summary(dataclasses.replace(solution, residual=torch.tensor(residual)))

    assert solved(0.25, math.inf, 0.75, math.nan)["residual"] == 0.5
    assert math.isnan(solved(math.nan)["residual"])


def test_the_log_is_json_whatever_the_numbers_are(tmp_path):
    def strict(text):
        return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))

    file = tmp_path / "metrics.jsonl"
    events.append(file, {"event": "step", "step": 1, "loss": math.nan, "forward": {"residual": -math.inf, "evals": 3}})
    expected = {"event": "step", "step": 1, "loss": None, "forward": {"residual": None, "evals": 3}}
    assert strict(file.read_text()) == expected
    file.write_text('{"event": "step", "step": 1, "loss": NaN}\n')  # of a version that wrote it so
    events.cut(file, 1)
    assert strict(file.read_text())["loss"] is None


def test_the_stop_for_evaluation_is_used():
    value = with_stage(experiment(), 1, eval_stop=dataclasses.replace(STOP, max_evals=3))
    _, events = fitted(value)
    assert of(events, "valid")[-1]["forward"]["evals"] <= 3
    assert of(events, "step")[-1]["forward"]["evals"] > 3


def jittered():
    """Solves that always spend their budget; that of a training step falls short by up to two evaluations."""
    stop = Stop(rtol=0, atol=0, max_evals=8)
    gradient = Implicit(solver=Picard(), stop=dataclasses.replace(stop, max_evals=5))
    return with_stage(experiment(), 1, stop=stop, gradient=gradient, steps=20, budget_jitter=2)


def test_the_budgets_of_a_stage_are_drawn_in_training_only():
    trainer, events = fitted(jittered())
    steps = [event for event in of(events, "step") if event["stage"] == "implicit"]
    assert {event["forward"]["evals"] - 1 for event in steps} == {6, 7, 8}  # one more carries the graph
    assert {event["backward"]["evals"] for event in steps} == {5}
    assert {event["forward"]["evals"] for event in of(events, "valid") if event["stage"] == "implicit"} == {8}
    assert trainer.model.layer.method == trainer.stage.training_method


@pytest.mark.parametrize("policy", [pytest.param("continue", marks=pytest.mark.slow), "raise_budget"])
def test_nobody_assigns_to_a_layer(monkeypatch, policy):
    value = with_stage(jittered(), 1, stop=Stop(rtol=1e-6, max_evals=8), eval_stop=Stop(rtol=1e-6, max_evals=5))
    numbers = {"unconverged": policy, "tolerated": 0.2, "measure_memory": True, "memory_depths": (2, 3)}
    value = dataclasses.replace(value, training=value.training.changed(**numbers))
    trainer = Trainer(value, None, corpus())
    layer = trainer.model.layer
    before, events, assigned = dict(vars(layer)), [], set()
    trainer.log._on_event = events.append

    def noted(module, name, value, assign=torch.nn.Module.__setattr__):
        if module is layer:
            assigned.add(name)
        assign(module, name, value)

    monkeypatch.setattr(torch.nn.Module, "__setattr__", noted)
    trainer.fit()
    assert assigned == {"training"}  # by train() and eval()
    assert vars(layer).keys() == before.keys()
    assert all(vars(layer)[name] is before[name] for name in ("method", "eval_stop"))
    assert before["method"] == value.stages[1].training_method
    assert before["eval_stop"] == value.stages[1].eval_stop
    assert len({event["forward"]["evals"] for event in of(events, "step") if event["stage"] == "implicit"}) > 1
    assert trainer.policy.factor == (8 if policy == "raise_budget" else 1)
    assert [row["depth"] for row in of(events, "memory")[0]["rows"]] == [None, 2, 3]


def test_a_model_called_after_the_training_solves_as_in_the_last_stage():
    value = with_stage(
        experiment(), 1, stop=Stop(rtol=0, atol=0, max_evals=6), eval_stop=Stop(rtol=0, atol=0, max_evals=9)
    )
    trainer, _ = fitted(value)
    segment, last = next(iter(trainer._segments())), value.stages[1]
    for mode, method in ((True, last.method), (False, last.evaluation_method)):
        trainer.model.train(mode)
        outputs = []
        for chosen in (None, method):
            torch.manual_seed(3)
            outputs.append(trainer.model(segment.tokens, segment.targets, trainer.memory, method=chosen))
        assert torch.equal(outputs[0].nll, outputs[1].nll)
        assert outputs[0].solution.evals == outputs[1].solution.evals == (7 if mode else 10)


def test_drawn_budgets_are_the_same_after_an_interruption(tmp_path):
    def stop_at_step_20(event):
        if event["step"] == 20:
            raise KeyboardInterrupt

    whole, events = fitted(jittered())
    run = Run.start(tmp_path / "run", jittered())
    with pytest.raises(KeyboardInterrupt):
        Trainer(jittered(), run, corpus(), on_event=stop_at_step_20).fit()
    torch.manual_seed(7)
    resumed = Trainer(jittered(), run, corpus())
    assert resumed.resume() == 16
    resumed.fit()
    assert same_bits(trained_weights(resumed), trained_weights(whole))
    expected = [event["forward"]["evals"] for event in of(events, "step")]
    assert [event["forward"]["evals"] for event in of(run.events(), "step")] == expected


def test_copying_trains_and_reports_the_share_of_right_answers():
    recipe = RECIPES["copying"]()
    task = copying(blank=5, train=12, valid=8, test=4)
    value = dataclasses.replace(
        recipe,
        stages=(dataclasses.replace(recipe.stages[0], steps=2), dataclasses.replace(recipe.stages[1], steps=2)),
        training=recipe.training.changed(
            batch_size=4, eval_batch_size=4, valid_segments=None, measure_memory=False, warmup=0
        ),
    )
    events = []
    Trainer(value, None, task, on_event=events.append).fit()
    valid = of(events, "valid")[-1]
    assert valid["tokens"] == 8 * 25
    assert 0 <= valid["accuracy"] <= 1
    assert not of(events, "baseline")


def test_the_yardstick_is_better_with_longer_contexts():
    rows = ngram_baseline(corpus())
    assert [row["label"] for row in rows] == [f"Witten–Bell order {order}" for order in (1, 2, 3, 4)]
    assert rows[0]["bits"] > rows[1]["bits"] > 0


def test_a_run_that_has_begun_is_not_begun_again(tmp_path):
    """Its log would tell of two trainings, and its newest checkpoint could be that of the first one."""
    value, other = experiment(), experiment(learning_rate=0.1)
    run = Run.start(tmp_path / "run", value)
    with pytest.raises(Killed):
        Trainer(value, run, corpus(), on_event=kill_at(9)).fit()
    lines = run.events()
    with pytest.raises(ValueError, match=r"has begun.*resume\(\) before fit\(\)"):
        Trainer(value, Run.open(run.path), corpus()).fit()
    for path in (run.path, Run.start(tmp_path / "unused", value).path):
        with pytest.raises(ValueError, match=r"started with training\.optimisation\.learning_rate = 0\.01"):
            Trainer(other, Run.open(path), corpus()).fit()
    assert run.events() == lines
    again = Trainer(value, Run.open(run.path), corpus())
    assert again.resume() == 8
    again.fit()
    assert [event["event"] for event in run.events()].count("start") == 1


def test_the_end_of_a_training_stands_in_its_log_once(tmp_path):
    trainer = stopped_at_step_9(tmp_path, experiment(rollbacks=0), times=1)
    run = trainer.run
    for _ in range(2):  # the fault does not come again, and then there is nothing left to train
        trainer.fit()
    found = [event["event"] for event in run.events()]
    assert (found.count("stopped"), found.count("done"), found[-1]) == (0, 1, "done")
    assert [event["step"] for event in of(run.events(), "step")] == list(range(1, 19))


def test_a_run_is_not_overwritten(tmp_path):
    path = tmp_path / "run"
    Run.start(path, experiment())
    with pytest.raises(ValueError, match="already holds a run; continue it with --resume"):
        Run.start(path, experiment())
    assert Run.start(path, experiment(), resume=True).experiment() == experiment()
    with pytest.raises(ValueError, match=r"training\.seed = 0 and cannot be continued with 7"):
        Run.start(path, experiment(seed=7), resume=True)
    with pytest.raises(ValueError, match="one of the two"):
        Run.start(path, experiment(), resume=True, overwrite=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="exists and is not a run"):
        Run.start(tmp_path / "mine", experiment())
    with pytest.raises(FileNotFoundError, match="holds no run"):
        Run.open(tmp_path / "mine")


def test_only_a_run_is_overwritten(tmp_path):
    path = tmp_path / "run"
    run = Run.start(path, experiment(), overwrite=True)  # there is none yet
    Trainer(experiment(), run, corpus()).fit()
    (path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds notes\.txt beside a run"):
        Run.start(path, experiment(), overwrite=True)
    assert run.newest().step == 18
    (path / "notes.txt").unlink()
    new = Run.start(path, experiment(seed=7), overwrite=True)
    assert run.experiment().training.seed == 0  # until the new one has a checkpoint
    assert run.newest().step == 18
    new.settle()
    assert [entry.name for entry in path.iterdir()] == ["experiment.json"]
    assert run.experiment().training.seed == new.experiment().training.seed == 7
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="exists and is not a run"):
        Run.start(tmp_path / "mine", experiment(), overwrite=True)
    assert (tmp_path / "mine" / "thesis.tex").exists()


def test_the_best_checkpoint_is_kept_and_found(tmp_path, caplog):
    value = with_stage(experiment(valid_every=2, checkpoint_every=2), 1, steps=24)
    run = Run.start(tmp_path / "run", value)
    with caplog.at_level(logging.WARNING):
        Trainer(value, run, corpus()).fit()
    valid = [event for event in of(run.events(), "valid") if event["stage"] == "implicit"]
    best = min(valid, key=lambda event: event["nats"])
    assert run.best().step == best["step"]
    assert run.best().state["best"] == {"step": best["step"], "nats": best["nats"], "stage": "implicit"}
    assert run.newest().step == 30
    assert len(list(run.checkpoints.iterdir())) <= 3
    assert not caplog.records


def test_stages_that_solve_alike_have_one_best_checkpoint(tmp_path, monkeypatch):
    """With a growing penalty the best may be of an earlier part; the shallow stage does not take part."""
    shallow, implicit = experiment(valid_every=3).stages
    parts = growing_penalty(implicit, first=0.1, increment=0.1, every=6, done=6)
    value = dataclasses.replace(experiment(valid_every=3, checkpoint_every=3), stages=(shallow, *parts))
    scores = iter([1.0, 0.9, *(5 + place for place in range(20))])  # worse and worse from the switch on
    monkeypatch.setattr(
        "equilibria.lm.training.validation.evaluate",
        lambda *given, **chosen: dataclasses.replace(evaluate(*given, **chosen), nll_per_token=next(scores)),
    )
    run = Run.start(tmp_path / "run", value)
    Trainer(value, run, corpus()).fit()
    assert [stage.name for stage in parts] == ["implicit γ=0.1", "implicit γ=0.2"]
    assert run.best().state["best"] == {"step": 6, "nats": 5, "stage": "implicit γ=0.1"}
    found = read(run.path).best
    assert (found["step"], found["nats"], found["stage"]) == (6, 5, "implicit γ=0.1")


def test_a_last_stage_without_a_finite_score_leaves_the_best_of_the_stage_before(tmp_path, monkeypatch):
    value = experiment(valid_every=3, checkpoint_every=3)
    scores = iter([2.0, 1.0, *itertools.repeat(math.nan, 9)])
    monkeypatch.setattr(
        "equilibria.lm.training.validation.evaluate",
        lambda *given, **chosen: dataclasses.replace(evaluate(*given, **chosen), nll_per_token=next(scores)),
    )
    run = Run.start(tmp_path / "run", value)
    Trainer(value, run, corpus()).fit()
    assert run.newest().step == 18
    assert run.best().step == read(run.path).best["step"] == 6
    assert run.best().state["best"] == {"step": 6, "nats": None, "stage": "shallow"}  # nats of another kind of solve


def test_the_log_goes_to_tensorboard_too(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = Run.start(tmp_path / "run", experiment(tensorboard=True))
    Trainer(experiment(tensorboard=True), run, corpus()).fit()
    board = EventAccumulator(str(run.path / "tensorboard")).Reload()
    expected = [event["loss"] for event in of(run.events(), "step")]
    assert [scalar.value for scalar in board.Scalars("step/loss")] == pytest.approx(expected)


def test_without_tensorboard_the_extra_is_named(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    run = Run.start(tmp_path / "run", experiment(tensorboard=True))
    with pytest.raises(ModuleNotFoundError, match=r"equilibria\[tensorboard\]"):
        Trainer(experiment(tensorboard=True), run, corpus()).fit()


def test_a_device_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"device='cuda:99'.*cpu"):
        Trainer(experiment(device="cuda:99"), None, corpus())


@pytest.mark.gpu
def test_training_on_a_gpu():
    _, events = fitted(experiment(device="cuda", measure_memory=True, memory_depths=(2,)))
    assert events[-1]["event"] == "done"
    assert of(events, "memory")[0]["rows"][0]["peak_bytes"] > 0
