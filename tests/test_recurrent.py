"""The recurrent baselines: sizes, memory, training, resuming and evaluation."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from equilibria import Method, take_rows
from equilibria.lm.evaluation import evaluate, jacobian_radius
from equilibria.lm.experiments import Stage, from_json, to_json
from equilibria.lm.model import LanguageConfig, RecurrentConfig
from equilibria.lm.recipes.copying import copying
from equilibria.lm.recipes.copying_recurrent import copying_gru, copying_lstm
from equilibria.lm.training import Trainer
from small_experiment import Killed, corpus, experiment, finished, kill_at, same_bits, without_times

V, B, T = 10, 3, 6
NETWORKS = pytest.mark.parametrize("network", ["lstm", "gru"])


def built(vocabulary_size=V, **choices):
    return RecurrentConfig(**{"hidden": 8, "inputs": 4} | choices).build(vocabulary_size)


def tokens(time=T):
    return torch.randint(V, (B, time))


@pytest.mark.parametrize(("network", "hidden", "parameters"), [("lstm", 57, 14_260), ("gru", 65, 13_920)])
def test_the_baselines_of_the_paper_have_14_thousand_parameters_and_a_number_a_symbol(network, hidden, parameters):
    model = built(network=network, hidden=hidden, inputs=1)
    assert model.embedding.weight.shape == (V, 1)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters + V


@NETWORKS
def test_two_segments_joined_by_memory_are_one(network):
    model = built(network=network).double().eval()
    ids, targets = tokens(8), tokens(8)
    joint = model(ids, targets)
    first = model(ids[:, :5], targets[:, :5])
    second = model(ids[:, 5:], targets[:, 5:], first.memory)
    torch.testing.assert_close(torch.cat([first.nll, second.nll], dim=1), joint.nll, rtol=0, atol=1e-12)
    assert not torch.allclose(model(ids[:, 5:], targets[:, 5:]).nll, second.nll)


@NETWORKS
def test_it_sees_no_future_and_solves_nothing(network):
    model, ids = built(network=network).double().eval(), tokens()
    changed = ids.clone()
    changed[:, -1] = (ids[:, -1] + 1) % V
    logits, memory = model.logits(ids)
    other, _ = model.logits(changed)
    assert torch.equal(logits[:, :-1], other[:, :-1])
    assert not torch.equal(logits[:, -1], other[:, -1])
    assert not memory.h.requires_grad
    out = model(ids, ids).layer
    assert out.solution is None
    with pytest.raises(TypeError, match="no map"):
        out.f(out.z)


def test_every_parameter_gets_a_gradient():
    model = built(dropout=0.2)
    first = model(tokens(), tokens())
    model(tokens(), tokens(), first.memory).nll.mean().backward()
    assert all((parameter.grad != 0).any() for parameter in model.parameters())


@NETWORKS
def test_it_continues_a_text_as_if_it_read_the_whole_again(network):
    model, prompt = built(network=network), tokens(4)
    text = model.generate(prompt, length=5, temperature=0)
    whole = prompt
    for _ in range(5):
        whole = torch.cat([whole, model.eval().logits(whole)[0][:, -1:].argmax(dim=-1)], dim=1)
    assert torch.equal(text, whole[:, 4:])


def test_a_memory_of_other_streams_is_refused(unhooked):
    model = built()
    memory = model(tokens(), tokens()).memory
    with pytest.raises(ValueError, match="memory is of 3 streams and the input of 2"):
        model(tokens()[:2], tokens()[:2], memory)


@NETWORKS
def test_the_rows_of_its_memory_are_its_streams(network):
    model, index = built(network=network).double().eval(), torch.tensor([2, 0, 2])
    ids, following = tokens(), tokens()
    memory = model(ids, ids).memory
    found = model(following[index], following[index], take_rows(memory, index)).nll
    torch.testing.assert_close(found, model(following, following, memory).nll[index], rtol=0, atol=1e-12)


def test_it_has_no_use_for_a_method():
    with pytest.raises(ValueError, match=r"a recurrent network solves nothing and has one layer"):
        RecurrentConfig().build(V, method=Method())
    with pytest.raises(TypeError, match="Recurrent solves nothing, so it has no use for method="):
        built()(tokens(), tokens(), method=Method())


@pytest.mark.parametrize(
    ("choices", "sentence"),
    [
        ({"network": "rnn"}, "network is 'lstm' or 'gru'"),
        ({"hidden": 0}, "hidden is at least 1"),
        ({"inputs": 0}, "inputs is at least 1"),
        ({"inputs": 2, "dropout": 1.0}, r"dropout=1\.0"),
        ({"dropout": 0.2}, "leaves nothing to read"),
    ],
)
def test_impossible_configurations_are_refused(unhooked, choices, sentence):
    with pytest.raises(ValueError, match=sentence):
        RecurrentConfig(**choices)


def recurrent(network="lstm", **training):
    value = experiment(spectral_radius=0, **training)
    stages = tuple(Stage(stage.name, stage.steps) for stage in value.stages)
    model = RecurrentConfig(network=network, hidden=8, inputs=4, dropout=0.1)
    return dataclasses.replace(value, model=model, stages=stages)


@NETWORKS
def test_an_experiment_with_it_survives_json(network):
    value = recurrent(network)
    assert from_json(json.loads(json.dumps(to_json(value)))) == value


@NETWORKS
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, network):
    value = recurrent(network)
    weights, events = finished(tmp_path / "whole", value)
    with pytest.raises(Killed):
        finished(tmp_path / "run", value, on_event=kill_at(11))
    resumed, resumed_events = finished(tmp_path / "run", value, resume=True)
    assert same_bits(resumed, weights)
    assert without_times(resumed_events) == without_times(events)


def test_it_learns_a_sentence_and_its_score_says_that_nothing_was_solved():
    trainer = Trainer(recurrent(learning_rate=3e-2), None, corpus())
    before = evaluate(trainer.model, corpus().valid, segment_length=50)
    trainer.fit()
    after = evaluate(trainer.model, corpus().valid, segment_length=50)
    assert after.nll_per_token < before.nll_per_token - 0.3
    setting = after.setting
    assert (setting.max_evals, setting.rtol, setting.memory_length, after.forward) == (None, None, None, None)
    with pytest.raises(TypeError, match="Equilibrium"):
        jacobian_radius(trainer.model, corpus().valid, segment_length=30)


def test_the_recipes_are_copying_with_another_model():
    whole = copying()
    for value in (copying_lstm(), copying_gru()):
        assert value.corpus == whole.corpus
        assert (
            value.training.optimisation.optimiser,
            value.training.optimisation.learning_rate,
            value.training.optimisation.clip,
        ) == ("adam", 1e-3, 1.0)
        assert not isinstance(value.model, LanguageConfig)
        settings = whole.training
        same = {
            "learning_rate": settings.optimisation.learning_rate,
            "spectral_radius": settings.log.spectral_radius,
            "valid_every": settings.validation.valid_every,
        }
        assert value.training.changed(**same) == whole.training
