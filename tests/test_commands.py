"""The command line: help, and that every error is one sentence with the right exit code."""

from __future__ import annotations

import dataclasses
import errno
import inspect
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import tyro
from packaging.requirements import Requirement

from equilibria.__main__ import main
from equilibria.commands import arguments, errors, prepare, train
from equilibria.commands.main import help_text
from equilibria.commands.recipe import experiment_of
from equilibria.errors import UsageError
from equilibria.lm.corpora import CATALOGUE, PENN_TREEBANK_CHARACTER_COUNTS, WikiText2, WikiText103
from equilibria.lm.recipes import RECIPES
from equilibria.lm.runs import checkpoint
from small_run import fails, furnish


@pytest.fixture
def place(tmp_path, monkeypatch, one_figure) -> Path:
    """A folder with a recipe and a corpus, which is where the commands run."""
    furnish(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    return tmp_path


@pytest.mark.parametrize("words", [[], ["--help"], ["help"]])
def test_help_names_the_verbs_the_recipes_and_an_example(capsys, words):
    assert main(words) == 0
    text = capsys.readouterr().out
    for word in ("train RECIPE", "evaluate RUN", "generate RUN", "report RUN", "prepare CORPUS"):
        assert word in text
    for word in ("tiny ", "copying ", "ptb ", "equilibria train tiny"):
        assert word in text


def test_the_help_has_every_recipe_in_the_words_of_its_docstring():
    text = " ".join(help_text().split())
    for name, recipe in RECIPES.items():
        words = (inspect.getdoc(recipe) or "").partition("\n")[0].replace("``", "`")
        assert words
        assert f" {name} {words} " in text


FRONT = """
import sys
sys.argv = ["equilibria", *sys.argv[1:]]
import equilibria_command
code = equilibria_command.main()
loaded = "torch" in sys.modules
import equilibria
print(f"code {code}, torch {loaded}, {callable(equilibria.fixed_point)}, {equilibria.load.__name__}")
"""


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("--help", "code 0, torch False"),
        *(
            pytest.param(words, f"code {code}, torch {loaded}", marks=pytest.mark.slow)
            for words, code, loaded in (
                ("", 0, False),
                ("--version", 0, False),
                ("trian tiny --debug", 2, False),
                ("doctor --help", 0, True),
            )
        ),
        ("trian", "code 2, torch False"),
        ("--debug report nowhere", "code 2, torch True"),
    ],
)
def test_only_a_verb_loads_pytorch(tmp_path, words, found):
    """Afterwards the package is whole: a name that is both a function and a module is the function."""
    command = [sys.executable, "-c", FRONT, *words.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == [f"{found}, True, load"], done.stderr


@pytest.mark.parametrize("verb", ["evaluate", "generate", "report", "prepare", "train tiny", "train"])
def test_every_verb_explains_itself(capsys, verb):
    assert main([*verb.split(), "--help"]) == 0
    assert f"usage: equilibria {verb}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("trian", "There is no verb 'trian'; did you mean train?"),
        ("train tinny", "There is no recipe 'tinny'; did you mean tiny?"),
        ("train xyzzyq", "There is no recipe 'xyzzyq'; there are copying, copying-400, "),
        ("train --out x", "train needs a recipe before --out"),
        ("train --out tiny", "train needs a recipe before --out"),
        ("train tniy --out tiny", "There is no recipe 'tniy'; did you mean tiny?"),
        ("train --out tiny tniy", "There is no recipe 'tniy'; did you mean tiny?"),
        ("train tiny --resume --overwrite", "give one of the two."),
        ("train tiny --learning-rte 3", "There is no flag --learning-rte; did you mean --learning-rate?"),
        ("train tiny --training.batch-sise=3", "did you mean --batch-size?"),
        ("train tiny --penalty 3", "--penalty could be --stages.0.penalty, --stages.1.penalty; give the full name."),
        ("train tiny --batch-size x", "--batch-size takes a whole number, and 'x' is none."),
        ("train tiny --learning-rate x", "--learning-rate takes a number, and 'x' is none."),
        ("train tiny --batch-size 0", "Batches(batch_size=0): batch_size is at least 1; try 8."),
        ("train tiny --batch-size", "--batch-size needs a value after it."),
        ("train tiny --training.betas 1", "--training.betas needs 2 values after it."),
        (
            "train tiny --optimiser adamm",
            "--optimiser is one of adam, adamw, sgd, asgd, and not 'adamm'; did you mean adam",
        ),
        (
            "train tiny --stages.1.method.solver.history-dtype bfloat61",
            "--stages.1.method.solver.history-dtype is one of ",
        ),
        ("train tiny --stages.1.method.solver.history-dtype bfloat61", "and not 'bfloat61'; did you mean bfloat16"),
        (
            "train tiny --stages.1.method.solver.history-dtype float16",
            "Anderson(history_dtype=torch.float16): a history is kept in torch.bfloat16, ",
        ),
        ("train tiny --untied", "--untied says more about --explicit LAYERS"),
        ("train tiny --explicit x", "--explicit takes a number of layers from 1 on, and not 'x'; try --explicit 12."),
        ("train tiny --explicit 0", "--explicit takes a number of layers from 1 on, and not '0'"),
        ("train tiny --explicit --untied", "--explicit takes a number of layers from 1 on, and not '--untied'"),
        ("train tiny --explicit", "--explicit needs a value after it."),
        ("train tiny --explict 3", "There is no flag --explict; did you mean --explicit?"),
        ("train tiny 3", "There is no place for '3' here"),
        ("train tiny --data text", "the corpus PythonDocs is not read from a folder"),
        ("train recipe.py", "name the function in it that returns an Experiment: recipe.py:FUNCTION."),
        ("train recipe.py:smal", "There is no function in recipe.py 'smal'; did you mean small?"),
        ("train recipe.py:number", "recipe.py:number returned int"),
        ("train nothing.py:x", "nothing.py does not exist"),
        ("evaluate", "evaluate needs RUN: The folder that `equilibria train` has written, or `tiny` for the model"),
        ("evaluate runs/none", "runs/none does not exist"),
        ("evaluate runs/none --max-segments 0", "--max-segments 0: it must be at least 1"),
        ("evaluate runs/none --max-segments -1", "--max-segments -1: it must be at least 1"),
        ("evaluate runs/none --segment-length 0", "--segment-length 0: it must be at least 1"),
        ("evaluate runs/none --segment-length -1", "--segment-length -1: it must be at least 1"),
        ("evaluate runs/none --memory-length -1", "--memory-length -1: it must be at least 0"),
        ("evaluate runs/none --batch-size 0", "--batch-size 0: it must be at least 1"),
        ("evaluate text", "text holds no run (no experiment.json)"),
        ("generate runs/none", "runs/none does not exist"),
        ("report runs/none", "runs/none does not exist"),
        ("prepare pbt", "There is no corpus 'pbt'; did you mean ptb?"),
        ("prepare ptb", "ptb is read from a folder with train.txt, valid.txt and test.txt; give it with --data."),
        ("prepare ptb-char", "ptb-char is read from a folder with train.txt, valid.txt and test.txt; give it with"),
        ("prepare copying --data text", "copying is not read from a folder; leave --data out."),
    ],
)
def test_a_wrong_command_line_is_one_sentence(place, capsys, words, sentence):
    assert sentence in fails(capsys, *words.split())


