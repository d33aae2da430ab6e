import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
import tyro

from equilibria import gradients, solvers
from equilibria.commands.arguments import parse
from equilibria.commands.train import Options
from equilibria.core.stop import Stop
from equilibria.fixed_point import Method
from equilibria.gradients import Implicit
from equilibria.lm.corpora import Copying, PennTreebank, PythonDocs, TextFolder
from equilibria.lm.experiments import (
    Cosine,
    Experiment,
    Milestones,
    NonMonotone,
    Plateau,
    Stage,
    Training,
    from_json,
    to_json,
)
from equilibria.lm.experiments.decay import CATALOGUE
from equilibria.lm.model import Explicit, RecurrentConfig
from equilibria.lm.recipes import RECIPES
from equilibria.lm.training.step import drawn_method
from equilibria.solvers import Anderson, Broyden
from small_experiment import corpus, experiment, with_stage


def through_json(value: Experiment, **options) -> Experiment:
    return from_json(json.loads(json.dumps(to_json(value))), **options)


@pytest.mark.parametrize("solver", solvers.CATALOGUE, ids=lambda kind: kind.__name__)
def test_every_solver_survives_json(solver):
    value = with_stage(experiment(), 1, solver=solver(), eval_stop=Stop(max_evals=40), budget_jitter=2)
    assert through_json(value) == value


@pytest.mark.parametrize("rule", gradients.CATALOGUE, ids=lambda kind: kind.__name__)
def test_every_gradient_rule_survives_json(rule):
    needed = {"Neumann": {"terms": 3}, "Phantom": {"steps": 2, "damping": 0.5}}
    value = with_stage(experiment(), 1, gradient=rule(**needed.get(rule.__name__, {})))
    assert through_json(value) == value


DECAYS = {
    Cosine: {},
    Milestones: {"steps": (3, 7), "divide": 2.0},
    NonMonotone: {"window": 3, "floor": 0.1},
    Plateau: {"patience": 2},
}


@pytest.mark.parametrize("kind", CATALOGUE, ids=lambda kind: kind.__name__)
def test_every_decay_survives_json(kind):
    value = experiment(decay=kind(**DECAYS[kind]), optimiser="sgd", momentum=0.5, overlap=3, eval_overlap=0)
    assert through_json(value) == value
    assert through_json(value).training.optimisation.decay == kind(**DECAYS[kind])


def test_the_numbers_of_a_decay_are_flags():
    def changed(kind, *words):
        value = Options(experiment(decay=kind(**DECAYS[kind])))
        return parse(Options, words, verb="train", default=value).experiment.training

    assert changed(
        Milestones, "--training.decay.steps", "4", "9", "12", "--divide", "3"
    ).optimisation.decay == Milestones(steps=(4, 9, 12), divide=3.0)
    assert changed(NonMonotone, "--training.decay.window", "5").optimisation.decay == NonMonotone(window=5, floor=0.1)
    assert changed(Plateau, "--patience", "1").optimisation.decay == Plateau(patience=1)
    assert changed(Cosine, "--optimiser", "sgd", "--momentum", "0.9").optimisation.momentum == 0.9
    assert changed(Cosine, "--training.overlap", "7").batches.overlap == 7


def test_paths_and_none_survive_json(tmp_path):
    value = dataclasses.replace(experiment(clip=None), corpus=TextFolder(root=tmp_path, unit="character"))
    assert through_json(value) == value


def test_a_folder_is_meant_from_where_it_was_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert PennTreebank(root=Path("ptb")).root == tmp_path / "ptb"


def test_a_corpus_without_its_folder_says_which_flag_names_it():
    with pytest.raises(ValueError, match="--data FOLDER"):
        PennTreebank().load()


@dataclasses.dataclass(frozen=True)
class Mine(Anderson):
    depth: int = 3


def test_kinds_from_outside_are_named_by_their_owner():
    value = with_stage(experiment(), 1, solver=Mine(depth=7))
    assert through_json(value, extra=[Mine]) == value
    with pytest.raises(ValueError, match=r"unknown kind 'Mine'.*--recipe FILE\.py:FUNCTION"):
        through_json(value)


