"""The verbs that write and read runs: train, resume, evaluate, generate, report."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from equilibria import ConvergenceWarning
from equilibria.__main__ import main
from equilibria.cells import ChainConfig
from equilibria.commands import report, sample, train
from equilibria.commands.errors import explain
from equilibria.commands.recipe import experiment_of
from equilibria.lm.evaluation import evaluate
from equilibria.lm.recipes import RECIPES
from equilibria.lm.report import figures, summary
from equilibria.lm.report.record import read
from equilibria.lm.runs import Run, checkpoint
from equilibria.lm.runs.checkpoint import CheckpointError
from equilibria.lm.runs.memory_length import with_memory
from equilibria.lm.runs.trained import load as trained_model
from equilibria.lm.runs.trained import with_data
from equilibria.lm.training import Trainer, TrainingInterrupted, TrainingStopped
from equilibria.lm.training.policy import NotFinite
from slow_cases import some_slow
from small_run import fails, furnish

FIGURES = figures.FIGURES
"""All of them, which the fixture ``one_figure`` reduces to the first."""


@pytest.fixture
def place(tmp_path, monkeypatch, one_figure) -> Path:
    """A folder with a recipe and a corpus, which is where the commands run."""
    furnish(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setitem(sample.SAMPLE, "character", 12)
    return tmp_path


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> tuple[Path, str]:
    """A folder with a run of the small recipe, and what it printed."""
    folder = tmp_path_factory.mktemp("trained")
    furnish(folder)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.chdir(folder)
        patch.setitem(sample.SAMPLE, "character", 12)
        assert main(["train", "recipe.py:small", "--data", "text", "--stages.1.steps", "5"]) == 0
    return folder, printed.getvalue()


@pytest.fixture
def run(place, trained) -> Path:
    """A copy of that run."""
    return Path(shutil.copytree(trained[0] / "runs/small", "runs/small"))


def test_train_prints_a_line_a_step_the_table_a_sample_and_the_report(trained):
    folder, text = trained
    assert text.startswith("small on text, in runs/small\n")
    assert "step 1/8 shallow  loss " in text
    assert "step 3  stage implicit begins" in text
    for stop in ("3 evaluations and no tolerance", "at most 30 evaluations, tolerance 0.01"):
        assert text.count(f"  validation: memory 4, segments of 8, 8 streams, {stop}, 128 of 129 tokens\n") == 1
    assert "backward" in next(line for line in text.splitlines() if line.startswith("step 8/8 implicit"))
    for label in ("Parameters", "Validation", "Baseline", "Forward solve", "Backward solve", "Peak memory", "Time"):
        assert f"│ {label}" in text
    assert text.rstrip().endswith("report: runs/small/report/index.html")
    page = (folder / "runs/small/report/index.html").read_text(encoding="utf-8")
    assert "Finished after 8 steps." in page
    assert "A sample of its text" in page
    assert 'id="memory"' in page


def test_a_second_run_gets_the_next_number_and_a_named_folder_is_not_overwritten(run, capsys):
    words = ["train", "recipe.py:small", "--data", "text", "--out", "runs/small"]
    assert "already holds a run" in fails(capsys, *words, code=1)
    assert train.folder("small", taken=False) == Path("runs/small-2")
    assert train.folder("small", taken=True) == Path("runs/small")
    Path("runs/small-2").mkdir()
    assert train.folder("small", taken=False) == Path("runs/small-3")
    assert train.folder("new", taken=True) == Path("runs/new")


@pytest.mark.slow
def test_the_demo_of_the_makefile_can_be_made_again_and_again(place, capsys, monkeypatch):
    makefile = (Path(__file__).parents[1] / "Makefile").read_text()
    folder = re.search(r"^RUN \?= (.*)$", makefile, re.MULTILINE)[1]
    line = re.search(r"^\t\$\(BIN\)/equilibria (train .*)$", makefile, re.MULTILINE)[1]
    words = line.replace("$(RUN)", folder).split()
    small = with_data(experiment_of("recipe.py:small"), Path("text"))
    monkeypatch.setitem(RECIPES, "tiny", lambda: small)  # the demo itself takes minutes
    for _ in range(2):
        assert main(words) == 0
    assert (Path(folder) / "report/index.html").is_file()
    steps = [event for event in Run(Path(folder)).events() if event["event"] == "step"]
    assert [event["step"] for event in steps] == list(range(1, 9))
    (Path(folder) / "experiment.json").unlink()
    capsys.readouterr()
    assert "is not a run" in fails(capsys, *words, code=1)
    assert (Path(folder) / "checkpoints").is_dir()


def test_a_command_that_cannot_work_overwrites_nothing(run, capsys):
    words = ["train", "recipe.py:small", "--out", "runs/small", "--overwrite"]
    assert "cuda:99" in fails(capsys, *words, "--data", "text", "--device", "cuda:99", code=1)
    assert "nowhere" in fails(capsys, *words, "--data", "nowhere", code=1)
    assert Run(run).newest().step == 8


def test_an_interrupted_run_says_how_to_go_on_and_ends_with_the_same_weights(run, capsys, monkeypatch):
    step, calls = Trainer.step, []

    def interrupted(trainer, segment):
        calls.append(segment)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return step(trainer, segment)

    monkeypatch.setattr(Trainer, "step", interrupted)
    assert main(["train", "recipe.py:small", "--data", "text", "--log-every", "4"]) == 130
    *_, said, last = capsys.readouterr().err.strip().splitlines()
    assert said == "Stopped at step 5; this continues from the checkpoint step-00000004:"
    words = last.partition("equilibria ")[2].split()
    assert words == ["train", "recipe.py:small", "--out", "runs/small-2", "--resume"]
    assert main(words) == 0  # without --data: the run knows its corpus
    assert "continuing after step 4 of 8" in capsys.readouterr().out
    whole, resumed = (
        checkpoint.load(Path(name) / "checkpoints/step-00000008") for name in ("runs/small", "runs/small-2")
    )
    assert all(bool((whole.model[name] == resumed.model[name]).all()) for name in whole.model)


def test_a_run_that_was_to_replace_another_and_has_no_checkpoint_yet_is_not_resumed(run, capsys, monkeypatch):
    """--resume would continue the old run, with its own settings."""

    def interrupted(trainer, segment):
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "step", interrupted)
    words = ["train", "recipe.py:small", "--data", "text", "--seed", "7", "--out", "runs/small", "--overwrite"]
    assert main(words) == 130
    said = capsys.readouterr().err
    assert "runs/small holds the old run, as it was" in said
    assert "equilibria train" not in said
    assert Run.open(run).experiment().training.seed != 7
    assert Run(run).newest().step == 8


def test_resume_refuses_other_settings_and_other_experiments(run, capsys):
    words = ["train", "recipe.py:small", "--out", "runs/small", "--resume"]
    assert "training.batches.batch_size = 2" in fails(capsys, *words, "--batch-size", "3", code=1)
    assert main([*words, "--log-every", "4"]) == 0
    assert "all 8 steps are done: nothing is left to train" in capsys.readouterr().out
    assert Run(run).experiment().training.log.log_every == 4
    assert "is a run of 'small'" in fails(capsys, "train", "tiny", "--out", "runs/small", "--resume")


@pytest.mark.slow
def test_a_history_in_bfloat16_is_asked_for_written_down_and_continued(place, capsys):
    words = ["train", "recipe.py:small", "--data", "text", "--quiet"]
    assert main([*words, "--stages.1.method.solver.history-dtype", "bfloat16"]) == 0
    stored = json.loads(Path("runs/small/experiment.json").read_text())
    assert [stage["method"]["solver"].get("history_dtype") for stage in stored["stages"]] == [None, "bfloat16"]
    assert Run(Path("runs/small")).experiment().stages[1].method.solver.history_dtype is torch.bfloat16
    assert main([*words, "--resume"]) == 0
    assert main(["evaluate", "runs/small"]) == 0
    capsys.readouterr()
    sentence = fails(capsys, *words, "--resume", "--stages.1.method.solver.history-dtype", "None", code=1)
    assert "stages.1.method.solver.history_dtype = 'bfloat16' and cannot be continued with None" in sentence


def test_evaluate_prints_the_score_and_what_it_depends_on(run, capsys):
    assert main(["evaluate", "runs/small", "--split", "test", "--max-evals", "9", "--rtol", "0.5"]) == 0
    text = capsys.readouterr().out
    for words in ("bits per character", "nats", "Memory length", "Segment length", "9 evaluations", "tolerance 0.5"):
        assert words in text
    assert "Tokens scored  │ 129 of 129" in text
    assert "exact: the text is read in one piece" in text
    sentence = fails(capsys, "evaluate", "runs/small", "--max-evals", "0")
    assert "at least 1" in sentence


def asked(event: dict) -> dict:
    """What a validation was asked for: the rest of its setting follows from the run."""
    return {name: event["setting"][name] for name in ("batch_size", "segment_length", "max_segments")}


@pytest.mark.parametrize("which", ["best", "last"])
def test_a_model_scores_again_what_its_log_says(run, which):
    """To the last bit: solver, stop and gradient rule are those that the validation had."""
    found = trained_model(run, checkpoint=which)
    logged = [event for event in Run(run).events() if event["event"] == "valid" and event["step"] == found.step][-1]
    again = evaluate(found.model, found.corpus.valid, **asked(logged), method=found.stage.evaluation_method)
    assert again.nll_per_token == logged["nats"]
    assert again.forward == logged["forward"]
    assert dataclasses.asdict(again.setting) == logged["setting"]


@pytest.mark.slow
def test_where_two_stages_meet_the_checkpoint_is_of_the_second(place):
    """Its best value is measured there, and the training goes on there."""
    assert main(["train", "recipe.py:small", "--data", "text", "--keep", "20", "--quiet"]) == 0
    run = Run(Path("runs/small"))
    _, second = run.experiment().stages
    for folder in checkpoint.all_in(run.checkpoints):
        if folder.name > "step-00000003":
            shutil.rmtree(folder)
    logged = [event for event in run.events() if event["event"] == "valid" and event["step"] == 3][-1]
    for which in ("best", "last"):
        found = trained_model(run.path, checkpoint=which)
        assert found.step == 3
        assert found.stage == second
        assert found.model.layer.method == second.method
        again = evaluate(found.model, found.corpus.valid, **asked(logged), method=second.evaluation_method)
        assert again.nll_per_token == logged["nats"]


def test_a_model_from_a_run_warns_where_a_solve_fails(run):
    """The trainer and the commands count failures; whoever calls the model does not."""
    with pytest.warns(ConvergenceWarning, match="0 of 1 samples converged"):
        trained_model(run).generate("ab", 3)


def test_what_a_run_is_written_in_has_a_number(run):
    assert json.loads((run / "experiment.json").read_text())["format"] == 3
    assert "format" not in Run(run).stored()


VERBS = {
    "evaluate": "evaluate runs/small",
    "generate": "generate runs/small --prompt ab --length 3",
    "report": "report runs/small",
    "export": "export runs/small",
    "resume": "train recipe.py:small --data text --out runs/small --resume",
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("written", "author"),
    [(None, "version 0.1"), (2, "another version (its format is 2)"), ("3", "another version (its format is '3')")],
)
def test_a_run_of_another_version_is_refused_in_one_sentence_and_loses_nothing(run, capsys, verb, written, author):
    described = json.loads((run / "experiment.json").read_text())
    del described["format"]
    if written is not None:
        described["format"] = written
    (run / "experiment.json").write_text(json.dumps(described))

    def everything():
        return {file: file.read_bytes() for file in Path("runs").rglob("*") if file.is_file()}

    before = everything()
    assert fails(capsys, *VERBS[verb].split(), code=1) == (
        f"runs/small was written by {author} of equilibria, and this version reads format 3; use the version that "
        "wrote it, or train again."
    )
    assert everything() == before


OWN = """
import dataclasses
from equilibria import Anderson
from recipe import small as other


