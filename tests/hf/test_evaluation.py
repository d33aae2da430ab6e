"""lm_eval gives the score of ``evaluate``; a process that knows only transformers loads a folder.

The protocol, and why it is the same text scored in the same way: docs/howto/huggingface_evaluation.md.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("transformers")

import equilibria
from equilibria import Stop
from equilibria.hf import export
from equilibria.lm.corpora import Stream
from equilibria.lm.evaluation import evaluate
from equilibria.lm.experiments.serialise import part_to_json
from equilibria.lm.runs.trained import load

WINDOW = 64
TIGHT = Stop(rtol=1e-5, max_evals=200)
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    validation: {file}
output_type: loglikelihood_rolling
validation_split: validation
doc_to_text: ""
doc_to_target: text
metric_list:
  - metric: bits_per_byte
"""
HARNESS = """
import json, sys
import lm_eval
from lm_eval.tasks import TaskManager

model, folder, calls = json.loads(sys.argv[1])
manager = TaskManager(include_path=folder)
for task, size, more in calls:
    found = lm_eval.simple_evaluate(
        model="hf", model_args={"pretrained": model, "trust_remote_code": True, **more}, tasks=[task],
        task_manager=manager, batch_size=size, device="cpu", bootstrap_iters=0,
    )
    print("SCORE", found["results"][task]["bits_per_byte,none"])
"""
REMOTE = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, text = sys.argv[1:]
assert "equilibria" not in sys.modules
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
ids = tokenizer(text, return_tensors="pt")
told = tokenizer.decode(model.generate(**ids, max_new_tokens=12, do_sample=False)[0])
spelt = tokenizer.decode(ids["input_ids"][0])
print(json.dumps([type(model).__name__, type(tokenizer).__name__, tokenizer.pad_token_id, spelt, told]))
"""


def program(code: str, *words: str, home) -> str:
    """What a program says that knows no network and keeps its caches in ``home``."""
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE"), "1")
    own = {"OMP_NUM_THREADS": "1", "HF_HOME": str(home), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "ignore", "-c", code, *words]
    environment = {**os.environ, **offline, **own}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=580)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def bits_per_byte(run, texts, *, stop, length):
    """``evaluate`` with the beginning of a line before each text, and segments without memory."""
    method = dataclasses.replace(run.stage.evaluation_method, stop=stop)
    bits = size = 0
    for text in texts:
        stream = Stream.of_text(run.vocabulary.encode("\n" + text))
        found = evaluate(run.model, stream, segment_length=length, method=method, vocabulary=run.vocabulary)
        assert found.tokens == len(text)
        bits, size = bits + found.bits * found.tokens, size + found.bytes
    return bits / size


def documents() -> tuple[str, list[str]]:
    """A text of whole windows, and texts of different lengths inside one window."""
    valid = equilibria.load("tiny").stream("valid").ids
    text = equilibria.load("tiny").vocabulary.decode(valid[: 9 * WINDOW + 200])
    text = text.replace("\n\n", "\n").strip("\n")
    return text[: 9 * WINDOW], [text[i * WINDOW :][:length] for i, length in enumerate((64, 40, 63, 17, 52, 64))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "tiny"
    export("tiny", out)
    return out


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed")
def test_the_harness_gives_the_score_of_evaluate(folder, tmp_path):
    long, short = documents()
    for name, texts in (("long", [long]), ("short", short)):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (tmp_path / f"{name}.json").write_text(lines, encoding="utf-8")
        (tmp_path / f"{name}.yaml").write_text(TASK.format(name=name, file=tmp_path / f"{name}.json"))
    tight = {"max_length": WINDOW, "eval_stop": part_to_json(TIGHT)}
    calls = [
        *(("long", size, {"max_length": WINDOW}) for size in (1, 4)),  # with the run's own stop
        *(("long", size, tight) for size in (1, 4)),
        *(("short", size, tight) for size in (1, 4)),
    ]
    said = program(HARNESS, json.dumps([str(folder), str(tmp_path), calls]), home=tmp_path / "home")
    scores = [float(line.split()[1]) for line in said.splitlines() if line.startswith("SCORE")]
    run = load("tiny", memory_length=0)
    own = run.stage.evaluation_method.stop
    wanted = [
        bits_per_byte(run, [long], stop=own, length=WINDOW),
        bits_per_byte(run, [long], stop=TIGHT, length=WINDOW),
        bits_per_byte(run, short, stop=TIGHT, length=WINDOW),
    ]
    assert 1.5 < wanted[0] < 3.5
    assert scores == pytest.approx([score for score in wanted for _ in range(2)], abs=1e-5, rel=0)


@pytest.mark.slow
def test_a_process_that_knows_only_transformers(folder, tmp_path):
    text = "The function returns\n  a "
    said = program(REMOTE, str(folder), text, home=tmp_path)
    *found, told = json.loads(said.strip().splitlines()[-1])
    assert found == ["EquilibriumForCausalLM", "EquilibriumTokenizer", 103, text]
    assert told.startswith(text)
    assert len(told) == len(text) + 12