def edited(change) -> dict:
    data = json.loads(json.dumps(to_json(experiment())))
    change(data)
    return data


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda d: d["stages"][1]["method"]["solver"].update(kind="Andersen"),
            r"stages\.1\.method\.solver.*'Andersen'.*Anderson",
        ),
        (
            lambda d: d["training"]["optimisation"].update(learning_rat=1),
            r"optimisation.*'learning_rat'.*learning_rate",
        ),
        (lambda d: d["training"]["batches"].update(batch_size="8"), r"training\.batches\.batch_size is '8'.*a int"),
        (
            lambda d: d["training"]["optimisation"].update(optimiser="sdg"),
            r"optimisation\.optimiser is 'sdg'.*'adam' or 'adamw' or 'sgd'",
        ),
        (
            lambda d: d["training"]["optimisation"].update(decay={"kind": "Cosin"}),
            r"optimisation\.decay.*'Cosin'.*Cosine",
        ),
        (
            lambda d: d["training"]["optimisation"].update(decay={"kind": "Stop"}),
            r"decay is a Stop; it must be a Decay",
        ),
        (lambda d: d["training"]["optimisation"].update(betas=[0.9]), r"betas has 1 entries; it must have 2"),
        (lambda d: d["stages"][0]["method"].update(solver={"kind": "Stop"}), r"solver is a Stop; it must be a Solver"),
        (lambda d: d["stages"][0].update(method={"kind": "Stop"}), r"method is a Stop; it must be a Method"),
        (lambda d: d["stages"][0].update(method=None), r"Stage\('shallow', method=None\) of an equilibrium"),
        (lambda d: d["stages"][0]["method"]["stop"].update(norm="L2"), r"norm is 'L2'; it must be 'l2' or 'max'\.$"),
        (lambda d: d["stages"][0].pop("name"), r"stages\.0 lacks name"),
        (lambda d: d.update(kind="Training"), r"experiment is a Training"),
        (lambda d: d["stages"][0].update(steps=0), r"steps=0.*at least 1"),
    ],
)
def test_what_cannot_be_read_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        from_json(edited(change))


def test_left_out_fields_have_their_defaults():
    found = from_json(edited(lambda d: d["training"]["optimisation"].pop("betas")))
    assert found.training.optimisation.betas == Training().optimisation.betas


def test_flags_change_numbers():
    words = [
        "--training.optimisation.learning-rate",
        "1e-4",
        "--stages.1.method.solver.window",
        "5",
        "--model.cell.width",
        "64",
        "--training.optimisation.clip",
        "None",
    ]
    changed = tyro.cli(Experiment, default=RECIPES["tiny"](), args=words, config=(tyro.conf.AvoidSubcommands,))
    assert changed.training.optimisation.learning_rate == 1e-4
    assert changed.training.optimisation.clip is None
    method = RECIPES["tiny"]().stages[1].method
    assert changed.stages[1].method == dataclasses.replace(method, solver=dataclasses.replace(method.solver, window=5))
    assert changed.model.cell.width == 64


def test_a_folder_is_a_flag():
    words = ["--corpus.root", "/tmp/ptb"]
    changed = tyro.cli(Experiment, default=RECIPES["ptb"](), args=words, config=(tyro.conf.AvoidSubcommands,))
    assert changed.corpus == PennTreebank(root=Path("/tmp/ptb"))


def test_stages_follow_each_other():
    value = experiment()
    assert value.total_steps == 18
    assert [value.stage_at(done) for done in (0, 5, 6, 17, 18)] == [0, 0, 1, 1, 1]


def test_a_model_solves_by_itself_as_in_the_last_stage():
    value = with_stage(experiment(), 1, eval_stop=Stop(max_evals=40))
    layer = value.build(corpus()).layer
    assert (layer.method, layer.eval_stop) == (value.stages[1].method, Stop(max_evals=40))


def test_a_stage_says_everything_about_the_solve():
    value = with_stage(experiment(), 0, eval_stop=Stop(max_evals=40))
    stage = value.stage_named("shallow")
    layer = value.build(corpus(), stage, counted=True).layer
    assert (layer.method, layer.eval_stop) == (stage.training_method, Stop(max_evals=40))
    assert layer.evaluation_method == stage.evaluation_method
    assert stage.evaluation_method == dataclasses.replace(stage.training_method, stop=Stop(max_evals=40))
    assert value.stages[1].evaluation_method == value.stages[1].training_method
    assert stage.training_method == dataclasses.replace(stage.method, on_failure="ignore", keep_point=stage.penalty > 0)
    with pytest.raises(ValueError, match="no stage 'implict' in 'small'; did you mean implicit"):
        value.stage_named("implict")


