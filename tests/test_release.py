"""What surrounds the code: the version, the citation, the workflow, and what importing the library imports."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import equilibria
from equilibria.version import version

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))


def printed(program, *flags):
    """What a Python program prints in a process of its own, on the source tree."""
    command = [sys.executable, *flags, "-c", f"import sys; sys.path.insert(0, {str(ROOT / 'src')!r})\n{program}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_version_has_one_source():
    assert equilibria.__version__ == PROJECT["version"]
    assert CITATION["version"] == PROJECT["version"]
    assert f"## {PROJECT['version']} " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_a_wheel_has_the_version_of_its_metadata(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: f"{name} 9.9")
    assert version(tmp_path / "pyproject.toml") == "equilibria 9.9"


def test_a_project_around_a_wheel_is_not_the_source(tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "somebody"\nversion = "5.0"\n')
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "9.9")
    assert version(tmp_path / "pyproject.toml") == "9.9"


def test_a_bare_copy_says_that_it_does_not_know(tmp_path, monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert version(tmp_path / "pyproject.toml") == "0+unknown"


def test_importing_the_library_imports_torch_and_jaxtyping_and_nothing_else():
    """Torch brings numpy along where that is installed, so what torch imports does not count."""
    program = (
        "import torch, jaxtyping, torch.func, torch.utils.checkpoint\n"
        "before = set(sys.modules)\n"
        "import equilibria\n"
        "roots = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(roots - set(sys.stdlib_module_names)))"
    )
    assert printed(program) == "['equilibria', 'torch']"  # modules of torch that are loaded when they are needed


def test_the_library_works_where_numpy_is_not_installed():
    program = (
        "sys.modules['numpy'] = None\n"  # importing it is then an error
        "import torch, equilibria, equilibria.testing, pkgutil, importlib\n"
        "for part in ('core', 'solvers', 'gradients', 'layers', 'cells'):\n"
        "    package = importlib.import_module(f'equilibria.{part}')\n"
        "    for module in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):\n"
        "        importlib.import_module(module.name)\n"
        "layer = equilibria.Equilibrium(torch.nn.RNNCell(8, 8))\n"
        "out = layer(torch.randn(2, 8))\n"
        "out.z.sum().backward()\n"
        "print(bool(out.solution.converged.all()), 'transformers' in sys.modules)"
    )
    assert printed(program, "-W", "ignore:Failed to initialize NumPy") == "True False"


def test_the_citation_is_complete():
    assert CITATION["cff-version"] == "1.2.0"
    assert CITATION["type"] == "software"
    assert all(CITATION[part] for part in ("message", "title", "authors", "abstract"))
    (paper,) = CITATION["references"]
    assert paper["title"] == "Deep Equilibrium Models"
    assert [author["family-names"] for author in paper["authors"]] == ["Bai", "Kolter", "Koltun"]


def test_the_workflow_does_what_make_does():
    jobs = WORKFLOW["jobs"]
    assert set(jobs) == {"lint", "tests", "docs", "wheel", "check"}
    said = {name: "\n".join(step.get("run", "") for step in job["steps"]) for name, job in jobs.items()}
    targets = {name: set(re.findall(r"\bmake (\w+)", text)) for name, text in said.items()}
    assert targets == {"lint": {"lint"}, "tests": set(), "docs": {"docs"}, "wheel": set(), "check": {"check"}}
    written = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert set().union(*targets.values()) <= written
    assert 'pytest -n auto -m "not slow"' in said["tests"]
    assert 'equilibria" generate tiny' in said["wheel"]
    assert "schedule" in jobs["check"]["if"]
    assert "schedule" in WORKFLOW[True]  # YAML 1.1 reads the key "on" as a truth value


def test_the_workflow_tests_the_versions_that_are_supported():
    matrix = WORKFLOW["jobs"]["tests"]["strategy"]["matrix"]
    assert matrix["python"][0] == PROJECT["requires-python"].removeprefix(">=")
    pinned = re.search(r"^torch==(\S+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert pinned is not None
    assert pinned[1] in matrix["torch"]
    assert len(matrix["torch"]) == 2
    assert set(matrix["torch"]) <= set(equilibria.torch_private.TRIED)


@pytest.mark.parametrize("file", ["CONTRIBUTING.md"])
def test_links_of_pages_beside_the_readme_lead_somewhere(file):
    text = (ROOT / file).read_text(encoding="utf-8")
    assert [link for link in re.findall(r"\]\(([^)#:]+)\)", text) if not (ROOT / link).exists()] == []
    named = re.findall(r"`((?:src|docs|tests|lm|solvers|gradients|cells)/[\w./]+)`", text)
    assert named
    assert [name for name in named if not any((base / name).exists() for base in (ROOT, ROOT / "src/equilibria"))] == []
