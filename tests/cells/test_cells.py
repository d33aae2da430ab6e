"""Properties that all configurations of the catalogue share."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from equilibria.cells import CELLS

pytestmark = pytest.mark.parametrize("config", CELLS, ids=lambda config: repr(config)[:40])


def test_a_config_is_frozen_and_complete(config):
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.width = 3
    assert dataclasses.replace(config) == config == config.build().config


def test_a_config_says_what_the_layers_after_read(config):
    cell = config.build()
    x = torch.randn(2, 4, config.width)
    prepared = cell.prepare(x)
    assert cell.output(cell(cell.start(prepared), prepared)).shape == (2, 4, config.outputs)


def test_under_autocast(config):
    cell = config.build().train()
    x = torch.randn(2, 4, config.width)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        prepared = cell.prepare(x)
        z = torch.randn_like(cell.start(prepared))
        fz = cell(z, prepared)
        memory = cell.remember(fz, prepared)
        again = cell(fz, cell.prepare(x) if memory is None else cell.prepare(x, memory))
    again.float().sum().backward()
    assert torch.isfinite(again).all()
