"""Anything may be typed or found in a file: an answer in one sentence, no traceback, no hang, no changed file.

EQUILIBRIA_FUZZ=1700 pytest tests/test_fuzz.py     a campaign: so many cases of each of the six kinds
"""

import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import signal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from equilibria.commands.main import run as command
from equilibria.lm.recipes import RECIPES
from equilibria.lm.runs import checkpoint
from small_run import furnish

CASES = int(os.environ.get("EQUILIBRIA_FUZZ", "25"))
campaign = settings(
    max_examples=CASES,
    deadline=None,
    derandomize="EQUILIBRIA_FUZZ" not in os.environ,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


fewer = settings(campaign, max_examples=CASES if "EQUILIBRIA_FUZZ" in os.environ else 8)
"""For kinds whose cases take a second each."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a recipe, a corpus and a run of eight steps."""
    folder = tmp_path_factory.mktemp("fuzz")
    furnish(folder)
    assert said(*training(folder), "--quiet")[0] == 0
    return folder


def training(folder, run="run"):
    return ["train", f"{folder / 'recipe.py'}:small", "--data", str(folder / "text"), "--out", str(folder / run)]


class TookTooLong(BaseException):
    """No handler of the library may catch this."""


def alarm(number, frame):
    raise TookTooLong


def said(*words):
    """The exit code of a command line, and all that it printed; at most a minute."""
    output = io.StringIO()
    before = signal.signal(signal.SIGALRM, alarm)
    signal.alarm(60)
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            code = command([str(word) for word in words])
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return code, output.getvalue()


def state_of(folder):
    """Every file below a folder and its sum."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def check(code, output, *, screen=False):
    """A sentence, or a screen, and neither a traceback nor the excuse for what was not foreseen."""
    assert code in (0, 1, 2), output
    assert "Traceback" not in output
    assert "Unexpected" not in output, output
    if code and not screen:
        assert output.count("equilibria: ") >= 1
        assert len(output) < 2000, output


NAMES = st.sampled_from(["train", "evaluate", "generate", "report", "export", "prepare", "tiny", "ptb", "help", "run"])
FLAGS = (
    "--out --data --explicit --untied --resume --overwrite --quiet --help --batch-size --training.batch-size --rtol "
    "--prompt --length --seed --split --memory-length --stages.0.steps --training.learning-rate --model.cell.width "
    "--checkpoint --temperature --top-k --training.parallel --training.unconverged"
)
VALUES = st.one_of(
    st.integers(-9, 99).map(str), st.floats().map(str), st.text(max_size=12), st.just("nan"), st.just("")
)


@pytest.mark.slow
@campaign
@given(words=st.lists(st.one_of(NAMES, st.sampled_from(FLAGS.split()), VALUES), max_size=6))
def test_command_lines(place, words):
    """No training is to begin: that of a recipe would."""
    if words[:1] == ["train"]:
        words = [*words, "--training.batch-size", "0"]
    if words[:1] == ["prepare"] and ("wikitext" in " ".join(words)):
        return
    before = state_of(place)
    here = os.getcwd()
    os.chdir(place)
    try:
        check(*said(*words))
    finally:
        os.chdir(here)
    assert state_of(place) == before


def spoilt(value, draw):
    """A JSON value with one part changed, taken out or added."""
    if isinstance(value, dict) and value and draw(st.integers(0, 3)):
        key = draw(st.sampled_from(sorted(value)))
        return {**value, key: spoilt(value[key], draw)}
    if isinstance(value, list) and value and draw(st.integers(0, 3)):
        index = draw(st.integers(0, len(value) - 1))
        return [*value[:index], spoilt(value[index], draw), *value[index + 1 :]]
    if isinstance(value, dict) and value and draw(st.booleans()):
        return {name: part for name, part in value.items() if name != draw(st.sampled_from(sorted(value)))}
    plain = st.one_of(
        st.none(), st.booleans(), st.integers(-3, 99), st.floats(), st.text(max_size=9), st.just([]), st.just({})
    )
    return draw(plain)


@fewer
@given(data=st.data())
def test_experiments(place, data):
    """experiment.json of a run, with a value that nobody has written; what is still an experiment may do its work."""
    folder = place / "spoilt"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(place / "run", folder)
    stored = json.loads((folder / "experiment.json").read_text())
    whole = json.dumps(spoilt(stored, data.draw))
    if data.draw(st.booleans()):
        whole = whole[: data.draw(st.integers(0, len(whole)))]
    (folder / "experiment.json").write_text(whole)
    before = state_of(folder)
    verb = data.draw(st.sampled_from(["evaluate", "generate", "export"]))
    more = {"evaluate": ["--max-segments", "1"], "generate": ["--length", "2", "--prompt", "a"], "export": []}[verb]
    target = ["--out", place / "exported.safetensors"] if verb == "export" else []
    check(*said(verb, folder, *more, *target))
    assert state_of(folder) == before


@campaign
@given(texts=st.lists(st.binary(max_size=60), min_size=3, max_size=3), unit=st.sampled_from(["word", "character"]))
def test_corpora(place, texts, unit):
    folder = place / "corpus"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for split, text in zip(("train", "valid", "test"), texts, strict=True):
        (folder / f"{split}.txt").write_bytes(text)
    before = state_of(folder)
    check(*said("prepare", "text-folder", "--data", folder, "--unit", unit))
    check(*said("prepare", "ptb", "--data", folder))
    assert state_of(folder) == before


@campaign
@given(seed=st.integers(0, 2**32), kind=st.sampled_from(["cut", "flip", "add", "empty", "foreign", "gone"]))
def test_checkpoints(place, seed, kind):
    """One file of the newest checkpoint is damaged: it is refused by name, and the one before is used or named."""
    draw = random.Random(seed)
    folder = place / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(place / "run", folder)
    newest = checkpoint.all_in(folder / "checkpoints")[-1]
    file = draw.choice(sorted(newest.iterdir()))
    content = bytearray(file.read_bytes())
    if kind == "cut":
        content = content[: draw.randrange(len(content))]
    elif kind == "flip":
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    elif kind == "add":
        content += draw.randbytes(9)
    elif kind == "empty":
        content = bytearray()
    elif kind == "foreign":
        content = bytearray(draw.randbytes(200))
    if kind == "gone":
        file.unlink()
    else:
        file.write_bytes(content)
    before = state_of(folder)
    code, output = said("export", folder, "--checkpoint", "last", "--out", place / "exported.safetensors")
    check(code, output)
    assert state_of(folder) == before
    assert code == 0
    assert "step 8" not in output.splitlines()[-1]


STATE, LANGUAGE = "checkpoints/step-00000008/state.json", "corpus.json"


@pytest.mark.slow
@fewer
@given(data=st.data())
def test_true_sums_and_absurd_content(place, data):
    """What a run says of its text and of its checkpoints, changed by somebody who has computed the sums again."""
    folder = place / "absurd"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(place / "run", folder)
    name = data.draw(st.sampled_from([STATE, LANGUAGE, "metrics.jsonl"]))
    file = folder / name
    if name == STATE:
        state = spoilt(json.loads(file.read_text())["state"], data.draw)
        state = state if isinstance(state, dict) else {"step": state}
        file.write_text(json.dumps({"state": state, "sha256": checkpoint._digest(state)}))
    elif name == LANGUAGE:
        file.write_text(json.dumps(spoilt(json.loads(file.read_text()), data.draw)))
    else:
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        index = data.draw(st.integers(0, len(lines) - 1))
        lines[index] = spoilt(lines[index], data.draw)
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    before = state_of(folder)
    verb = data.draw(st.sampled_from(["evaluate", "generate", "doctor", "export"] + ["report"] * 3))
    more = {"evaluate": ["--max-segments", "1"], "generate": ["--length", "2", "--prompt", "a"]}.get(verb, [])
    target = ["--out", place / "exported.safetensors"] if verb == "export" else []
    check(*said(verb, folder, *more, *target), screen=verb == "doctor")
    after = state_of(folder)
    assert {name: after.get(name) for name in before if not name.startswith("report/")} == {
        name: value for name, value in before.items() if not name.startswith("report/")
    }


BESIDE = [".lock", ".new", ".old", ".replaced", ".metrics.jsonl.new", ".experiment.json.new", "notes.txt"]
FILES = ["experiment.json", "corpus.json", "metrics.jsonl", "model.safetensors", "report", "checkpoints", "tensorboard"]
INSIDE = ["report/index.html", "report/loss.png", "report/.index.html.new", "checkpoints/notes.txt"]
PLACES = [*BESIDE, *FILES, *INSIDE, "checkpoints/step-00000008", "checkpoints/step-00000099"]


@fewer
@given(data=st.data())
def test_folders_of_strangers(place, data):
    """Links, pipes, foreign files and another text, wherever they stand: nothing outside the run is changed."""
    world = place / "world"
    shutil.rmtree(world, ignore_errors=True)
    world.mkdir()
    shutil.copytree(place / "run", world / "run")
    shutil.copytree(place / "text", world / "text")
    (world / "outside").mkdir()
    (world / "outside" / "diary.txt").write_text("mine")
    for _ in range(data.draw(st.integers(1, 2))):
        at = world / "run" / data.draw(st.sampled_from(PLACES))
        kind = data.draw(st.sampled_from(["link to a file", "link to a folder", "pipe", "file", "folder"]))
        if not at.parent.is_dir():
            continue
        if at.is_dir() and not at.is_symlink():
            shutil.rmtree(at)
        at.unlink(missing_ok=True)
        if kind == "pipe":
            os.mkfifo(at)
        elif kind == "file":
            at.write_text(data.draw(st.sampled_from(["mine", "{}", "[1]", '{"format": 3, "kind": "Experiment"}'])))
        elif kind == "folder":
            at.mkdir()
        else:
            at.symlink_to(world / "outside" / ("diary.txt" if kind == "link to a file" else ""))
    if data.draw(st.booleans()):
        split = data.draw(st.sampled_from(["train", "valid", "test"]))
        (world / "text" / f"{split}.txt").write_bytes(data.draw(st.binary(max_size=40)))
    outside = state_of(world / "outside")
    recipe = [f"{place / 'recipe.py'}:small", "--data", world / "text", "--out", world / "run", "--quiet"]
    verb = data.draw(st.sampled_from(["train", "evaluate", "generate", "report", "doctor", "export"]))
    words = {
        "train": [*recipe, data.draw(st.sampled_from(["--resume", "--overwrite"])), "--training.batch-size", "2000"],
        "evaluate": [world / "run", "--max-segments", "1"],
        "generate": [world / "run", "--length", "2", "--prompt", "a"],
    }.get(verb, [world / "run"])
    mine = {path for path in (world / "run").rglob("*") if path.is_file() and path.name in ("notes.txt",)}
    check(*said(verb, *words), screen=verb == "doctor")
    assert state_of(world / "outside") == outside
    assert all(path.is_file() for path in mine)


@pytest.mark.slow
def test_every_recipe_has_a_help_text():
    for recipe in RECIPES:
        code, output = said("train", recipe, "--help")
        assert code == 0
        assert "--training.optimisation.learning-rate" in output
