"""Private names of PyTorch stand in one file, where a new release of PyTorch can be checked against them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import equilibria
from equilibria import torch_private

ROOT = Path(equilibria.__file__).parent
OF_OTHERS = {"_getframe", "_is_hf_initialized"}
"""sys._getframe, which CPython documents, and the mark with which transformers tells its modules that it loads."""


def private(name):
    return name.startswith("_") and not name.endswith("__")


def own_names(trees):
    """The private names that the library defines itself: functions, classes, fields and attributes."""
    names = set()
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names.add(node.attr)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names.add(node.target.id)
    return names


def foreign(tree, own):
    """(line, name) of every private name of another library in a module: as an attribute, in an import, in a string."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and private(node.attr) and node.attr not in own:
            yield node.lineno, node.attr
        elif isinstance(node, ast.Import | ast.ImportFrom):
            imported = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            yield from ((node.lineno, name) for name in imported if any(map(private, name.split("."))))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
            named = node.args[1] if len(node.args) > 1 else None
            if isinstance(named, ast.Constant) and private(str(named.value)) and named.value not in own:
                yield node.lineno, named.value


def of_the_library():
    trees = {file: ast.parse(file.read_text(encoding="utf-8")) for file in sorted(ROOT.rglob("*.py"))}
    others = {file: tree for file, tree in trees.items() if file.name != "torch_private.py"}
    own = own_names(others.values()) | OF_OTHERS
    return {file: list(foreign(tree, own)) for file, tree in trees.items()}


def test_private_names_of_torch_stand_in_one_file():
    found = of_the_library()
    here = found.pop(ROOT / "torch_private.py")
    assert len(here) > 10, "the search finds nothing, not even where they are"
    assert not {str(file.relative_to(ROOT)): names for file, names in found.items() if names}


def test_every_function_says_what_to_do_if_its_name_goes():
    tree = ast.parse((ROOT / "torch_private.py").read_text(encoding="utf-8"))
    made = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef) and not private(node.name)]
    assert len(made) >= 12
    assert [node.name for node in made if "If it goes: " not in (ast.get_docstring(node) or "")] == []


def test_the_versions_tried_include_the_pinned_one():
    constraints = ROOT.parent.parent / "constraints.txt"
    pinned = re.search(r"^torch==(\S+)", constraints.read_text(encoding="utf-8"), re.M)
    assert pinned is not None
    assert pinned[1] in torch_private.TRIED


def test_the_search_finds_each_kind_of_private_name():
    program = (
        "import torch._dynamo\nfrom torch.utils import _pytree\nx._version\nself._mine\ngetattr(m, '_compiled_call')"
    )
    assert {name for _, name in foreign(ast.parse(program), {"_mine"})} == {
        "torch._dynamo",
        "_pytree",
        "_version",
        "_compiled_call",
    }
