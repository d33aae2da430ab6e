"""Denormal numbers are 0 where it was asked for, and nowhere else."""

from __future__ import annotations

import pytest
import torch

from equilibria.torch_private import denormals_are_zero

pytestmark = pytest.mark.skipif(
    not torch.set_flush_denormal(False), reason="this processor cannot replace denormal numbers"
)


def are_zero() -> bool:
    return bool((torch.full((1,), 1e-39) * 1.0 == 0).all())


@pytest.mark.parametrize("setting", [False, True])
def test_the_setting_of_the_thread_comes_back(setting):
    torch.set_flush_denormal(setting)
    try:
        with denormals_are_zero():
            assert are_zero()
            with denormals_are_zero():
                assert are_zero()
            assert are_zero()
        assert are_zero() is setting
        with pytest.raises(KeyError), denormals_are_zero():
            raise KeyError
        assert are_zero() is setting
        assert denormals_are_zero()(are_zero)()
        assert are_zero() is setting
    finally:
        torch.set_flush_denormal(False)
