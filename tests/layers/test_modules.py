"""Any module, any inputs and any state in a layer, as users from other fields have them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from equilibria import (
    Anderson,
    Cell,
    Equilibrium,
    Implicit,
    Layout,
    Method,
    Picard,
    Prepared,
    Stack,
    Stop,
    Unroll,
    Unrolled,
)
from equilibria.testing import CellSuite
from equilibria.testing.problems import TreeProblem, flat

TIGHT = Stop(rtol=1e-11, atol=1e-12, max_evals=200)


class Block(nn.Module):
    """z, x ↦ tanh(W z + x)."""

    def __init__(self, width=5):
        super().__init__()
        self.linear = nn.Linear(width, width)
        with torch.no_grad():
            self.linear.weight.mul_(0.5)

    def forward(self, z, x):
        return torch.tanh(self.linear(z) + x)


class Scales(nn.Module):
    """The three scales of ``TreeProblem`` as a module."""

    def __init__(self, problem):
        super().__init__()
        self.weights = nn.ParameterDict({name: nn.Parameter(w.clone()) for name, w in problem.weights.items()})

    def forward(self, z, x):
        return TreeProblem.mapped(dict(self.weights.items()), x)(z)


def test_a_plain_module_is_a_layer():
    block, x = Block().double(), torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    layer = Equilibrium(block, stop=TIGHT, gradient=Implicit(stop=TIGHT))
    out = layer(x)
    assert out.solution.converged.all()
    assert out.output is out.z
    assert out.memory is None
    torch.testing.assert_close(block(out.z, x), out.z)
    found = torch.autograd.grad(out.z.square().sum(), [x, *block.parameters()])
    unrolled = Unrolled(block, 300)(x)
    assert unrolled.solution is None
    expected = torch.autograd.grad(unrolled.z.square().sum(), [x, *block.parameters()])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)
    assert {name.partition(".")[0] for name in layer.state_dict()} == {"cell"}


def test_a_tree_state_of_a_module_starts_where_it_is_told_to():
    problem = TreeProblem.make(batch=2)
    layer = Equilibrium(Scales(problem), stop=TIGHT)
    out = layer(problem.x, start=problem.start())
    torch.testing.assert_close(flat(out.z), flat(problem.exact), rtol=1e-8, atol=1e-9)
    with pytest.raises(TypeError, match=r"the first input is a dict: call the layer with start="):
        layer(problem.x)
    deep = Unrolled(Scales(problem), 60, checkpoint=True)(problem.x, start=problem.start())
    torch.testing.assert_close(flat(Layout.of(out.z).aligned(deep.z)), flat(problem.exact), rtol=1e-8, atol=1e-9)
    torch.stack([leaf.sum() for leaf in deep.z.values()]).sum().backward()


@pytest.mark.usefixtures("unhooked")
@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Equilibrium(Block())(), "there is no input: call the layer with start="),
        (lambda: Equilibrium(Block())(torch.ones(2, 5).long()), "the first input is a tensor of torch.int64"),
        (
            lambda: Equilibrium(Block)(torch.ones(2, 5)),
            r"cell is the class Block; it must be an nn.Module f\(z, \*inputs",
        ),
        (lambda: Equilibrium(torch.tanh), "For a function without parameters of its own use fixed_point"),
        (lambda: Equilibrium(Block())(torch.ones(2, 5), warm=True), "ModuleCell has no option warm; leave it out"),
        (lambda: Unrolled(Block(), 3)(torch.ones(2, 5), method=Method()), "Unrolled solves nothing"),
        (lambda: Stack([Block()])(torch.ones(2, 5), method=Method()), "Stack solves nothing"),
        (lambda: Equilibrium(Block()).cache(3), "ModuleCell keeps no past"),
        (lambda: Equilibrium(Block(), stop=1e-3), r"stop is 0.001; it must be a Stop"),
    ],
)
def test_wrong_use_gets_one_sentence(call, words):
    with pytest.raises(TypeError, match=words) as raised:
        call()
    assert "\n" not in str(raised.value)


def test_a_method_given_with_a_call_beats_every_setting_and_changes_none():
    layer = Equilibrium(Block(), Anderson(), Stop(max_evals=9), eval_stop=Stop(max_evals=5)).eval()
    before = dict(vars(layer))
    out = layer(torch.ones(2, 5), method=Method(Picard(), Stop(rtol=0, atol=0, max_evals=3), Unroll()))
    assert out.solution.evals == 3
    assert layer.evaluation_method.stop.max_evals == 5
    assert {name: vars(layer)[name] for name in ("method", "eval_stop")} == {
        name: before[name] for name in ("method", "eval_stop")
    }


def test_a_stack_of_plain_modules():
    blocks, x = [Block() for _ in range(3)], torch.randn(2, 5)
    z = torch.zeros(2, 5)
    for block in blocks:
        z = block(z, x)
    torch.testing.assert_close(Stack(blocks)(x).z, z)


class Graph(Cell):
    """A user's cell with several inputs, a state of two tensors, and an output that is not a tensor."""

    def __init__(self):
        super().__init__()
        self.node, self.edge = nn.Linear(4, 4), nn.Linear(3, 4)

    def prepare(self, nodes, edges):
        return Prepared(rows={"nodes": nodes, "edges": self.edge(edges)})

    def start(self, prepared):
        return {"n": torch.zeros_like(prepared.rows["nodes"]), "e": torch.zeros_like(prepared.rows["edges"])}

    def forward(self, z, prepared):
        rows = prepared.rows
        return {
            "e": torch.tanh(0.3 * z["n"].mean(dim=1, keepdim=True) + 0.2 * z["e"] + rows["edges"]),
            "n": torch.tanh(0.3 * self.node(z["n"]) + 0.3 * z["e"].mean(dim=1, keepdim=True) + rows["nodes"]),
        }

    def output(self, z):
        return {"readout": z["n"].sum(dim=1)}