def test_two_stages_of_one_name_are_refused():
    with pytest.raises(ValueError, match=r"'shallow', 'shallow'.*each its own"):
        with_stage(experiment(), 1, name="shallow")


@pytest.mark.parametrize("jitter", [-1, 8, 30])
def test_a_budget_that_falls_short_of_nothing_is_refused(jitter):
    with pytest.raises(ValueError, match=rf"budget_jitter={jitter}\).*a budget of 8 .* can be reduced by 0 to 7"):
        with_stage(experiment(), 1, budget_jitter=jitter)
    assert with_stage(experiment(), 1, budget_jitter=7).stages[1].budget_jitter == 7


def test_a_drawn_budget_falls_short_of_what_it_is_drawn_from():
    stage, drawn = with_stage(experiment(), 1, budget_jitter=3).stages[1], set()
    for budget in (8, 16):
        method = dataclasses.replace(stage.method, stop=dataclasses.replace(stage.method.stop, max_evals=budget))
        for _ in range(60):
            found = drawn_method(stage, method)
            drawn.add(found.stop.max_evals)
            assert dataclasses.replace(found, stop=method.stop) == method
            assert dataclasses.replace(found.stop, max_evals=budget) == method.stop
    assert drawn == {5, 6, 7, 8, 13, 14, 15, 16}


def test_where_no_budget_is_to_be_drawn_nothing_is():
    value = experiment()
    before = torch.get_rng_state()
    assert drawn_method(value.stages[0], value.stages[0].method) is value.stages[0].method
    assert drawn_method(with_stage(value, 1, budget_jitter=3).stages[1], None) is None
    assert torch.equal(before, torch.get_rng_state())


NETWORK = dataclasses.replace(experiment().model, explicit=Explicit(depth=2))


@pytest.mark.parametrize("model", [NETWORK, RecurrentConfig()], ids=["explicit", "recurrent"])
def test_a_model_that_solves_nothing_has_stages_without_a_method(model):
    one_sentence = r"Stage\('only', method=Method\(.*\)\) of a model that solves nothing; leave the method out\."
    stage = Stage(name="only", steps=18)
    value = dataclasses.replace(experiment(), model=model, stages=(stage,))
    assert through_json(value) == value
    assert not hasattr(value.build(corpus()).layer, "method")
    with pytest.raises(ValueError, match=rf"^{one_sentence}$"):
        dataclasses.replace(value, stages=(dataclasses.replace(stage, method=Method()),))
    for name in ("penalty", "eval_stop", "warm", "budget_jitter"):
        given = {"penalty": 0.1, "eval_stop": Stop(), "warm": True, "budget_jitter": 2}[name]
        with pytest.raises(ValueError, match=rf"^Stage\({name}=.*\) without a method: it belongs to an equilibrium; "):
            dataclasses.replace(stage, **{name: given})


def test_a_stage_of_an_equilibrium_has_a_method():
    sentence = (
        r"^Stage\('shallow', method=None\) of an equilibrium: a method says how to solve it; give "
        r"method=Method\(solver, stop, gradient\), or network_of\(depth\) for a shallow stage\.$"
    )
    with pytest.raises(ValueError, match=sentence):
        with_stage(experiment(), 0, method=None)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("solver", [Anderson, Broyden])
def test_the_dtype_of_a_history_survives_json(solver, dtype):
    kept = solver(history_dtype=dtype)
    value = with_stage(experiment(), 1, solver=kept, gradient=Implicit(solver=kept))
    written = json.loads(json.dumps(to_json(value)))
    assert written["stages"][1]["method"]["solver"]["history_dtype"] == (dtype and str(dtype).removeprefix("torch."))
    assert from_json(written) == value
    assert from_json(written).stages[1].method.gradient.solver.history_dtype is dtype


@pytest.mark.parametrize("wrong", ["bfloat17", "int8", 16, True, []])
def test_a_dtype_that_keeps_no_history_is_refused(wrong):
    value = with_stage(experiment(), 1, solver=Broyden())
    data = json.loads(json.dumps(to_json(value)))
    data["stages"][1]["method"]["solver"]["history_dtype"] = wrong
    names = "'bfloat16' or 'float16' or 'float32' or 'float64' or null"
    with pytest.raises(ValueError, match=rf"stages\.1\.method\.solver\.history_dtype is .*; it must be {names}\.$"):
        from_json(data)


