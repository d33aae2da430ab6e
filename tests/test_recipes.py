import dataclasses
import json
import math

import pytest
import torch

from equilibria.cells import ChainConfig
from equilibria.gradients import Implicit
from equilibria.lm.corpora import WikiText103
from equilibria.lm.experiments import Cosine, from_json, to_json
from equilibria.lm.recipes import RECIPES
from equilibria.lm.training import Trainer
from slow_cases import one_in
from small_experiment import corpus, trained_weights

WIKITEXT = [name for name in RECIPES if name.startswith("wikitext103") and "trellis" not in name]
VOCABULARY = 267_735


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_survive_json_and_bear_their_names(name):
    value = RECIPES[name]()
    assert from_json(json.loads(json.dumps(to_json(value)))) == value
    assert value.name == name
    assert RECIPES[name].__doc__


def built(name, vocabulary):
    value = RECIPES[name]()
    stage = value.stages[0]
    with torch.device("meta"):
        return value.model.build(vocabulary, method=stage.method, eval_stop=stage.eval_stop)


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


# By hand, with D the width and I the inner width. A block has 3D² (qkv), D² (positions), 2D (u, v), D² + D (output),
# 2DI + I + D (feed-forward) and a gain for each row of those matrices; the injection has 3D² + 3D. Around it: table,
# bias, three rows for the clusters with their biases; with division 4, four projections and a second one of cluster 0.
# Published: 138M / 4.5M, 172M / 43M, 98M. The three blocks (with 6D for their layer norms each) are published as 97.7M:
# that is 97,730,888, the 159,600 of the three tied projections counted twice, as they are two parameters each there.
COUNTS = {
    "wikitext103-small": (138_648_238, 4_511_500),
    "wikitext103-medium": (171_997_418, 43_215_440),
    "wikitext103-medium-adaptive": (97_691_888, 71_225_100),
    "wikitext103-v2": (97_691_888, 71_225_100),
    "wikitext103-v2-jacobian-postln": (97_691_888, 71_225_100),
    "wikitext103-v2-jacobian-preln": (97_691_888, 71_225_100),
    "wikitext103-seq": (97_691_888, 71_225_100),
    "wikitext103-seq-jacobian": (97_691_888, 71_225_100),
    "wikitext103-unrolled": (97_571_288, 71_104_500),
}


@pytest.mark.parametrize("name", WIKITEXT)
def test_the_models_have_the_published_sizes(name):
    model = built(name, VOCABULARY)
    assert (count(model), count(model.layer)) == COUNTS[name]


def test_the_copying_model_has_14006_parameters():
    sizes = {name: parameter.numel() for name, parameter in built("copying", 10).named_parameters()}
    gains = sum(size for name, size in sizes.items() if name.endswith("gain"))
    assert (sum(sizes.values()) - gains, gains) == (14_006, 268)