@dataclasses.dataclass(frozen=True)
class Mine(Anderson):
    patience: int = 3


def small():
    value = other()
    stage = value.stages[1]
    stage = dataclasses.replace(stage, method=dataclasses.replace(stage.method, solver=Mine()))
    return dataclasses.replace(value, stages=(stage,))
"""


def test_a_run_with_a_solver_of_ones_own_is_read_with_its_recipe(place, capsys, monkeypatch):
    monkeypatch.syspath_prepend(place)
    (place / "own.py").write_text(OWN)
    assert main(["train", "own.py:small", "--data", "text", "--quiet"]) == 0
    assert "unknown kind 'Mine'" in fails(capsys, "evaluate", "runs/small", code=1)
    assert "--recipe FILE.py:FUNCTION" in fails(capsys, "generate", "runs/small", "--prompt", "a", code=1)
    recipe = ["--recipe", "own.py:small"]
    assert main(["evaluate", "runs/small", *recipe]) == 0
    assert main(["generate", "runs/small", "--prompt", "a", "--length", "3", *recipe]) == 0


def test_a_run_from_another_machine_uses_the_device_that_is_there(run):
    stored = json.loads((run / "experiment.json").read_text())
    stored["training"]["devices"]["device"] = "cuda:99"
    (run / "experiment.json").write_text(json.dumps(stored))
    assert trained_model(run).experiment.training.devices.device == "cuda:99"


def test_evaluate_by_the_authors_protocol(run, capsys):
    words = ["evaluate", "runs/small", "--protocol", "official"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    streams, tokens = found["setting"]["batch_size"], found["setting"]["stream_tokens"] + 1
    assert streams == Run.open(run).experiment().training.validation.eval_batch_size
    assert (found["setting"]["official"], found["tokens"]) == (True, streams * (tokens // streams - 1))
    trained = trained_model(run)
    again = trained.evaluate(batch_size=streams, official=True)
    assert (again.nll_per_token, again.tokens) == (found["nats"], found["tokens"])
    assert main([*words, "--batch-size", "3"]) == 0
    assert "official: each has n // 3 of the n tokens, and its first token is not" in capsys.readouterr().out


def test_evaluate_finds_a_corpus_that_has_moved(run, place, capsys):
    (place / "text").rename(place / "moved")
    description = json.loads((run / "experiment.json").read_text())
    description["corpus"]["root"] = str(place / "text")
    (run / "experiment.json").write_text(json.dumps(description))
    assert "text does not exist" in fails(capsys, "evaluate", "runs/small", code=1)
    assert main(["evaluate", "runs/small", "--data", "moved", "--checkpoint", "last"]) == 0
    capsys.readouterr()
    (place / "moved" / "train.txt").write_text("abcdefghijk \n" * 30)
    assert "which the run's vocabulary" in fails(capsys, "evaluate", "runs/small", "--data", "moved", code=1)


def test_weights_that_the_library_would_now_call_otherwise_are_not_blamed_on_the_corpus(run, capsys):
    description = json.loads((run / "experiment.json").read_text())
    description["model"]["cell"]["weight_norm"] = False
    (run / "experiment.json").write_text(json.dumps(description))
    assert "have other names" in fails(capsys, "evaluate", "runs/small", code=1)


def test_generate_continues_the_prompt_and_repeats_itself_with_a_seed(run, capsys):
    texts = []
    for seed in ("1", "1", "2"):
        assert main(["generate", "runs/small", "--prompt", "abc", "--length", "20", "--seed", seed]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("abc")
    assert len(texts[0]) == len("abc") + 20 + 1


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["--prompt", "aéb"], 2, "'é'"),
        (["--prompt", ""], 2, "The prompt is empty"),
        (["--prompt", "a", "--length", "0"], 2, "at least 1"),
        (["--prompt", "a", "--temperature", "-1"], 2, "temperature"),
    ],
)
def test_generate_refuses_what_it_cannot_do(run, capsys, words, code, sentence):
    assert sentence in fails(capsys, "generate", "runs/small", *words, code=code)


def test_a_damaged_checkpoint_is_named(run, capsys):
    for folder in checkpoint.all_in(run / "checkpoints"):
        (folder / "model.safetensors").write_bytes(b"nonsense")
    assert main(["evaluate", "runs/small"]) == 1
    assert "checkpoint" in capsys.readouterr().err


def test_report_says_where_the_page_is(run, capsys):
    assert main(["report", "runs/small"]) == 0
    assert capsys.readouterr().out == "Finished after 8 steps.\nreport: runs/small/report/index.html\n"


def test_a_stopped_training_is_one_sentence(place, capsys):
    words = ["train", "recipe.py:small", "--data", "text", "--learning-rate", "1e30", "--clip", "None", "--quiet"]
    assert re.match(r"Step \d+ \(stage '\w+'\): the (loss|gradient) is not finite, ", fails(capsys, *words, code=1))
    lines = [json.loads(line) for line in Path("runs/small/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["event"] == "stopped"
    assert main(["report", "runs/small"]) == 0
    assert capsys.readouterr().out.startswith("Stopped at step")


@pytest.mark.parametrize("kind", [CheckpointError, TrainingStopped, NotFinite, TrainingInterrupted])
def test_own_errors_are_printed_as_they_are(kind):
    assert explain(kind("What happened; what to do.")) == ("What happened; what to do.", 1)


def test_the_table_and_the_report_say_how_the_score_was_measured(run, capsys):
    record = read(run)
    (row,) = (row for row in summary.rows(record) if row.label == "Validation")
    words = "memory 4, segments of 8, 8 streams, at most 30 evaluations, tolerance 0.01, 128 of 129 tokens"
    assert row.beside.endswith(f", the best; {words}")
    assert words in report.write(record).read_text(encoding="utf-8")


def score_of(capsys, *words: str) -> tuple[str, str]:
    """The score that `evaluate` prints, and everything else."""
    assert main(["evaluate", *words]) == 0
    text = capsys.readouterr().out
    return re.search(r"Score +│ (\S+)", text)[1], text


def test_evaluate_with_another_memory_scores_otherwise_and_says_so(run, capsys):
    scores = {}
    for length in ("0", "4", "9"):
        scores[length], text = score_of(capsys, "runs/small", "--memory-length", length)
        assert re.search(rf"Memory length +│ {length} tokens +│ {'4 in the training' if length != '4' else ' '}", text)
    assert len(set(scores.values())) == 3
    assert scores["4"] == score_of(capsys, "runs/small")[0]
    assert "give at most 24." in fails(capsys, "evaluate", "runs/small", "--memory-length", "40")
    assert "segment of 20 together; give at most 12." in fails(
        capsys, "evaluate", "runs/small", "--memory-length", "13", "--segment-length", "20"
    )
    assert "give at most 24." in fails(capsys, "generate", "runs/small", "--prompt", "ab", "--memory-length", "25")


def test_several_prompts_and_a_stop(run, capsys):
    words = ["--temperature", "0", "--length", "6"]
    assert main(["generate", "runs/small", "--prompt", "ab", "abcabda", *words]) == 0
    texts = capsys.readouterr().out.removesuffix("\n").split("\n\n")
    assert [len(text) for text in texts] == [2 + 6, 7 + 6]
    assert [text[: len(text) - 6] for text in texts] == ["ab", "abcabda"]
    assert main(["generate", "runs/small", "--prompt", "ab", *words]) == 0
    alone = capsys.readouterr().out.removesuffix("\n")
    stop = alone[4]
    assert main(["generate", "runs/small", "--prompt", "ab", *words, "--stop", stop]) == 0
    assert capsys.readouterr().out.removesuffix("\n") == alone[: alone.index(stop, 2)]
    assert "is not one of the" in fails(capsys, "generate", "runs/small", "--prompt", "ab", "--stop", "abd")


def test_generation_says_how_many_solves_failed(run, capsys):
    stored = json.loads(Path("runs/small/experiment.json").read_text())
    for stage in stored["stages"]:
        stage["method"]["stop"] |= {"rtol": 1e-9, "atol": 0.0, "max_evals": 3}
        stage["eval_stop"] = None
    Path("runs/small/experiment.json").write_text(json.dumps(stored))
    assert main(["generate", "runs/small", "--prompt", "ab", "--length", "4"]) == 0
    assert "note: 4 of 4 solves did not converge" in capsys.readouterr().err


def test_evaluate_with_more_streams_says_what_that_leaves_out(run, capsys):
    _, text = score_of(capsys, "runs/small", "--batch-size", "10")
    assert "Tokens scored  │ 120 of 129" in text
    assert "its first token has no past" in text


def test_a_memory_is_set_in_every_block_of_a_chain():
    value = experiment_of("tiny")
    cell = value.model.cell
    chain = dataclasses.replace(value, model=dataclasses.replace(value.model, cell=ChainConfig(cells=(cell, cell))))
    assert with_memory(chain, 7).model.cell == ChainConfig(cells=(dataclasses.replace(cell, memory=7),) * 2)


def test_a_memory_beyond_the_biases_is_refused_only_where_they_are_missed(run, capsys):
    """The cell of ``tiny`` sees 1,000 positions and has 1,024 biases, so it can remember as many as anyone likes."""
    assert with_memory(experiment_of("tiny"), 5000, segment=65).model.cell.memory == 5000
    stored = json.loads(Path("runs/small/experiment.json").read_text())
    stored["model"]["cell"]["window"] = 9
    Path("runs/small/experiment.json").write_text(json.dumps(stored))
    assert (
        score_of(capsys, "runs/small", "--memory-length", "500")[0]
        == score_of(capsys, "runs/small", "--memory-length", "8")[0]
    )
    stored["model"]["cell"]["window"] = 0
    Path("runs/small/experiment.json").write_text(json.dumps(stored))
    sentence = fails(capsys, "evaluate", "runs/small", "--memory-length", "0", "--segment-length", "40")
    assert "give segments of at most 32." in sentence


@pytest.mark.parametrize(
    "words", [*some_slow("--explicit 3", "--untied --explicit=3"), "--explicit 3 --recompute --layer-memory"]
)
def test_an_explicit_twin_goes_all_the_way(place, capsys, monkeypatch, words):
    monkeypatch.setattr(figures, "FIGURES", FIGURES)
    words = words.split()
    flags = ["--data", "text", "--stages.1.steps", "5", "--model.cell.inner", "6"]
    assert main(["train", *words, "recipe.py:small", *flags]) == 0
    name = "small-3-layers"
    name += "-untied" if "--untied" in words else "-layer-memory-recomputed" if "--recompute" in words else ""
    run = Run(Path("runs") / name)
    text = capsys.readouterr().out
    assert text.startswith(f"{name} on text, in runs/{name}\n")
    assert "step 8/8 explicit  loss " in text
    assert "validation: memory 4, segments of 8, 8 streams, 128 of 129 tokens" in text
    assert not re.search("solve|forward|evaluations", text)
    stored = run.experiment()
    assert (stored.model.cell.inner, stored.total_steps, stored.model.explicit.depth) == (6, 8, 3)
    assert stored.model.explicit.checkpoint == ("--recompute" in words)
    page = (run.report / "index.html").read_text(encoding="utf-8")
    assert "An explicit network of 3 layers with" in page
    assert 'id="loss"' in page
    assert 'id="residual"' not in page
    assert "an explicit network of 3 layers" in score_of(capsys, str(run.path))[1]
    assert "which solves nothing" in fails(capsys, "evaluate", str(run.path), "--max-evals", "9")
    assert main(["generate", str(run.path), "--prompt", "ab", "--length", "5"]) == 0
    assert len(capsys.readouterr().out) == 8
    assert main(["train", "recipe.py:small", *words, "--resume", "--quiet"]) == 0  # with the numbers that it had


def test_an_interrupted_twin_says_how_to_go_on(place, capsys, monkeypatch):
    step = Trainer.step

    def interrupted(trainer, segment):
        if trainer.steps_done == 4:
            raise KeyboardInterrupt
        return step(trainer, segment)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupted)
        assert main(["train", "recipe.py:small", "--data", "text", "--explicit", "2", "--layer-memory"]) == 130
    words = capsys.readouterr().err.strip().splitlines()[-1].partition("equilibria ")[2].split()
    assert words[:5] == ["train", "recipe.py:small", "--layer-memory", "--explicit", "2"]
    assert main(words) == 0
    assert "continuing after step 4 of 8" in capsys.readouterr().out


RECURRENT = """
import dataclasses
from equilibria.lm.model import RecurrentConfig
from recipe import small