def largest_of_two(state):
    return state.abs().amax(dim=(1, 2))


@pytest.mark.parametrize("of", ["stop", "eval_stop"])
def test_a_norm_of_ones_own_cannot_be_written_and_is_named(of):
    value = with_stage(experiment(), 1, **{of: Stop(norm=largest_of_two)})
    with pytest.raises(ValueError, match=r"^.*largest_of_two.* cannot be written as JSON; [^.]*\.$"):
        to_json(value)


@pytest.mark.parametrize("source", [PythonDocs(), Copying(blank=3, train=2, valid=2, test=2)])
def test_a_source_knows_the_unit_of_its_corpus(source):
    assert source.load().unit == source.unit


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch_size": 0},
        {"learning_rate": 0.0},
        {"learning_rate": float("inf")},
        {"clip": -1.0},
        {"betas": (0.9, 1.0)},
        {"warmup": 1000},
        {"spectral_radius": 2},
        {"overlap": 20},
        {"overlap": -1},
        {"eval_overlap": 20},
        {"momentum": 0.9},
        {"momentum": 1.0, "optimiser": "sgd"},
        {"keep": 0},
    ],
)
def test_wrong_numbers_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        experiment(**wrong)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e39])
@pytest.mark.parametrize(
    "name",
    ["learning_rate", "final_learning_rate", "weight_decay", "clip", "momentum", "epsilon", "rank_timeout"],
)
def test_a_training_has_finite_numbers(name, bad):
    with pytest.raises(ValueError, match=rf"\w+\({name}={re.escape(str(bad))}\): \w+ (is|must be) a finite number"):
        Training().changed(**{name: bad})


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("part", "name"), [("model", "std"), ("cell", "std"), ("solver", "ridge"), ("training", "betas")]
)
def test_every_number_of_an_experiment_is_finite(part, name, bad):
    """Also in a file: Python reads NaN and Infinity from JSON."""

    def change(data: dict) -> None:
        data["stages"][1]["method"]["solver"] = {"kind": "Anderson"}
        parts = {"model": data["model"], "cell": data["model"]["cell"], "training": data["training"]["optimisation"]}
        parts["solver"] = data["stages"][1]["method"]["solver"]
        parts[part][name] = [0.9, bad] if name == "betas" else bad

    value = f"(0.9, {bad})" if name == "betas" else str(bad)
    with pytest.raises(ValueError, match=rf"\({name}={re.escape(value)}\): {name} is .*a finite number"):
        from_json(json.loads(json.dumps(edited(change))))


@pytest.mark.parametrize(("name", "most"), [("threads", 1024), ("seed", 2**63 - 1), ("rank_timeout", 1e7)])
def test_numbers_that_no_machine_takes_are_refused(name, most):
    Training().changed(**{name: most})
    with pytest.raises(ValueError, match=rf"\w+\({name}=.*\): it must be at most [\d,⁶³2 −]+; "):
        Training().changed(**{name: 2 * most})


def test_an_overlap_is_measured_by_the_segments_of_its_own_reading():
    assert experiment(overlap=15, eval_segment_length=16).training.evaluation["overlap"] == 15
    with pytest.raises(ValueError, match=r"eval_overlap=15\): segments of 15 tokens.*at most 14"):
        experiment(overlap=15, eval_segment_length=15)
    assert experiment(overlap=15, eval_segment_length=15, eval_overlap=0).training.evaluation["overlap"] == 0


@pytest.mark.parametrize("decay", [Cosine(), Plateau(), Milestones(steps=(3,))])
def test_averaging_begins_with_the_non_monotone_criterion_only(decay):
    with pytest.raises(ValueError, match=r"optimiser='asgd'.*NonMonotone triggers"):
        experiment(optimiser="asgd", decay=decay)
    assert experiment(optimiser="asgd", decay=NonMonotone()).training.optimisation.optimiser == "asgd"


def test_a_final_rate_without_a_cosine_is_refused():
    with pytest.raises(ValueError, match=r"final_learning_rate=0\.001.*only a cosine"):
        experiment(final_learning_rate=1e-3, decay=Plateau())
