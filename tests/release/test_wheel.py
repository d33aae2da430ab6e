"""The wheel in an environment that begins empty: alone, then with [train], then with [hf]. `make check` runs it.

Each extra contains the one before, so one environment is enough, and it has at each stage what a user's would have.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import equilibria
from test_documentation import program

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BRIDGE = (ROOT / "src" / "equilibria" / "hf").is_dir()
pytestmark = pytest.mark.slow

USER = """\
import torch
from equilibria import Equilibrium, Solution, fixed_point, load
solution: Solution = fixed_point(lambda z: torch.cos(z), torch.zeros(3, 1))
layer = Equilibrium(torch.nn.RNNCell(4, 4))
reveal_type(solution), reveal_type(solution.converged), reveal_type(layer), reveal_type(load("tiny"))
"""
SEEN = ("equilibria.core.solve.Solution", "Tensor", "equilibria.layers.equilibrium.Equilibrium", "Trained")
"""The types of the last line."""


class Environment:
    """A virtual environment in ``folder``, with a working directory that is empty."""

    def __init__(self, folder: Path) -> None:
        self.python = folder / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
        self.place = folder / "place"
        self.place.mkdir()
        venv.create(folder / "venv", with_pip=True)

    def run(self, *command: str | Path) -> str:
        """What a command prints; its own path comes first, and nothing of this repository is on Python's."""
        hidden = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        given = {**hidden, "PATH": f"{self.python.parent}{os.pathsep}{hidden['PATH']}", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=self.place, env=given, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    def install(self, *what: str | Path) -> None:
        """Install with the versions that were tested."""
        self.run(self.python, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt", *what)

    def packages(self) -> set[str]:
        """The names of the packages that are installed."""
        return {line.partition("==")[0].lower() for line in self.run(self.python, "-m", "pip", "freeze").split()}

    def does(self, text: str) -> str:
        """What a Python program prints."""
        (self.place / "program.py").write_text(text, encoding="utf-8")
        return self.run(self.python, "program.py")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from the working tree."""
    folder = tmp_path_factory.mktemp("dist")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(pip, check=True)
    (file,) = folder.glob("*.whl")
    return file


def test_the_wheel_holds_what_a_user_needs(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert wheel.name == f"equilibria-{equilibria.__version__}-py3-none-any.whl"
    assert {"equilibria/py.typed", "equilibria_command.py", "equilibria/lm/pretrained/README.md"} <= set(names)
    stored = {name for name in names if name.startswith("equilibria/lm/pretrained/tiny/")}
    assert len(stored) == len(list((ROOT / "src" / "equilibria" / "lm" / "pretrained" / "tiny").rglob("*.*")))
    assert {name.rpartition("/")[2] for name in names if "/licenses/" in name} == {"LICENSE", "LICENSE-PYTHON"}
    assert not [name for name in names if "test" in name.split("/")[0] or "__pycache__" in name]
    assert wheel.stat().st_size < 2 * 2**20


def alone(user: Environment) -> None:
    """The library without extras: no numpy, and every block of the README that needs no run."""
    assert not user.packages() & {"numpy", "transformers", "tyro", "rich", "safetensors", "matplotlib"}
    loaded = "import sys, equilibria; print({'numpy', 'transformers'} & set(sys.modules), equilibria.__version__)"
    assert user.does(loaded) == f"set() {equilibria.__version__}\n"
    user.does(EVERY_MODULE)
    assert "8 of 8 samples converged" in user.does(program("README.md"))
    typed(user)


def typed(user: Environment) -> None:
    """mypy and pyright, of this environment, see the types of the wheel in a user's file."""
    file = user.place / "typed.py"
    file.write_text(USER, encoding="utf-8")
    mypy = [sys.executable, "-m", "mypy", "--strict", "--python-executable", user.python, file]
    pyright = [sys.executable, "-m", "pyright", "--pythonpath", user.python, file]
    for checker in (mypy, pyright):
        said = user.run(*checker)
        revealed = re.findall(r'(?:Revealed type is|Type of ".*" is) "([^"]+)"', said)
        assert [name.endswith(seen.rpartition(".")[2]) for name, seen in zip(revealed, SEEN, strict=True)] == [True] * 4


def with_models(user: Environment) -> None:
    """The extra [train]: `generate tiny` at once, and the commands of the README on a text of one's own."""
    assert {"numpy", "tyro", "safetensors"} <= user.packages()
    assert not user.packages() & {"transformers", "datasets", "tensorboard"}
    assert user.run("equilibria", "--version") == f"equilibria {equilibria.__version__}\n"
    assert user.run("equilibria", "generate", "tiny", "--length", "40").startswith("The ")
    user.run("equilibria", "evaluate", "tiny", "--split", "test", "--max-segments", "8")
    assert user.does("import sys, equilibria\nprint(sys.modules.get('equilibria.lm'))") == "None\n"
    text = "The fixed point of a map is where the map leaves it.\n" * 80
    (user.place / "my_text.txt").write_text(text, encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    (block,) = (text for text in blocks if "equilibria train text" in text)
    for line in block.splitlines():
        words = re.findall(r'"[^"]*"|\S+', line.partition("#")[0])
        quick = ["--steps", "4", "--threads", "1", "--measure-memory", "False"] if "train" in words else []
        user.run(*(word.strip('"') for word in words), *quick)
    assert (user.place / "runs" / "my_text" / "report" / "index.html").is_file()


def with_hugging_face(user: Environment) -> None:
    """The extra [hf]: the model in the wheel is exported, found without an import of the bridge, and generates."""
    assert {"transformers", "tokenizers"} <= user.packages()
    user.does("import equilibria.hf\nequilibria.hf.export('tiny', 'tiny-hf')")
    text = user.does(EXPORTED)
    assert text.startswith("The function ")
    assert len(text) > 30
    assert user.does("import sys, equilibria\nprint('transformers' in sys.modules)") == "False\n"


EXPORTED = """\
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("tiny-hf", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("tiny-hf", trust_remote_code=True)
text = model.generate(**tokenizer("The function ", return_tensors="pt"), max_new_tokens=20)
print(tokenizer.decode(text[0]))
"""
EVERY_MODULE = """\
import importlib, pkgutil
for room in ("core", "solvers", "gradients", "layers", "cells"):
    package = importlib.import_module(f"equilibria.{room}")
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)
"""

STAGES: tuple[tuple[str, Callable[[Environment], None]], ...] = (
    ("", alone),
    ("[train]", with_models),
    *((("[hf]", with_hugging_face),) if BRIDGE else ()),
)


def test_the_wheel_in_an_empty_environment(wheel, tmp_path):
    user = Environment(tmp_path)
    user.install("torch")  # first and pinned, so that nothing brings in another build
    for extra, check in STAGES:
        user.install(f"{wheel}{extra}")
        check(user)
