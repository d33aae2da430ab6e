"""The published TrellisNets: their numbers, their sizes, and that small ones train and continue."""

import dataclasses
import json
import math

import pytest
import torch

from equilibria.lm.corpora import (
    PENN_TREEBANK_CHARACTER_COUNTS,
    PENN_TREEBANK_COUNTS,
    WIKITEXT103_COUNTS,
    Segments,
    Stream,
)
from equilibria.lm.experiments import Milestones, NonMonotone, from_json, to_json
from equilibria.lm.model import ExtraLosses, MixtureConfig
from equilibria.lm.recipes import RECIPES
from slow_cases import one_in
from small_experiment import Killed, finished, kill_at, same_bits, without_times

COUNTS = {
    "PennTreebank": PENN_TREEBANK_COUNTS,
    "PennTreebankCharacters": PENN_TREEBANK_CHARACTER_COUNTS,
    "WikiText103": WIKITEXT103_COUNTS,
}
EQUILIBRIA = ("ptb-trellis", "ptb-char-trellis", "wikitext103-trellis")
NAMES = [name for equilibrium in EQUILIBRIA for name in (equilibrium, f"{equilibrium}-deep")]

# The published numbers. None is where there is nothing: no layers in an equilibrium, no clusters in a small vocabulary.

WORDS = {
    "corpus": "PennTreebank",
    "sizes": (400, 1_000, 400),
    "layers": None,
    "cell": ("weight norm", "carried input", "default_fan_in", "scan", 0.01),
    "auxiliary": (0.0, 0),
    "activation": (2.0, 1.0),
    "dropout of output, input, hidden, weights, words": (0.45, 0.45, 0.28, 0.5, 0.1),
    "clusters": None,
    "segment, overlap": (110, 0),
    "batch, in evaluation": (16, 12),
    "optimiser": ("sgd", 20.0, 0.0, 1.2e-6),
    "decay": NonMonotone(window=10, divide=4.0, floor=0.02),
    "steps per epoch, epochs": (529, 500),
    "clip": 0.225,
    "shallow": (12, 39_675),
    "forward": ("Picard", 50, 1e-3, 0),
    "backward": ("Anderson", 60, 1e-3, 0),
}
NO_SOLVE = {"shallow": None, "forward": None, "backward": None}
CHARACTERS = WORDS | {
    "corpus": "PennTreebankCharacters",
    "sizes": (200, 1_000, 200),
    "activation": (0.0, 0.0),
    "dropout of output, input, hidden, weights, words": (0.1, 0.1, 0.29, 0.26, 0.02),
    "segment, overlap": (140, 0),
    "batch, in evaluation": (24, 10),
    "optimiser": ("adam", 2e-3, 0.0, 8e-7),
    "decay": Milestones(steps=(334_180, 531_650), divide=10.0),
    "steps per epoch, epochs": (1_519, 400),
    "clip": 0.2,
    "shallow": (12, 91_140),
}
WIKITEXT = WORDS | {
    "corpus": "WikiText103",
    "sizes": (512, 1_600, 512),
    "cell": ("weight norm", "carried input", "default_fan_in", "delayed", 0.01),
    "activation": (0.0, 0.0),
    "dropout of output, input, hidden, weights, words": (0.1, 0.1, 0.1, 0.0, 0.0),
    "clusters": ((2_800, 20_000, 76_000), 1, 0.0),
    "segment, overlap": (100, 0),
    "batch, in evaluation": (49, 4),
    "optimiser": ("adam", 1e-3, 0.0, 0.0),
    "decay": Milestones(steps=(316_005, 421_340, 484_541), divide=10.0),
    "steps per epoch, epochs": (21_067, 25),
    "clip": 0.07,
    "shallow": (40, 30_000),
    "forward": ("Broyden", 45, 0, 1e-6 * math.sqrt(100 * 2 * 2_112)),
    "backward": ("Broyden", 45, 0, 0),
}
TABLE = {
    "ptb-trellis": WORDS,
    "ptb-trellis-deep": WORDS
    | NO_SOLVE
    | {
        "layers": 58,
        "cell": ("no weight norm", "no carried input", "normal", "delayed", 0.01),
        "auxiliary": (0.05, 12),
        "segment, overlap": (110, 58),
        "steps per epoch, epochs": (1_117, 500),
    },
    "ptb-char-trellis": CHARACTERS,
    "ptb-char-trellis-deep": CHARACTERS
    | NO_SOLVE
    | {
        "layers": 140,
        "cell": ("weight norm", "no carried input", "normal", "delayed", 0.01),
        "auxiliary": (0.3, 80),
    },
    "wikitext103-trellis": WIKITEXT,
    "wikitext103-trellis-deep": WIKITEXT
    | NO_SOLVE
    | {
        "layers": 75,
        "cell": ("weight norm", "no carried input", "normal", "delayed", 0.01),
        "auxiliary": (0.1, 25),
        "segment, overlap": (75, 0),
        "batch, in evaluation": (40, 1),
        "decay": Milestones(steps=(516_135, 688_180), divide=10.0),
        "steps per epoch, epochs": (34_409, 25),
    },
}