def test_the_words_of_tyro_are_those_of_the_releases_that_are_allowed():
    """The sentences above are taken from the text of tyro, so a release with other words must not come unseen."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (needed,) = (text for text in project["optional-dependencies"]["train"] if text.startswith("tyro"))
    allowed = Requirement(needed).specifier
    assert tyro.__version__ in allowed
    assert "1.0.17" in allowed
    assert "2.0" not in allowed


def test_words_of_tyro_that_are_not_known_are_passed_on():
    panel = "╭─ Oh ────╮\n│ A new message │\n│ in two lines │\n│ ────── │\n│ hints │\n╰──────╯"
    assert (
        arguments._sentence(panel, "train")
        == "A new message in two lines `equilibria train --help` shows what is expected."
    )


def test_a_missing_corpus_is_one_sentence_and_leaves_no_run(place, capsys):
    assert "nowhere" in fails(capsys, "train", "recipe.py:small", "--data", "nowhere", code=1)
    assert "--data" in fails(capsys, "train", "ptb", code=1)
    (place / "text" / "valid.txt").write_bytes(b"abc\n\xff\n")
    assert "valid.txt" in fails(capsys, "train", "recipe.py:small", "--data", "text", code=1)
    assert not Path("runs").exists()


def test_prepare_counts_tokens(place, capsys):
    assert main(["prepare", "text-folder", "--data", "text", "--unit", "character"]) == 0
    text = capsys.readouterr().out
    assert "520 tokens" in text
    assert "newline" in text
    assert "order\N{NO-BREAK SPACE}4" in text
    assert main(["prepare", "copying", "--blank", "5"]) == 0
    assert "20,000 sequences of 25" in capsys.readouterr().out


def test_prepare_reads_the_penn_treebank_by_characters(place, capsys, monkeypatch):
    for part, count in {"train": 520, "valid": 130, "test": 130, "vocabulary": 6}.items():
        monkeypatch.setitem(PENN_TREEBANK_CHARACTER_COUNTS, part, count)
    assert main(["prepare", "ptb-char", "--data", "text"]) == 0
    text = capsys.readouterr().out
    assert "penn_treebank_characters, by characters" in text
    assert "6 characters" in text
    assert "bits per character on validation" in text


def test_prepare_knows_every_source():
    options = prepare.Options(corpus="", data=Path("somewhere"))
    made = {name: make for name, make in prepare.SOURCES.items() if not name.startswith("wikitext")}
    kinds = {type(make(options)) for make in made.values()}
    assert kinds == set(CATALOGUE) - {WikiText103, WikiText2}


def test_prepare_reports_the_unknown_word(place, capsys):
    (place / "text" / "train.txt").write_text("a b <unk>\n" * 9 + "a")
    assert main(["prepare", "text-folder", "--data", "text"]) == 0
    assert "training 24.32%" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "sentence", "code"),
    [
        (errors.UsageError("a b"), "a b", 2),
        (ValueError("one\n  two"), "one two", 1),
        (OSError(errno.ENOSPC, "No space", "x/y"), "x/y: there is no space left on the disk", 1),
        (PermissionError(errno.EACCES, "Denied", "x"), "x: permission denied", 1),
        (FileNotFoundError(errno.ENOENT, "None", "x"), "x: there is no such file or folder", 1),
        (MemoryError(), "Out of memory", 1),
        (checkpoint.CheckpointError("damaged"), "damaged", 1),
        (ModuleNotFoundError("no", name="matplotlib.axes"), 'pip install "equilibria[train]"', 1),
        (KeyError("x"), "Unexpected KeyError: 'x' (set EQUILIBRIA_DEBUG=1 or add --debug", 1),
    ],
)
def test_every_error_has_a_sentence_and_a_code(error, sentence, code):
    said, number = errors.explain(error)
    assert sentence in said
    assert number == code


def test_tracebacks_only_on_request(place, capsys, monkeypatch):
    assert main(["report", "nope", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setenv("EQUILIBRIA_DEBUG", "1")
    assert main(["report", "nope"]) == 2
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setenv("EQUILIBRIA_DEBUG", "0")
    fails(capsys, "report", "nope")


MISSING = """
import os, sys, torch
for module in sys.argv[1:]:
    sys.stderr.write(f"{module}\\0")
    sys.stderr.flush()
    child = os.fork()  # with torch, and nothing of the library
    if not child:
        sys.modules[module] = None
        from equilibria.__main__ import main
        code = main(["train", "recipe.py:small", "--data", "text", "--quiet"])
        sys.stderr.flush()
        os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    sys.stderr.write(f"\\0{code}\\0")
    sys.stderr.flush()