class TestGraph(CellSuite):
    def make(self):
        return Graph().double()

    def inputs(self, batch):
        return torch.randn(batch, 5, 4, dtype=torch.float64), torch.randn(batch, 7, 3, dtype=torch.float64)


@pytest.mark.usefixtures("unhooked")
@pytest.mark.parametrize("wrong", [torch.eye(5), torch.zeros(())], ids=["matrix", "number"])
def test_what_all_samples_share_may_not_be_divided_by_samples(wrong):
    class Wrong(Graph):
        def prepare(self, nodes, edges):
            prepared = super().prepare(nodes, edges)
            return Prepared(rows={**prepared.rows, "shared": wrong})

    with pytest.raises(ValueError, match=r"a batch of 2 samples; .*put what all samples share into Prepared\(shared"):
        Equilibrium(Wrong())(torch.randn(2, 5, 4), torch.randn(2, 7, 3))


def test_samples_of_a_tree_leave_the_batch():
    cell, seen = Graph(), []
    forward = cell.forward

    def counted(z, prepared):
        seen.append(len(z["n"]))
        return forward(z, prepared)

    cell.forward = counted
    nodes, edges = torch.randn(8, 5, 4), torch.randn(8, 7, 3)
    nodes[4:], edges[4:] = 0, 0
    with torch.no_grad():
        cell.edge.bias.zero_()
        cell.node.bias.zero_()
        out = Equilibrium(cell, Picard(), Stop(rtol=1e-6, max_evals=60))(nodes, edges)
    assert out.solution.converged.all()
    assert min(seen) < 8
    assert out.output["readout"].shape == (8, 4)


class TestBlock(CellSuite):
    """The suite runs on a plain module, converted as ``Equilibrium`` converts it."""

    def make(self):
        return Equilibrium(Block()).cell.double()

    def inputs(self, batch):
        return (torch.randn(batch, 5, dtype=torch.float64),)
