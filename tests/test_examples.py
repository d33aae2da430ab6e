"""The examples run to their end, their solver and their cell keep the laws, and the README shows the first of them."""

import importlib.util
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
WORDS = {
    "multiscale": ["--epochs", "1"],
    "graph": ["--steps", "100"],
    "forces": ["--steps", "10"],
    "correction": ["--steps", "100"],
}
"""What is said to an example beside its name, to have it done sooner."""
LONG = {"cell", "correction", "graph", "hyper_gradients", "generation", "matrix_square_root", "multiscale"}
"""Those that take 5 to 30 seconds all the same; `make check` runs them."""


def load(name):
    """The example as a module, as ``pytest examples/name.py`` imports it."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # the suites pickle what they test
    spec.loader.exec_module(module)
    return module


TestAitken = load("solver").TestAitken
TestSetCell = load("cell").TestSetCell


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if path.stem in LONG else []) for path in EXAMPLES],
)
def test_runs(path, tmp_path):
    """As a user runs it: a process of its own, without the checks of the tests, drawing in the current folder."""
    own = "ignore:`torch.jit.script`"  # PyTorch's, at the first tensor of forward mode
    command = [sys.executable, "-W", "error", "-W", own, str(path), *WORDS.get(path.stem, [])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    printed = run.stdout
    assert path.stem in ("matrix_square_root", "hyper_gradients") or "converged" in printed
    if path.stem == "generation":
        assert "\na map is where the map leaves it.\n" in printed
    if path.stem == "cell":
        assert float(printed.rsplit("right answers: ")[1].rstrip("%\n")) > 95
    if path.stem == "matrix_square_root":
        errors = [float(error) for error in re.findall(r"(?:by|:|=) ([\d.]+e[-+]\d+)$", printed, re.MULTILINE)]
        assert len(errors) == 4
        assert max(errors) < 1e-9
    if path.stem == "hyper_gradients":
        errors = [float(error) for error in re.findall(r"by (\S+e-\d+)$", printed, re.MULTILINE)]
        assert len(errors) == 3
        assert max(errors) < 1e-8
        assert [float(error) for error in re.findall(r"validation error (\S+),", printed)][-1] < 1.3
    if path.stem == "correction":
        without, corrected = (
            [float(share) for share in re.findall(r"([\d.]+)%", line)] for line in printed.splitlines()[-2:]
        )
        assert len(corrected) == len(without) == 7
        assert all(share > other + 5 for share, other in zip(corrected, without, strict=True))
    if path.stem == "forces":
        assert float(re.search(r"unrolled steps by (\S+)$", printed, re.MULTILINE)[1]) < 1e-7
    if path.stem == "multiscale":
        assert float(re.search(r"epoch 1: test accuracy ([\d.]+)%", printed)[1]) > 80
        assert "| 100.00% of all solves converged |" in printed
        assert (tmp_path / "multiscale.png").is_file()
    if path.stem == "graph":
        far, nodes, near = (
            float(re.search(rf"{name}: test accuracy ([\d.]+)%", printed)[1])
            for name in ("equilibrium", "nodes as batch axis", "three layers")
        )
        assert far == nodes == 100
        assert near < 70  # 65 is what three layers can see
        assert (tmp_path / "graph.png").is_file()


@pytest.mark.parametrize(("name", "steps"), [("cell", 2), ("correction", 2), ("graph", 1), ("hyper_gradients", 0)])
def test_long_examples_take_a_few_steps(name, steps, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert name in LONG
    load(name).main(steps=steps)
    printed = capsys.readouterr().out
    if name == "hyper_gradients":
        errors = [float(error) for error in re.findall(r"by (\S+e-\d+)$", printed, re.MULTILINE)]
        assert len(errors) == 3
        assert max(errors) < 1e-8
    else:
        assert "converged" in printed


def test_the_generation_example_takes_a_few_steps(capsys):
    text = (ROOT / "examples" / "generation.py").read_text()
    assert text.count("range(100)") == 1
    exec(text.replace("range(100)", "range(3)"), {})
    _, first, second = capsys.readouterr().out.split("\n", maxsplit=2)
    assert first.startswith("the fixed")
    assert second.startswith("a map is wh")


def test_the_multiscale_example_takes_a_few_steps(tmp_path, monkeypatch, capsys):
    multiscale = load("multiscale")
    few = [part[:64] for part in multiscale.digits()]
    monkeypatch.setattr(multiscale, "digits", lambda: few)
    multiscale.main(epochs=1, picture=tmp_path / "multiscale.png")
    assert "| 100.00% of all solves converged |" in capsys.readouterr().out
    assert (tmp_path / "multiscale.png").is_file()


def test_nodes_as_batch_axis_warn_without_the_flag():
    graph = load("graph")
    x, adjacency, label, _ = graph.chains(8)
    layer = graph.Equilibrium(graph.Listen(), stop=graph.STOP, gradient=graph.Implicit(stop=graph.STOP))
    with warnings.catch_warnings(record=True, action="always") as heard:
        out = graph.applied(layer, x, adjacency, by_node=True)
        (out.z[:, 0] * label.flatten()).sum().backward()
    advice = {str(warning.message).split(":")[0] for warning in heard if "coupled=True" in str(warning.message)}
    assert advice == {"The forward solve", "The adjoint solve of Implicit()"}


def test_the_readme_shows_the_first_example():
    lines = (ROOT / "examples" / "layer.py").read_text().splitlines()
    shown = "\n".join(lines[lines.index("import torch") :])
    assert shown in (ROOT / "README.md").read_text()