def numbers(value):
    """What the published table has, read off the experiment."""
    model, cell, training, last = value.model, value.model.cell, value.training, value.stages[-1]
    losses, explicit, clusters = model.losses, model.explicit, model.adaptive
    shallow = value.stages[0] if len(value.stages) > 1 else None
    normed = "weight norm" if cell.weight_norm else "no weight norm"
    carried = "carried input" if cell.carry_input else "no carried input"
    return {
        "corpus": type(value.corpus).__name__,
        "sizes": (cell.width, cell.hidden, cell.outputs),
        "layers": explicit and explicit.depth,
        "cell": (normed, carried, cell.injection_init, cell.recurrence, cell.std),
        "auxiliary": (losses.auxiliary, explicit.auxiliary_every if explicit else 0),
        "activation": (losses.activation, losses.temporal_activation),
        "dropout of output, input, hidden, weights, words": (
            model.dropout,
            model.input_dropout,
            cell.dropout,
            cell.weight_dropout,
            model.word_dropout,
        ),
        "clusters": clusters and (clusters.cutoffs, clusters.division, clusters.slot_std),
        "segment, overlap": (training.batches.segment_length, training.batches.overlap),
        "batch, in evaluation": (training.batches.batch_size, training.validation.eval_batch_size),
        "optimiser": (
            training.optimisation.optimiser,
            training.optimisation.learning_rate,
            training.optimisation.momentum,
            training.optimisation.weight_decay,
        ),
        "decay": training.optimisation.decay,
        "steps per epoch, epochs": (
            training.validation.valid_every,
            value.total_steps / training.validation.valid_every,
        ),
        "clip": training.optimisation.clip,
        "shallow": shallow and (shallow.method.stop.max_evals - 1, shallow.steps),
        "forward": None if explicit else solve_of(last.method),
        "backward": None if explicit else solve_of(last.method.gradient),
    }


def solve_of(part):
    return type(part.solver).__name__, part.stop.max_evals, part.stop.rtol, part.stop.atol


@pytest.mark.parametrize("name", NAMES)
def test_the_numbers_are_the_published_ones(name):
    value = RECIPES[name]()
    assert numbers(value) == TABLE[name]
    model, training = value.model, value.training
    assert (model.tied, model.scaled, model.init, model.output_dropout) == (True, False, "uniform", "channel")
    assert math.sqrt(3) * model.std == pytest.approx(0.1)  # from U(−0.1, 0.1)
    assert (
        model.mixture,
        training.optimisation.warmup,
        training.optimisation.betas,
        training.optimisation.epsilon,
    ) == (None, 0, (0.9, 0.999), 1e-8)
    assert (
        training.validation.eval_overlap,
        training.validation.eval_segment_length,
        training.validation.valid_segments,
    ) == (None, None, None)
    assert from_json(json.loads(json.dumps(to_json(value)))) == value


@pytest.mark.parametrize("name", NAMES)
def test_a_validation_comes_once_an_epoch(name):
    value = RECIPES[name]()
    training, counts = value.training, COUNTS[type(value.corpus).__name__]
    ids = torch.zeros((), dtype=torch.int64).expand(counts["train"] - 1)  # the first token is no target
    segments = Segments(
        Stream(tokens=ids, targets=ids),
        batch_size=training.batches.batch_size,
        length=training.batches.segment_length,
        overlap=training.batches.overlap,
    )
    assert len(segments) == training.validation.valid_every


# By hand, with E the width, O the outputs and H the channels of h, hidden ones and outputs. The cell has 4H·2H (state),
# 4H·2E (input) and 4H (bias), and 8H gains of its weight norm; around it are the tied table and a bias a word, and on
# WikiText-103 three slots with a bias each. Published: 24M / 20M, 13.4M, and 180M / 45M: 24.18M / 20.17M, 13.45M and
# 181.7M / 44.3M, by the sizes in the scripts, without the gains.
SIZES = {
    "ptb-trellis": (24_175_600, 20_165_600, 11_200),
    "ptb-trellis-deep": (24_175_600, 20_165_600, 0),
    "ptb-char-trellis": (13_454_850, 13_444_800, 9_600),
    "ptb-char-trellis-deep": (13_454_850, 13_444_800, 9_600),
    "wikitext103-trellis": (181_693_146, 44_343_552, 16_896),
    "wikitext103-trellis-deep": (181_693_146, 44_343_552, 16_896),
}


