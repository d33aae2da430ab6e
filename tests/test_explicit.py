"""The explicit baseline of an experiment: sizes, agreement with the equilibrium, training and resuming."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil

import pytest
import torch

import equilibria
from equilibria import Anderson, Implicit, Method, Stop
from equilibria.cells import ChainConfig, TransformerConfig, TrellisConfig
from equilibria.layers.cell import Cell
from equilibria.layers.equilibrium import Equilibrium
from equilibria.lm.evaluation import evaluate
from equilibria.lm.experiments import Experiment, Stage, explicit, from_json, to_json
from equilibria.lm.experiments.stage import network_of
from equilibria.lm.model import Explicit, LanguageConfig, RecurrentConfig
from equilibria.lm.runs import Run, checkpoint
from equilibria.lm.training import Trainer
from slow_cases import some_slow
from small_experiment import (
    Killed,
    corpus,
    experiment,
    finished,
    kill_at,
    same_bits,
    trained_weights,
    without_times,
)

WAYS = pytest.mark.parametrize(
    "choices",
    [{}, *some_slow({"memory": "layers"}), {"tied": False}, *some_slow({"checkpoint": True})],
    ids=["tied", "layer-memory", "untied", "recomputed"],
)
CELL = TransformerConfig(width=8, heads=2, inner=12, memory=30)


def count(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def model(value: Experiment):
    torch.manual_seed(0)
    return value.build(corpus())


def test_the_baseline_keeps_the_shallow_stage_and_nothing_that_needs_a_fixed_point():
    value, baseline = experiment(), explicit(experiment(), 5)
    shallow, stage = baseline.stages
    assert (shallow.name, shallow.steps, shallow.depth) == ("shallow", value.stages[0].steps, 3)
    assert (baseline.name, stage.name, stage.steps, stage.penalty) == ("small-5-layers", "explicit", 12, 0)
    assert (stage.method, stage.eval_stop, stage.warm, stage.depth) == (None, None, False, None)
    assert baseline.model.explicit == Explicit(depth=5)
    assert (baseline.corpus, baseline.model.cell) == (value.corpus, value.model.cell)
    assert baseline.training == value.training.changed(spectral_radius=0)
    assert explicit(value, 5, tied=False).name == "small-5-layers-untied"
    assert [stage.name for stage in explicit(value, 3).stages] == ["explicit"]  # the shallow network is as deep


@pytest.mark.parametrize(
    "choices", [*some_slow({}, {"memory": "layers"}), {"tied": False}], ids=["last", "layers", "untied"]
)
def test_a_shallow_stage_trains_the_first_layers_and_a_resumed_run_knows_which(tmp_path, choices):
    value = explicit(experiment(checkpoint_every=1, keep=30), 5, **choices)
    run = Run.start(tmp_path / "run", value)
    trainer = Trainer(value, run, corpus())
    trainer.fit()
    whole = trained_weights(trainer)
    for later in list(checkpoint.all_in(run.checkpoints)):  # as if the run had been stopped in its shallow stage
        if int(later.name.removeprefix("step-")) > 4:
            shutil.rmtree(later)
    loaded = equilibria.load(run.path, checkpoint="last")
    assert (loaded.stage.name, loaded.model.layer.depth) == ("shallow", 3)
    assert math.isfinite(evaluate(loaded.model, corpus().valid, segment_length=20).nll_per_token)
    assert len(loaded.generate("a", 5)) == 5
    again = Trainer(value, run, corpus())
    assert again.resume() == 4
    again.fit()
    assert same_bits(trained_weights(again), whole)


@pytest.mark.parametrize("memory", ["last", "layers"])
def test_tied_layers_have_the_parameters_of_the_equilibrium(memory):
    assert count(model(explicit(experiment(), 7, memory=memory))) == count(model(experiment()))


def test_untied_layers_have_each_the_parameters_of_a_block_of_transformer_xl():
    value = explicit(experiment(), 5, tied=False)
    cell = value.model.cell
    assert (cell.injection, cell.affine, cell.weight_norm, cell.variational) == (False, True, False, False)
    assert cell.norm == "post"
    assert (cell.width, cell.heads, cell.inner, cell.memory, cell.dropout) == (8, 2, 12, 30, 0.1)
    outside = count(model(experiment())) - count(model(experiment()).layer)
    assert count(model(value)) == 5 * count(cell.build()) + outside


@pytest.mark.parametrize("init", ["normal", "default_fan_in"])
def test_untied_layers_start_as_transformer_xl_or_by_their_width_as_the_equilibrium(init):
    whole = experiment()
    cell = dataclasses.replace(whole.model.cell, init=init, std=0.01)
    untied = explicit(
        dataclasses.replace(whole, model=dataclasses.replace(whole.model, cell=cell, std=0.1)), 3, tied=False
    )
    start = (untied.model.cell.init, untied.model.cell.std, untied.model.std)
    assert start == (("normal", 0.02, 0.02) if init == "normal" else ("default_fan_in", 0.02, 0.1))


def test_the_tied_twin_is_the_equilibrium_set_to_that_many_iterations():
    """Over two segments; with a memory a layer it is the same network until there is something to remember."""
    value = experiment()
    twin, layers = (model(explicit(value, 4, memory=memory)).eval() for memory in ("last", "layers"))
    equilibrium = model(value).eval()
    assert isinstance(equilibrium.layer, Equilibrium)
    for one, two, three in zip(*(net.parameters() for net in (twin, equilibrium, layers)), strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)
    networks, choices = (twin, equilibrium, layers), ({}, {"method": network_of(4).method}, {})
    ids, memories = torch.randint(len(corpus().vocabulary), (2, 2, 9)), (None, None, None)
    for place, segment in enumerate(ids):
        parts = zip(networks, memories, choices, strict=True)
        found = [network(segment, segment, past, **choice) for network, past, choice in parts]
        memories = [output.memory for output in found]
        torch.testing.assert_close(found[0].nll, found[1].nll, rtol=0, atol=1e-6)
        assert torch.allclose(found[0].nll, found[2].nll, rtol=0, atol=1e-6) == (place == 0)


@WAYS
def test_twins_survive_json(choices):
    value = explicit(experiment(), 3, **choices)
    assert from_json(json.loads(json.dumps(to_json(value)))) == value


def test_the_twin_of_a_chain_is_a_stack_of_chains():
    chain = dataclasses.replace(experiment(), model=LanguageConfig(cell=ChainConfig(cells=(CELL, CELL))))
    value = explicit(chain, 3, tied=False)
    assert [cell.injection for cell in value.model.cell.cells] == [False, False]
    assert from_json(json.loads(json.dumps(to_json(value)))) == value
    trainer = Trainer(value, None, corpus())
    assert torch.isfinite(trainer.step(next(iter(trainer._segments()))).loss)


@dataclasses.dataclass(frozen=True)
class PlainConfig:
    """A cell of one's own: it knows nothing of Transformers."""

    width: int = 8
    outputs: int = 8

    def build(self) -> Cell:
        raise NotImplementedError