PAPER = {
    "sizes": (700, 10, 48_000),
    "blocks": 1,
    "norm": ("post", False, False),
    "weight norm": (True, "default_fan_in"),
    "dropouts": (0.05, 0.0),
    "adaptive": ((20_000, 40_000, 200_000), 4),
    "learning rate": ("adam", 2.5e-4, 0.0),
    "decay": Cosine(origin="start"),
    "warm-up, steps": (16_000, 300_000),
    "pre-training": (16_000, 2),
    "segment, memory": (150, 150),
    "batch, clip": (56, 0.25),
    "forward": ("Broyden", 30, 0, 1e-6 * math.sqrt(150 * 700)),
    "backward": ("Broyden", 40, 0, 0),
    "penalty": (0.0, 1.0, None, 0),
    "evaluation": (150, 4),
}
V2 = PAPER | {
    "pre-training": (32_000, 2),
    "forward": ("Anderson", 30, 1e-3, 0),
    "backward": ("Broyden", 35, 1e-3, 0),
    "evaluation": (150, 16),
}
SEQ = V2 | {"pre-training": None, "forward": ("Broyden", 35, 1e-3, 0)}
TABLE = {
    "wikitext103-small": PAPER
    | {
        "sizes": (500, 10, 2_500),
        "adaptive": ((20_000, 40_000, 200_000), 1),
        "forward": ("Broyden", 30, 0, 1e-6 * math.sqrt(150 * 500)),
    },
    "wikitext103-medium": PAPER
    | {
        "sizes": (480, 10, 43_000),
        "adaptive": ((20_000, 40_000, 200_000), 1),
        "forward": ("Broyden", 30, 0, 1e-6 * math.sqrt(150 * 480)),
    },
    "wikitext103-medium-adaptive": PAPER,
    "wikitext103-v2": V2,
    "wikitext103-v2-jacobian-postln": V2
    | {
        "dropouts": (0.06, 0.01),
        "segment, memory": (150, 300),
        "forward": ("Anderson", 12, 1e-3, 0),
        "backward": ("Broyden", 13, 1e-3, 0),
        "penalty": (1.9, 0.35, 35_000, 2),
    },
    "wikitext103-v2-jacobian-preln": V2
    | {
        "norm": ("pre-normalised", False, False),
        "dropouts": (0.06, 0.01),
        "segment, memory": (150, 300),
        "forward": ("Anderson", 14, 1e-3, 0),
        "backward": ("Broyden", 14, 1e-3, 0),
        "penalty": (2.0, 0.4, 30_000, 2),
    },
    "wikitext103-seq": SEQ,
    "wikitext103-seq-jacobian": SEQ | {"penalty": (0.1, 0.4, 30_000, 0)},
    "wikitext103-unrolled": PAPER
    | {
        "sizes": (700, 10, 14_800),
        "blocks": 3,
        "norm": ("pre", True, True),
        "weight norm": (True, "normal"),
        "warm-up, steps": (8_000, 150_000),
        "pre-training": None,
        "forward": ("Picard", 13, 0, 0),  # twelve applications, and the residual of the last
        "backward": "Unroll(checkpoint=True)",
        "evaluation": (150, 16),
    },
}


def numbers(value):
    """What the published table has, read off the experiment."""
    model, training, last = value.model, value.training, value.stages[-1]
    blocks = model.cell.cells if isinstance(model.cell, ChainConfig) else (model.cell,)
    (cell,) = set(blocks)
    shallow = value.stages[0] if len(value.stages) > 1 and value.stages[0].layers is not None else None
    later = value.stages[0 if shallow is None else 1]
    assert {dataclasses.replace(s, name="", steps=1, penalty=0.0) for s in value.stages if s is not shallow} == {
        dataclasses.replace(last, name="", steps=1, penalty=0.0)
    }
    assert model.dropout == cell.dropout
    gradient = last.method.gradient
    return {
        "sizes": (cell.width, cell.heads, cell.inner),
        "blocks": len(blocks),
        "norm": (cell.norm, cell.affine, cell.attention_norm),
        "weight norm": (cell.weight_norm, cell.init),
        "dropouts": (cell.dropout, cell.attention_dropout),
        "adaptive": (model.adaptive.cutoffs, model.adaptive.division),
        "learning rate": (
            training.optimisation.optimiser,
            training.optimisation.learning_rate,
            training.optimisation.final_learning_rate,
        ),
        "decay": training.optimisation.decay,
        "warm-up, steps": (training.optimisation.warmup, value.total_steps),
        "pre-training": None if shallow is None else (shallow.steps, shallow.method.stop.max_evals - 1),
        "segment, memory": (training.batches.segment_length, cell.memory),
        "batch, clip": (training.batches.batch_size, training.optimisation.clip),
        "forward": solve_of(last.method),
        "backward": solve_of(gradient) if isinstance(gradient, Implicit) else str(gradient),
        "penalty": (later.penalty, last.penalty_share, growth(value), last.budget_jitter),
        "evaluation": (training.validation.eval_segment_length, training.validation.eval_batch_size),
    }


def solve_of(part):
    return type(part.solver).__name__, part.stop.max_evals, part.stop.rtol, part.stop.atol


def growth(value):
    """Steps from one growth of the penalty to the next; None if it never grows."""
    penalised = [stage.steps for stage in value.stages if stage.penalty]
    return penalised[1] if penalised else None


