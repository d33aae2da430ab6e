"""The recurrent and convolutional baselines: sizes, memory, training, resuming and evaluation."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from equilibria import Method, take_rows
from equilibria.core.trees import tensors_in
from equilibria.lm.evaluation import evaluate, jacobian_radius
from equilibria.lm.experiments import Stage, from_json, to_json
from equilibria.lm.model import ConvolutionalConfig, LanguageConfig, RecurrentConfig
from equilibria.lm.recipes.copying import copying
from equilibria.lm.recipes.copying_baselines import copying_gru, copying_lstm, copying_tcn
from equilibria.lm.training import Trainer
from small_experiment import Killed, corpus, experiment, finished, kill_at, same_bits, without_times

V, B, T = 10, 3, 6
NETWORKS = pytest.mark.parametrize("network", ["lstm", "gru", "tcn"])


def config(network="lstm", **choices):
    """Small models of each kind; the TCN sees 1 + 2 · 2 · 3 = 13 positions."""
    if network == "tcn":
        return ConvolutionalConfig(**{"channels": 8, "levels": 2, "kernel": 3, "inputs": 4} | choices)
    return RecurrentConfig(**{"network": network, "hidden": 8, "inputs": 4} | choices)


def built(network="lstm", vocabulary_size=V, **choices):
    return config(network, **choices).build(vocabulary_size)


def tokens(time=T):
    return torch.randint(V, (B, time))


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        (RecurrentConfig(network="lstm", hidden=57), 14_260),
        (RecurrentConfig(network="gru", hidden=65), 13_920),
        (ConvolutionalConfig(), 15_550),
    ],
    ids=["lstm", "gru", "tcn"],
)
def test_the_baselines_of_the_paper_have_14_to_16_thousand_parameters_and_a_number_per_symbol(model, parameters):
    model = model.build(V)
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
    assert not any(tensor.requires_grad for tensor in tensors_in(memory))
    out = model(ids, ids).layer
    assert out.solution is None
    with pytest.raises(TypeError, match="no map"):
        out.f(out.z)


@NETWORKS
def test_every_parameter_gets_a_gradient(network):
    model = built(network, dropout=0.2)
    first = model(tokens(), tokens())
    model(tokens(), tokens(), first.memory).nll.mean().backward()
    assert all((parameter.grad != 0).any() for parameter in model.parameters())


def test_a_tcn_sees_as_many_positions_as_its_config_says():
    model, ids = built("tcn").double().eval(), torch.randint(V, (1, 20))
    seen = config("tcn").seen
    logits = model.logits(ids)[0]
    for back, same in ((seen - 1, False), (seen, True)):
        changed = ids.clone()
        changed[0, 19 - back] = (ids[0, 19 - back] + 1) % V
        assert torch.equal(model.logits(changed)[0][0, 19], logits[0, 19]) is same


def test_a_tcn_is_the_network_of_its_equation():
    layer = ConvolutionalConfig(channels=3, levels=2, kernel=2, inputs=2).layer().double()
    x = torch.randn(1, 5, 2, dtype=torch.float64)
    y = [x[0, t] for t in range(5)]
    for level, block in enumerate(layer.blocks):
        d, skip = 2**level, y
        for convolution in (block.first, block.second):
            past = [torch.zeros_like(y[0])] * d + y
            w, b = convolution.weight, convolution.bias
            y = [torch.relu(w[:, :, 0] @ past[t] + w[:, :, 1] @ past[t + d] + b) for t in range(5)]
        if level == 0:
            skip = [block.skip.weight[:, :, 0] @ value + block.skip.bias for value in skip]
        y = [torch.relu(a + b) for a, b in zip(y, skip, strict=True)]
    torch.testing.assert_close(layer(x).z[0], torch.stack(y), rtol=0, atol=1e-12)


@NETWORKS
def test_it_continues_a_text_as_if_it_read_the_whole_again(network):
    model, prompt = built(network=network), tokens(4)
    text = model.generate(prompt, length=5, temperature=0)
    whole = prompt
    for _ in range(5):
        whole = torch.cat([whole, model.eval().logits(whole)[0][:, -1:].argmax(dim=-1)], dim=1)
    assert torch.equal(text, whole[:, 4:])


@NETWORKS
def test_a_memory_of_other_streams_is_refused(unhooked, network):
    model = built(network)
    memory = model(tokens(), tokens()).memory
    with pytest.raises(ValueError, match="memory is of 3 streams and the input of 2"):
        model(tokens()[:2], tokens()[:2], memory)


@pytest.mark.parametrize(
    ("network", "other"),
    [
        ("tcn", {"network": "tcn", "levels": 3}),
        ("tcn", {"network": "tcn", "levels": 1}),
        ("tcn", {"network": "tcn", "kernel": 4}),
        ("tcn", {"network": "tcn", "kernel": 2}),
        ("tcn", {"network": "tcn", "channels": 6}),
        ("tcn", {"network": "lstm"}),
        ("lstm", {"network": "tcn"}),
        ("lstm", {"network": "gru"}),
        ("lstm", {"network": "lstm", "hidden": 6}),
        ("gru", {"network": "lstm"}),
        ("gru", {"network": "gru", "hidden": 6}),
    ],
)
@pytest.mark.parametrize("time", [1, 6])
def test_the_memory_of_another_network_is_refused(unhooked, network, other, time):
    memory = built(**other)(tokens(), tokens()).memory
    with pytest.raises(ValueError, match="continues only the network that returned it"):
        built(network)(tokens(time), tokens(time), memory)


@NETWORKS
def test_the_rows_of_its_memory_are_its_streams(network):
    model, index = built(network=network).double().eval(), torch.tensor([2, 0, 2])
    ids, following = tokens(), tokens()
    memory = model(ids, ids).memory
    found = model(following[index], following[index], take_rows(memory, index)).nll
    torch.testing.assert_close(found, model(following, following, memory).nll[index], rtol=0, atol=1e-12)


@NETWORKS
def test_it_has_no_use_for_a_method(network):
    with pytest.raises(ValueError, match=r"this network solves nothing and has one depth"):
        config(network).build(V, method=Method())
    with pytest.raises(TypeError, match="solves nothing, so it has no use for method="):
        built(network)(tokens(), tokens(), method=Method())


@pytest.mark.parametrize(
    ("choices", "sentence"),
    [
        ({"network": "rnn"}, "network is 'lstm' or 'gru'"),
        ({"hidden": 0}, "hidden is at least 1"),
        ({"network": "tcn", "channels": 0}, r"ConvolutionalConfig\(channels=0\): channels is at least 1"),
        ({"network": "tcn", "levels": -1}, "levels is at least 1"),
        ({"network": "tcn", "kernel": 0}, "kernel is at least 1"),
        ({"inputs": 0}, "inputs is at least 1"),
        ({"inputs": 2, "dropout": 1.0}, r"dropout=1\.0"),
        ({"inputs": 1, "dropout": 0.2}, "leaves nothing to read"),
    ],
)
def test_impossible_configurations_are_refused(unhooked, choices, sentence):
    with pytest.raises(ValueError, match=sentence):
        config(**choices)


def trained_with(network="lstm", **training):
    value = experiment(spectral_radius=0, **training)
    stages = tuple(Stage(stage.name, stage.steps) for stage in value.stages)
    model = config(network, dropout=0.1)
    return dataclasses.replace(value, model=model, stages=stages)


@NETWORKS
def test_an_experiment_with_it_survives_json(network):
    value = trained_with(network)
    assert from_json(json.loads(json.dumps(to_json(value)))) == value


@NETWORKS
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, network):
    value = trained_with(network)
    weights, events = finished(tmp_path / "whole", value)
    with pytest.raises(Killed):
        finished(tmp_path / "run", value, on_event=kill_at(11))
    resumed, resumed_events = finished(tmp_path / "run", value, resume=True)
    assert same_bits(resumed, weights)
    assert without_times(resumed_events) == without_times(events)


def test_it_learns_a_sentence_and_its_score_says_that_nothing_was_solved():
    trainer = Trainer(trained_with(learning_rate=3e-2), None, corpus())
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
    for value in (copying_lstm(), copying_gru(), copying_tcn()):
        assert value.corpus == whole.corpus
        assert (
            value.training.optimisation.optimiser,
            value.training.optimisation.learning_rate,
            value.training.optimisation.clip,
        ) == ("adam", 1e-3, 1.0)
        assert not isinstance(value.model, LanguageConfig)
        settings = whole.training
        same = {
            "betas": settings.optimisation.betas,
            "learning_rate": settings.optimisation.learning_rate,
            "spectral_radius": settings.log.spectral_radius,
            "valid_every": settings.validation.valid_every,
        }
        assert value.training.changed(**same) == whole.training