def test_what_has_no_twin_is_refused(unhooked):
    value = experiment()
    with pytest.raises(ValueError, match=r"explicit\(depth=0\): a network has at least one layer"):
        explicit(value, 0)
    with pytest.raises(ValueError, match="an explicit network of 3 layers already"):
        explicit(explicit(value, 3), 3)
    with pytest.raises(ValueError, match="its model is a RecurrentConfig, which has no equilibrium"):
        explicit(dataclasses.replace(value, model=RecurrentConfig(), stages=(Stage("all", 6),)), 3)
    own = dataclasses.replace(value, model=LanguageConfig(cell=PlainConfig()))
    with pytest.raises(ValueError, match="a PlainConfig has no affine, attention_norm, init"):
        explicit(own, 3, tied=False)
    assert explicit(own, 3).model.cell == PlainConfig()
    trellis = dataclasses.replace(value, model=LanguageConfig(cell=TrellisConfig(outputs=400)))
    with pytest.raises(ValueError, match="a TrellisNet is weight-tied"):
        explicit(trellis, 3, tied=False)


@WAYS
def test_a_twin_trains_and_continues_with_the_same_bits(tmp_path, choices):
    value = explicit(experiment(), 3, **choices)
    weights, events = finished(tmp_path / "whole", value)
    losses = [event["loss"] for event in events if event["event"] == "step"]
    assert losses[-1] < losses[0] - 0.1
    assert all(event["forward"] is None for event in events if event["event"] == "step")
    with pytest.raises(Killed):
        finished(tmp_path / "run", value, on_event=kill_at(11))
    resumed, resumed_events = finished(tmp_path / "run", value, resume=True)
    assert same_bits(resumed, weights)
    assert without_times(resumed_events) == without_times(events)


@WAYS
def test_a_score_says_how_long_the_memory_is_and_that_nothing_was_solved(choices):
    found = evaluate(model(explicit(experiment(), 3, **choices)), corpus().valid, segment_length=20, batch_size=3)
    setting = found.setting
    assert (setting.memory_length, setting.max_evals, setting.rtol, found.forward) == (30, None, None, None)
    assert (setting.tokens, setting.stream_tokens) == (198, 199)


def test_an_equilibrium_says_with_which_stop_it_was_evaluated():
    equilibrium = LanguageConfig(cell=CELL).build(
        len(corpus().vocabulary), method=Method(Anderson(), Stop(), Implicit()), eval_stop=Stop(rtol=0.5)
    )
    setting = evaluate(equilibrium, corpus().valid, segment_length=50, max_segments=2).setting
    assert (setting.memory_length, setting.max_evals, setting.rtol) == (30, 30, 0.5)
    assert (setting.batch_size, setting.segment_length, setting.tokens) == (1, 50, 100)