"""


@pytest.mark.slow
def test_a_missing_extra_is_named(place):
    modules = ["tyro", "rich", "safetensors", "matplotlib"]
    command = [sys.executable, "-c", MISSING, *modules]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    *said, rest = result.stderr.split("\0")
    assert rest == ""
    assert said[::3] == modules
    assert said[2::3] == ["1"] * 4
    for module, sentence in zip(modules, said[1::3], strict=True):
        assert module in sentence
        assert 'pip install "equilibria[train]"' in sentence
        assert "Traceback" not in sentence


@pytest.mark.parametrize(
    ("words", "recipe", "rest"),
    [
        ("tiny --out tiny", "tiny", "--out tiny"),
        ("--out tiny tiny", "tiny", "--out tiny"),
        ("--out tiny copying", "copying", "--out tiny"),
        ("--out=x tiny", "tiny", "--out=x"),
        ("--resume --quiet tiny --out x", "tiny", "--resume --quiet --out x"),
        ("--overwrite a.py:b", "a.py:b", "--overwrite"),
        ("--untied tiny --explicit 3", "tiny", "--untied --explicit 3"),
        ("--explicit 3 --layer-memory --recompute tiny", "tiny", "--explicit 3 --layer-memory --recompute"),
        ("--training.betas 0.9 0.99 tiny", "tiny", "--training.betas 0.9 0.99"),
        ("a.py:b --corpus.root c.py:d", "a.py:b", "--corpus.root c.py:d"),
    ],
)
def test_the_recipe_is_told_from_the_values_of_flags(words, recipe, rest):
    assert train._split(words.split()) == (recipe, rest.split())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, None])
def test_the_dtype_of_a_history_is_a_flag(dtype):
    default = train.Options(experiment_of("tiny"))
    for words in (["--stages.1.method.solver.history-dtype"], ["--stages.1.method.gradient.solver.history-dtype"]):
        words = [*words, str(dtype).removeprefix("torch.")]
        (_, stage) = arguments.parse(train.Options, words, verb="train tiny", default=default).experiment.stages
        solver = stage.method.gradient.solver if "gradient" in words[0] else stage.method.solver
        assert solver == dataclasses.replace(default.experiment.stages[1].method.solver, history_dtype=dtype)
        changed = train.Options(dataclasses.replace(default.experiment, stages=(default.experiment.stages[0], stage)))
        kept = arguments.parse(train.Options, ["--seed", "3"], verb="train tiny", default=changed)
        assert kept.experiment.stages[1] == stage


def test_flags_are_those_of_the_tree_of_dataclasses(place):
    known = arguments.flags(train.Options(experiment=experiment_of("recipe.py:small")))
    assert known["--stages.1.method.stop.rtol"] == 1e-2
    assert known["--training.log.memory-depths"] == (2, 4)
    assert "--out" in known
    assert not any(flag.startswith("--experiment") for flag in known)


@pytest.mark.parametrize("part", ["", "gradient."])
def test_the_norm_of_a_stop_is_a_flag(part, capsys):
    default, flag = train.Options(experiment_of("tiny")), f"--stages.1.method.{part}stop.norm"
    (_, stage) = arguments.parse(train.Options, [flag, "max"], verb="train tiny", default=default).experiment.stages
    method = default.experiment.stages[1].method
    changed = stage.method.gradient.stop if part else stage.method.stop
    assert changed == dataclasses.replace(method.gradient.stop if part else method.stop, norm="max")
    with pytest.raises(UsageError, match="is one of l2, max, and not 'l1'; did you mean l2"):
        arguments.parse(train.Options, [flag, "l1"], verb="train tiny", default=default)
