"""How the library half is built: imports go one way, and a name has one door."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import equilibria

ROOT = Path(equilibria.__file__).parent
ROOMS = (
    "torch_private",
    "errors",
    "checks",
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


LONGER = {
    "cells/transformer/cell.py": "the cell and its configuration, which builds the cell",
    "torch_private.py": "all private names of PyTorch are in one file",
}
"""The files of 300 lines or more, and why."""


def test_files_and_functions_are_short():
    for file in ROOT.rglob("*.py"):
        name, text = file.relative_to(ROOT).as_posix(), file.read_text(encoding="utf-8")
        assert text.count("\n") < (400 if name in LONGER else 300), name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
                assert node.end_lineno - first.lineno + 1 <= 40, f"{name}: {node.name}"


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


@pytest.mark.slow
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