@pytest.mark.parametrize("name", WIKITEXT)
def test_the_numbers_are_the_published_ones(name):
    value = RECIPES[name]()
    assert numbers(value) == TABLE[name]
    assert value.corpus == WikiText103()
    assert value.model.tied
    assert value.model.output_dropout == "token"
    assert (value.model.std, value.training.optimisation.betas, value.training.optimisation.weight_decay) == (
        0.01,
        (0.9, 0.999),
        0.0,
    )


@pytest.mark.parametrize(
    ("name", "penalties"),
    [
        ("seq-jacobian", {1: 0.1, 30_000: 0.1, 30_001: 0.2, 60_001: 0.3, 270_001: 1.0, 300_000: 1.0}),
        (
            "v2-jacobian-postln",
            {1: 0, 32_000: 0, 32_001: 1.9, 35_000: 1.9, 35_001: 2.0, 70_001: 2.1, 280_000: 2.6, 300_000: 2.7},
        ),
        (
            "v2-jacobian-preln",
            {1: 0, 32_000: 0, 32_001: 2.0, 60_000: 2.0, 60_001: 2.1, 270_000: 2.7, 270_001: 2.8, 300_000: 2.8},
        ),
    ],
)
def test_the_penalty_grows_as_in_the_authors_code(name, penalties):
    value = RECIPES[f"wikitext103-{name}"]()
    found = {step: value.stages[value.stage_at(step - 1)].penalty for step in penalties}
    assert found == pytest.approx(penalties)


def test_the_twelfth_state_can_be_read_in_evaluation_too():
    (stage,) = RECIPES["wikitext103-unrolled"]().stages
    assert (stage.eval_stop.rtol, stage.eval_stop.max_evals, stage.eval_stop.best) == (1e-3, 13, True)


def shrunk(name):
    """The recipe with all its stages and parts, at a size that trains in seconds; a penalty is in every step."""
    value = RECIPES[name]()
    steps = max(1, 4 // len(value.stages))
    cell = value.model.cell
    first = cell.cells[0] if isinstance(cell, ChainConfig) else cell
    small = {"width": 16, "heads": 2, "inner": 24, "memory": first.memory // 15}
    if isinstance(cell, ChainConfig):
        cell = dataclasses.replace(cell, cells=tuple(dataclasses.replace(block, **small) for block in cell.cells))
    else:
        cell = dataclasses.replace(cell, **small)
    adaptive = dataclasses.replace(
        value.model.adaptive, cutoffs=(5, 10, 15), division=min(value.model.adaptive.division, 2)
    )
    training = value.training.changed(
        batch_size=4,
        segment_length=10,
        warmup=1,
        log_every=1,
        eval_batch_size=4,
        eval_segment_length=10,
        valid_segments=1,
        spectral_radius=3,
        device="cpu",
        threads=1,
    )
    return dataclasses.replace(
        value,
        model=dataclasses.replace(value.model, cell=cell, adaptive=adaptive),
        stages=tuple(dataclasses.replace(stage, steps=steps, penalty_share=1.0) for stage in value.stages),
        training=training,
    )


@pytest.mark.parametrize("name", one_in(3, WIKITEXT))
def test_the_recipes_train(name):
    value, events = shrunk(name), []
    trainer = Trainer(value, None, corpus(), on_event=events.append)
    before = trained_weights(trainer)
    trainer.fit()
    steps = [event for event in events if event["event"] == "step"]
    assert list(dict.fromkeys(event["stage"] for event in steps)) == [stage.name for stage in value.stages]
    assert all(0 < event["loss"] < 4 for event in steps)
    weights = {stage.name: stage.penalty for stage in value.stages}
    assert all((event["penalty"] is not None) == (weights[event["stage"]] > 0) for event in steps)
    unrolled = [event for event in steps if event["backward"] is None]
    assert {event["stage"] for event in unrolled} == {stage.name for stage in value.stages if stage.layers}
    after = trained_weights(trainer)
    assert [weight for weight in before if torch.equal(before[weight], after[weight])] == []
