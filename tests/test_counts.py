"""What is added to the library touches few files: in a copy of the package the additions then work."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import equilibria

ROOT = Path(equilibria.__file__).parent
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


MODEL = {
    "cells/elman.py": '''"""Elman's network as a cell."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from equilibria.layers.cell import Prepared
from equilibria.layers.sequence import SequenceCell


@dataclasses.dataclass(frozen=True)
class ElmanConfig:
    """The width."""

    width: int = 8

    @property
    def outputs(self) -> int:
        """Channels of the output."""
        return self.width

    def build(self) -> ElmanCell:
        """The cell."""
        return ElmanCell(self.width)


class ElmanCell(SequenceCell):
    """f(z)_t = tanh(A z_{t-1} + B x_t + b)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.state, self.input = nn.Linear(width, width, bias=False), nn.Linear(width, width)

    def prepare(self, x, memory=None, *, warm=False, part=None):
        """The input, and the last state of the segment before."""
        past = torch.zeros_like(x[:, :1]) if memory is None else memory.to(x)
        return Prepared(rows={"input": self.input(x), "past": past}, kept=x)

    def start(self, prepared):
        """Zero."""
        return torch.zeros_like(prepared.kept)

    def forward(self, z, prepared):
        """tanh(A z_{t-1} + B x_t + b)."""
        before = torch.cat([prepared.rows["past"], z[:, :-1]], dim=1)
        return torch.tanh(self.state(before) + prepared.rows["input"])

    def remember(self, z, prepared):
        """The last state."""
        return z[:, -1:].detach().clone()
''',
    "lm/corpora/counting.py": '''"""The numbers from 0."""

from __future__ import annotations

import dataclasses

from equilibria.lm.corpora.corpus import Corpus, Stream
from equilibria.lm.corpora.source import Source
from equilibria.lm.corpora.vocabulary import Vocabulary


@dataclasses.dataclass(frozen=True)
class Counting(Source):
    """The numbers from 0, one after the other."""

    numbers: int = 300

    def load(self) -> Corpus:
        """The corpus."""
        text = " ".join(map(str, range(self.numbers)))
        vocabulary = Vocabulary.of_text(text, "character")
        parts = map(Stream.of_text, vocabulary.encode(text).chunk(3))
        return Corpus("counting", *parts, vocabulary, unit="character")
''',
    "lm/recipes/counting.py": '''"""Counting with Elman's network."""

from __future__ import annotations

from equilibria.cells.elman import ElmanConfig
from equilibria.core.stop import Stop
from equilibria.fixed_point import Method
from equilibria.gradients.implicit import Implicit
from equilibria.lm.corpora.counting import Counting
from equilibria.lm.experiments import Batches, Experiment, Stage, Training
from equilibria.lm.model import LanguageConfig
from equilibria.solvers.picard import Picard


def counting() -> Experiment:
    """One stage."""
    method = Method(Picard(), Stop(rtol=1e-2), Implicit(stop=Stop(rtol=1e-2)))
    return Experiment(
        name="counting",
        corpus=Counting(),
        model=LanguageConfig(cell=ElmanConfig()),
        stages=(Stage("implicit", steps=2, method=method),),
        training=Training(batches=Batches(batch_size=2, segment_length=16)),
    )
''',
}
LINES = {
    "cells/__init__.py": """
from equilibria.cells.elman import ElmanConfig
CELLS = (*CELLS, ElmanConfig())
CellConfig = CellConfig | ElmanConfig
""",
    "lm/corpora/__init__.py": """
from equilibria.lm.corpora.counting import Counting
CATALOGUE = (*CATALOGUE, Counting)
""",
    "lm/recipes/__init__.py": """
from equilibria.lm.recipes.counting import counting
RECIPES["counting"] = counting
""",
}


@pytest.mark.slow
def test_a_cell_with_its_corpus_and_its_recipe_is_added_with_six_files(tmp_path):
    """Three files and a line in each of their folders: then it trains, its flags exist, and its run is read back."""
    package = tmp_path / "src" / "equilibria"
    shutil.copytree(ROOT, package, ignore=shutil.ignore_patterns("__pycache__"))
    for name, text in MODEL.items():
        (package / name).write_text(text, encoding="utf-8")
    for name, text in LINES.items():
        (package / name).write_text((package / name).read_text(encoding="utf-8") + text, encoding="utf-8")
    assert len(MODEL) + len(LINES) == 6

    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'src')!r}); "
        "from equilibria.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )

    def command(*words):
        done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    command("train", "counting", "--quiet", "--threads", "1", "--model.cell.width", "6", "--corpus.numbers", "200")
    assert "bits per character" in command("evaluate", "runs/counting")


def test_a_training_step_runs_through_few_files():
    """So many have to be opened to follow one step of ``tiny`` from its segment to the updated weights."""
    program = Path(__file__).parents[1] / "benchmarks" / "files_of_a_step.py"
    done = subprocess.run([sys.executable, str(program)], check=True, capture_output=True, text=True)
    assert int(done.stdout.splitlines()[-1].split()[0]) <= 30
