"""The softmax of attention: PyTorch's own, except that what is smaller than every normal number is 0."""

from __future__ import annotations

import math

import pytest
import torch

from equilibria.cells.transformer.attention import softmax

SCORES = torch.linspace(-120.0, 3.0, 60).expand(2, 3, 60).contiguous()
"""Weights of all sizes, of which some are denormal in float32."""
supported = pytest.mark.skipif(not torch.set_flush_denormal(False), reason="this processor cannot flush denormals")


def flushes() -> bool:
    return bool((torch.full((1,), 1e-39) * 1.0 == 0).all())


def of_size(x):
    """1 for normal numbers, 0 for denormal ones, looked at as bits."""
    return x.view(torch.int32).abs() >= torch.tensor(torch.finfo(torch.float32).tiny).view(torch.int32)


@pytest.mark.parametrize("grad", [False, True])
def test_normal_weights_have_the_bits_of_pytorch(grad):
    with torch.set_grad_enabled(grad):
        weights = softmax(SCORES.clone().requires_grad_(grad)).detach()
    expected = torch.softmax(SCORES, dim=-1)
    normal = of_size(expected)
    assert 0 < normal.float().mean() < 1
    assert torch.equal(weights[normal], expected[normal])


@supported
@pytest.mark.parametrize("grad", [False, True])
def test_denormal_weights_and_gradients_are_zero(grad):
    scores = SCORES.clone().requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        weights = softmax(scores)
    assert (weights.detach().view(torch.int32)[~of_size(weights.detach())] == 0).all()
    if grad:
        weights.backward(1e-3 * torch.randn(weights.shape))
        assert scores.grad is not None
        assert (scores.grad.view(torch.int32)[~of_size(scores.grad)] & 0x7FFFFFFF == 0).all()


@supported
@pytest.mark.parametrize("setting", [False, True])
def test_the_setting_of_the_thread_is_kept(setting):
    torch.set_flush_denormal(setting)
    try:
        with torch.no_grad():
            softmax(SCORES)
        scores = SCORES.clone().requires_grad_()
        softmax(scores).sum().backward()
        assert flushes() is setting
    finally:
        torch.set_flush_denormal(False)


def test_it_has_every_derivative():
    scores = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(softmax, scores, check_batched_grad=True, check_forward_ad=True)
    torch.autograd.gradgradcheck(softmax, scores)
    third = torch.func.jacrev(torch.func.jacrev(torch.func.jacrev(lambda x: softmax(x).square().sum())))
    plain = torch.func.jacrev(torch.func.jacrev(torch.func.jacrev(lambda x: torch.softmax(x, -1).square().sum())))
    small = scores.detach()[:1, :1]
    torch.testing.assert_close(third(small), plain(small))
    torch.testing.assert_close(torch.vmap(softmax)(scores), torch.softmax(scores, dim=-1))


def test_hidden_keys_have_no_weight():
    scores = torch.tensor([[[0.0, -math.inf, 1.0]]], requires_grad=True)
    weights = softmax(scores)
    weights[..., 0].sum().backward()
    assert weights[0, 0, 1] == 0
    assert scores.grad is not None
    assert scores.grad[0, 0, 1] == 0
    assert torch.equal(weights, torch.softmax(scores, dim=-1))
