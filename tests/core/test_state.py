"""States: trees and their flat form."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor

from equilibria import Layout, Picard, Stop, solve, take_rows
from equilibria.core.trees import map_tensors, tensors_in


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Box:
    content: object
    number: int = 3


def tree():
    return {
        "a": torch.randn(3, 2, 4),
        "b": [torch.randn(3, 5).double(), (torch.randn(3).bfloat16(), Pair(torch.randn(3, 1), torch.randn(3, 2)))],
        "c": OrderedDict(d=torch.randn(3, 2, 2, 2).contiguous(memory_format=torch.channels_last)),
    }


def test_unpacking_is_the_inverse_of_packing():
    z, layout = tree(), Layout.of(tree())
    flat = layout.pack(z)
    assert flat.shape == (3, 8 + 5 + 1 + 1 + 2 + 8)
    assert flat.dtype == torch.float64
    back = layout.unpack(flat)
    for a, b in zip(tensors_in(z), tensors_in(back), strict=True):
        assert torch.equal(a, b)
        assert a.dtype == b.dtype
    assert type(back["b"][1][1]) is Pair
    assert type(back["c"]) is OrderedDict
    assert not layout.exact


def test_one_leaf_is_a_view_and_keeps_its_order_in_memory():
    for z in (torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)):
        layout = Layout.of(z)
        flat = layout.pack(z)
        assert flat.data_ptr() == z.data_ptr()
        assert flat.is_contiguous()
        back = layout.unpack(flat)
        assert back.data_ptr() == z.data_ptr()
        assert back.stride() == z.stride()


@pytest.mark.parametrize(
    "z",
    [
        torch.randn(4, 3, 2).transpose(0, 1),
        torch.randn(1, 5).expand(3, 5),
        torch.randn(3, 8)[:, ::2],
        torch.randn(3, 4, 1, 6).transpose(1, 3),
    ],
)
def test_any_strides_survive_the_round_trip(z):
    layout = Layout.of(z)
    assert torch.equal(layout.unpack(layout.pack(z)), z)


def test_rows_of_a_tree_keep_the_order_in_memory():
    index = torch.tensor([2, 0])
    z = tree()
    for whole, rows in zip(tensors_in(z), tensors_in(take_rows(z, index)), strict=True):
        assert torch.equal(rows, whole[index])
    last = torch.randn(4, 3, 2, 2).contiguous(memory_format=torch.channels_last)
    assert take_rows(last, torch.tensor([1, 3])).is_contiguous(memory_format=torch.channels_last)
    heads = torch.randn(2, 5, 7).transpose(0, 1)  # batch second in memory
    assert take_rows(heads, index).transpose(0, 1).is_contiguous()
    assert torch.equal(take_rows(heads, index), heads[index])
    box = take_rows(Box({"x": torch.arange(3)}), index)
    assert box.content["x"].tolist() == [2, 0]
    assert box.number == 3
    with pytest.raises(TypeError, match="holds a set"):
        take_rows(Box({1}), index)


def test_map_tensors_reaches_into_everything():
    z = Box((tree(), None, "text", 2.0))
    assert len(tensors_in(z)) == 6
    doubled = map_tensors(lambda t: 2 * t, z)
    assert torch.equal(doubled.content[0]["a"], 2 * z.content[0]["a"])
    assert doubled.content[1:] == (None, "text", 2.0)


def test_values_are_put_in_the_order_of_the_state():
    layout = Layout.of({"a": torch.zeros(2, 1), "b": (torch.zeros(2, 2), torch.zeros(2, 3))})
    value = {"b": (torch.ones(2, 2), torch.ones(2, 3)), "a": torch.full((2, 1), 5.0)}
    assert layout.pack(layout.aligned(value))[0].tolist() == [5, 1, 1, 1, 1, 1]
    assert list(layout.aligned(value)) == ["a", "b"]


REFUSED = {
    "meta": (torch.zeros(2, 3, device="meta"), ValueError, r"meta device, .*model.to_empty\(device=…\)"),
    "sparse": (torch.zeros(2, 3).to_sparse(), TypeError, "z0 is torch.sparse_coo: give .to_dense"),
    "nested": (
        torch.nested.nested_tensor([torch.zeros(2, 3), torch.zeros(4, 3)], layout=torch.jagged),
        TypeError,
        "nested tensor: pad its samples",
    ),
    "eight bits": (torch.zeros(2, 3).to(torch.float8_e4m3fn), TypeError, "float8_e4m3fn; a state is real and floating"),
    "complex": (torch.zeros(2, 3, dtype=torch.complex64), TypeError, "complex64; a state is real: .*view_as_real"),
    "integers in a leaf": ({"a": torch.zeros(2, 3), "n": torch.zeros(2, 1).long()}, TypeError, r"z0\['n'\] has dtype"),
    "None in a leaf": ([torch.zeros(2, 3), None], TypeError, r"z0\[1\] is NoneType"),
    "a number": (torch.zeros(()), ValueError, "z0 is a single number"),
    "nothing": ({}, ValueError, "holds no tensor"),
    "batches": ({"a": torch.zeros(2, 3), "b": torch.zeros(3, 3)}, ValueError, "hold 2, 3 samples"),
    "only numbers": ({"a": torch.zeros(3), "b": torch.zeros(3)}, ValueError, r"shape \(3,\) and \(3,\)"),
    "an empty leaf": ({"a": torch.zeros(2, 3), "b": torch.zeros(2, 0)}, ValueError, r"z0\['b'\] has shape \(2, 0\)"),
    "NaN in a leaf": (
        {"a": torch.zeros(2, 3), "b": torch.tensor([[0.0], [torch.nan]])},
        ValueError,
        r"NaN or infinite in 1 of 2 samples \(\[1\]\)",
    ),
    "a dataclass": (Box(torch.zeros(2, 3)), TypeError, "z0 is Box"),
}


@pytest.mark.usefixtures("unhooked")
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_state_gets_one_sentence(case):
    z0, error, words = REFUSED[case]
    with pytest.raises(error, match=words) as raised:
        solve(lambda z: z, z0, Picard(), Stop())
    assert "\n" not in str(raised.value)


@pytest.mark.usefixtures("unhooked")
def test_a_state_on_several_processes_gets_one_sentence():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        z0 = distribute_tensor(torch.zeros(2, 3), init_device_mesh("cpu", (1,)))
        with pytest.raises(TypeError, match=r"z0 is a DTensor.* give z0\.full_tensor\(\), or .*z0\.to_local\(\)"):
            solve(lambda z: z, z0, Picard(), Stop())
    finally:
        dist.destroy_process_group()


@pytest.mark.usefixtures("unhooked")
@pytest.mark.parametrize(
    ("f", "words"),
    [
        (lambda z: z["a"], r"f returned \(B, 3\), and the state is \{'a': \(B, 3\), 'b': \(B, 2\)\}"),
        (lambda z: {"a": z["a"]}, "with the same keys"),
        (lambda z: {**z, "c": z["a"]}, "with the same keys"),
        (lambda z: (z["a"], z["b"]), r"f returned \(\(B, 3\), \(B, 2\)\)"),
        (lambda z: {"a": z["a"], "b": None}, "'b': NoneType"),
    ],
)
def test_a_value_of_another_structure_gets_one_sentence(f, words):
    z0 = {"a": torch.zeros(2, 3), "b": torch.zeros(2, 2)}
    with pytest.raises(TypeError, match=words) as raised:
        solve(f, z0, Picard(), Stop())
    assert "\n" not in str(raised.value)


def test_a_leaf_that_f_changes_in_place_is_noticed():
    def f(z):
        z["b"].mul_(0.5)
        return {"a": 0.5 * z["a"], "b": z["b"].clone()}

    z0 = {"a": torch.ones(2, 3), "b": torch.ones(2, 2)}
    with torch.no_grad(), pytest.raises(ValueError, match="changed its argument z in place"):
        solve(f, z0, Picard(), Stop())


@pytest.mark.usefixtures("unhooked")
@pytest.mark.parametrize(
    ("f", "advice"),
    [
        (lambda z: z.double(), r"make z0 torch\.float64, or end f with \.to\(z\.dtype\)"),
        (lambda z: (z > 0).long(), r"let f compute with floating numbers, or end it with \.to\(z\.dtype\)"),
        (lambda z: z > 0, r"let f compute with floating numbers, or end it with \.to\(z\.dtype\)"),
        (lambda z: z * 1j, r"end f with torch\.view_as_real, and begin it with torch\.view_as_complex"),
    ],
    ids=["wider", "whole", "bool", "complex"],
)
def test_the_advice_about_a_changed_dtype_is_one_that_a_state_may_have(f, advice):
    with pytest.raises(TypeError, match=advice):
        solve(f, torch.zeros(2, 3), Picard(), Stop())