@pytest.mark.parametrize("name", NAMES)
def test_the_models_have_the_published_sizes(name):
    value = RECIPES[name]()
    words, stage = COUNTS[type(value.corpus).__name__]["vocabulary"], value.stages[0]
    with torch.device("meta"):
        model = value.model.build(words, method=stage.method, eval_stop=stage.eval_stop)
    sizes = {parameter: tensor.numel() for parameter, tensor in model.named_parameters()}
    gains = sum(size for parameter, size in sizes.items() if parameter.endswith("gain"))
    layer = sum(size for parameter, size in sizes.items() if parameter.startswith("layer."))
    assert (sum(sizes.values()) - gains, layer - gains, gains) == SIZES[name]


def test_the_mixture_is_the_deep_network_with_other_sizes_and_another_head():
    """By hand: 4H·2H + 4H·2E + 4H in the cell, V·E + V for table and bias, 15·(O·E + E + O + 1) for the mixture."""
    value, deep = RECIPES["ptb-trellis-mos"](), RECIPES["ptb-trellis-deep"]()
    with torch.device("meta"):
        model = value.model.build(10_000)
    width, outputs, channels = 280, 480, 1_780
    cell = 8 * channels**2 + 8 * channels * width + 4 * channels
    head = 15 * (outputs * width + width + outputs + 1)
    assert sum(p.numel() for p in model.layer.parameters()) == cell == 29_341_520
    assert sum(p.numel() for p in model.parameters()) == cell + head + 10_000 * (width + 1) == 34_178_935
    assert value.model.mixture == MixtureConfig(experts=15, dropout=0.29)
    sizes = {"width": 400, "hidden": 1_000, "outputs": 400}
    model = dataclasses.replace(value.model, mixture=None, cell=dataclasses.replace(value.model.cell, **sizes))
    assert dataclasses.replace(value, name=deep.name, model=model) == deep
    assert from_json(json.loads(json.dumps(to_json(value)))) == value


def test_a_deep_network_is_as_large_as_its_equilibrium():
    for name in EQUILIBRIA:
        assert SIZES[name][:2] == SIZES[f"{name}-deep"][:2]


# Small ones


def shrunk(name):
    """The recipe with all its parts, at a size that trains in seconds: four steps, of which the first two shallow."""
    value = RECIPES[name]()
    model, training = value.model, value.training
    cell = dataclasses.replace(model.cell, width=6, hidden=5, outputs=6)
    adaptive = model.adaptive and dataclasses.replace(model.adaptive, cutoffs=(5, 10, 15))
    explicit = model.explicit and dataclasses.replace(model.explicit, depth=6, auxiliary_every=3)
    decay = dataclasses.replace(
        training.optimisation.decay,
        **({"steps": (2, 3)} if isinstance(training.optimisation.decay, Milestones) else {"window": 1}),
    )
    training = training.changed(
        decay=decay,
        learning_rate=min(1.0, training.optimisation.learning_rate),
        batch_size=4,
        segment_length=10,
        overlap=min(4, training.batches.overlap),
        log_every=1,
        valid_every=1,
        checkpoint_every=1,
        eval_batch_size=2,
        valid_segments=2,
        spectral_radius=min(3, training.log.spectral_radius),
        measure_memory=False,
        baseline=False,
        device="cpu",
        threads=1,
    )
    steps = 4 // len(value.stages)
    return dataclasses.replace(
        value,
        model=dataclasses.replace(model, cell=cell, adaptive=adaptive, explicit=explicit),
        stages=tuple(dataclasses.replace(stage, steps=steps) for stage in value.stages),
        training=training,
    )


@pytest.mark.parametrize("name", one_in(3, [*NAMES, "ptb-trellis-mos"]))
def test_small_ones_train_and_continue_as_if_never_stopped(name, tmp_path):
    value = shrunk(name)
    weights, log = finished(tmp_path / "whole", value)
    steps = [event for event in log if event["event"] == "step"]
    assert [event["stage"] for event in steps] == [stage.name for stage in value.stages for _ in range(stage.steps)]
    assert all(0 < event["loss"] < 4 for event in steps)
    assert all((event["extra"] is not None) == (value.model.losses != ExtraLosses()) for event in steps)
    if isinstance(value.training.optimisation.decay, Milestones):
        peak = value.training.optimisation.learning_rate
        assert [event["learning_rate"] for event in steps] == pytest.approx([peak, peak, peak / 10, peak / 100])
    with pytest.raises(Killed):
        finished(tmp_path / "killed", value, on_event=kill_at(3))
    again, continued = finished(tmp_path / "killed", value, resume=True)
    assert same_bits(weights, again)
    last = [event for event in continued if event["event"] == "step"][-1]
    assert without_times([last]) == without_times([steps[-1]])
