"""How the library half is built: imports go one way, a name has one door, and additions touch few files."""

from __future__ import annotations

import ast
import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import equilibria

ROOT = Path(equilibria.__file__).parent
ROOMS = (
    "torch_private",
    "errors",
    "core",
    "solvers",
    "gradients",
    "fixed_point",
    "stability",
    "layers",
    "cells",
    "testing",
)
"""The library half, from the lowest room to the highest."""


def modules():
    """Every module of the library half with its syntax tree."""
    found = {}
    for file in sorted(ROOT.rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        if parts[0] in ROOMS:
            name = ".".join(part for part in ("equilibria", *parts) if part != "__init__")
            found[name] = ast.parse(file.read_text(encoding="utf-8"))
    return found


def imports(tree):
    """(module, name) of every import of the library, wherever it stands; name is None for a plain import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("equilibria"):
            assert node.level == 0
            yield from ((node.module, alias.name) for alias in node.names)
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names if alias.name.startswith("equilibria"))


def defined(tree):
    """The names that a module makes itself."""
    names = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def room(module):
    return module.split(".")[1]


def test_every_room_is_known():
    assert {room(name) for name in modules()} == set(ROOMS)


def test_no_arrow_goes_upwards():
    for name, tree in modules().items():
        for source, _ in imports(tree):
            assert source != "equilibria", f"{name} imports from the root"
            assert room(source) in ROOMS, f"{name} imports {source} of the application"
            assert ROOMS.index(room(source)) <= ROOMS.index(room(name)), f"{name} imports {source}"


def test_there_is_no_circle():
    trees = modules()
    arrows = {name: {source for source, _ in imports(tree)} for name, tree in trees.items()}
    done: set[str] = set()
    while len(done) < len(arrows):
        free = {name for name, sources in arrows.items() if name not in done and sources <= done}
        assert free, f"a circle among {sorted(arrows.keys() - done)}"
        done |= free


def test_a_name_has_one_door():
    """Inside the project a name is imported from the module that defines it; only ``__init__`` files hand names on."""
    trees = modules()
    homes = {name: defined(tree) for name, tree in trees.items()}
    everything = {}
    for file in ROOT.rglob("*.py"):
        if file.name != "__init__.py":
            everything[file] = ast.parse(file.read_text(encoding="utf-8"))
    for file, tree in everything.items():
        for source, name in imports(tree):
            if source in homes and name != "CATALOGUE":
                assert name in homes[source], (
                    f"{file.relative_to(ROOT)} imports {name} from {source}, which is not its home"
                )
    public = [
        name for module, names in homes.items() if not module.endswith("__") for name in names if name[0].isupper()
    ]
    classes = [name for name in public if not name.isupper()]
    assert len(classes) == len(set(classes)), sorted({name for name in classes if classes.count(name) > 1})


def test_every_module_can_be_imported_first():
    """So that no order of imports is relied upon."""
    program = (
        "import os, sys, importlib, torch\n"
        "for name in sys.argv[1:]:\n"
        "    child = os.fork()\n"  # with torch, and nothing of the library
        "    if not child:\n"
        "        importlib.import_module(name)\n"
        "        os._exit(0)\n"
        "    assert os.waitpid(child, 0)[1] == 0, name\n"
    )
    names = ("equilibria.core.gradient", "equilibria.gradients.implicit", "equilibria.layers.explicit")
    subprocess.run([sys.executable, "-c", program, *names], check=True)
    for name in modules():
        importlib.import_module(name)


SOLVER = '''"""Half a step of plain iteration."""

import dataclasses

from equilibria.core.solver import Solver


@dataclasses.dataclass(frozen=True)
class Halfway(Solver):
    """z <- (z + f(z)) / 2."""

    def init(self, z):
        """No history."""

    def step(self, f, at, history):
        """The mean of z and f(z)."""
        return at.z.lerp(at.fz, 0.5), None
'''
SOLVER_TEST = """from equilibria.solvers import Halfway
from equilibria.testing import SolverSuite


class TestHalfway(SolverSuite):
    needs_contraction = True

    def make(self):
        return Halfway()
"""
CELL = '''"""A cell with one matrix."""

import dataclasses

import torch
from torch import nn

from equilibria.layers.cell import Cell, Prepared


@dataclasses.dataclass(frozen=True)
class OneMatrixConfig:
    """Its width."""

    width: int = 4

    @property
    def outputs(self):
        """Channels of the state."""
        return self.width

    def build(self):
        """The cell."""
        return OneMatrixCell(self)


class OneMatrixCell(Cell):
    """z <- tanh(A z + x)."""

    def __init__(self, config):
        super().__init__()
        self.config, self.a = config, nn.Linear(config.width, config.width)

    def prepare(self, x):
        """x itself, sample by sample."""
        return Prepared(rows=x)

    def start(self, prepared):
        """Zero."""
        return torch.zeros_like(prepared.rows)

    def forward(self, z, prepared):
        """tanh(A z + x)."""
        return torch.tanh(self.a(z) + prepared.rows)
'''
CELL_TEST = """import torch

from equilibria.cells import OneMatrixConfig
from equilibria.testing import CellSuite


class TestOneMatrix(CellSuite):
    def make(self):
        return OneMatrixConfig().build().double()

    def inputs(self, batch):
        return (torch.randn(batch, 3, 4, dtype=torch.float64),)
"""


@pytest.mark.slow
def test_a_solver_and_a_cell_are_added_with_four_files_each(tmp_path):
    """A file, its line in the folder, a test and a line of the docs: in a copy of the package the suites then pass."""
    package = tmp_path / "src" / "equilibria"
    shutil.copytree(ROOT, package, ignore=shutil.ignore_patterns("__pycache__"))
    touched = {"solver": set(), "cell": set()}

    def write(kind, path, text):
        touched[kind].add(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    def add_line(kind, path, line, *changes):
        text = path.read_text(encoding="utf-8") + line
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        write(kind, path, text)

    docs = tmp_path / "docs" / "reference" / "api"
    write("solver", package / "solvers" / "halfway.py", SOLVER)
    line = "\nfrom equilibria.solvers.halfway import Halfway\n"
    add_line("solver", package / "solvers" / "__init__.py", line + "CATALOGUE = (*CATALOGUE, Halfway)\n")
    write("solver", tmp_path / "tests" / "test_halfway.py", SOLVER_TEST)
    write("solver", docs / "solvers.md", "::: equilibria.solvers.Halfway\n")
    write("cell", package / "cells" / "one_matrix.py", CELL)
    line = "\nfrom equilibria.cells.one_matrix import OneMatrixCell, OneMatrixConfig\n"
    add_line("cell", package / "cells" / "__init__.py", line + "CELLS = (*CELLS, OneMatrixConfig())\n")
    write("cell", tmp_path / "tests" / "test_one_matrix.py", CELL_TEST)
    write("cell", docs / "cells.md", "::: equilibria.cells.one_matrix\n")
    assert {kind: len(files) for kind, files in touched.items()} == {"solver": 4, "cell": 4}

    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'src')!r}); import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    )
    arguments = ["-q", "-p", "no:cacheprovider", f"--rootdir={tmp_path}", str(tmp_path / "tests")]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:]
    from_copy = "import equilibria.solvers as s; print([k.__name__ for k in s.CATALOGUE][-1])"
    shown = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path / 'src')!r}); {from_copy}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.strip() == "Halfway"