def gru():
    value = small()
    stages = tuple(dataclasses.replace(stage, method=None) for stage in value.stages)
    training = value.training.changed(spectral_radius=0)
    model = RecurrentConfig(network="gru", hidden=5)
    return dataclasses.replace(value, name="gru", model=model, stages=stages, training=training)
"""


def test_a_recurrent_network_is_trained_evaluated_and_speaks(place, capsys, monkeypatch):
    monkeypatch.syspath_prepend(place)
    (place / "own.py").write_text(RECURRENT)
    assert main(["train", "own.py:gru", "--data", "text"]) == 0
    assert "validation: segments of 8, 8 streams, 128 of 129 tokens" in capsys.readouterr().out
    assert "a recurrent network (GRU) of 5 channels" in score_of(capsys, "runs/gru")[1]
    assert "a RecurrentConfig has no length" in fails(capsys, "evaluate", "runs/gru", "--memory-length", "3")
    assert main(["generate", "runs/gru", "--prompt", "ab", "--length", "5"]) == 0
    assert len(capsys.readouterr().out) == 8
    assert "which has no equilibrium" in fails(capsys, "train", "own.py:gru", "--explicit", "3", code=1)


def test_a_made_up_task_says_how_many_answers_are_right(place, capsys):
    sizes = ["--corpus.blank", "5", "--corpus.train", "64", "--corpus.valid", "32", "--corpus.test", "32"]
    assert main(["train", "copying-lstm", *sizes, "--stages.0.steps", "3", "--warmup", "0"]) == 0
    text = capsys.readouterr().out
    assert "validation: segments of 25, 32 streams, 800 of 800 tokens" in text
    assert re.search(r"step 3  valid .* nats per symbol, [\d.]+ % right, best of its stage", text)
    assert re.search(r"Right answers +│ [\d.]+ % +│ of those that the task asks for; guessing gets", text)
    _, text = score_of(capsys, "runs/copying-lstm", "--batch-size", "8")
    assert re.search(r"Right answers +│ [\d.]+ % +│ guessing gets 12.5 %", text)
    for prompt in ([], ["--prompt", "123"]):
        refused = fails(capsys, "generate", "runs/copying-lstm", *prompt)
        assert "runs/copying-lstm was trained on a synthetic task, copying-5, which has no text to continue" in refused
    assert re.search(r"Batch size +│ 8 streams +│ each sequence stands alone", text)
