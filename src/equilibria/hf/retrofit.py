"""equilibrium_of: decoder layers of a pretrained model of transformers as the map of an equilibrium.

Letters: B batch, T time, D width. State ``z``, input ``x``, map ``f``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from equilibria.core.gradient import GradientRule
from equilibria.core.solver import Solver
from equilibria.core.stop import OnFailure, Stop
from equilibria.fixed_point import Method
from equilibria.gradients.implicit import Implicit
from equilibria.hf.loop import Hidden, Loop, Place, Settings
from equilibria.layers.equilibrium import LayerOutput
from equilibria.lm.experiments.serialise import part_from_json, part_to_json

RECORD = "equilibrium_loop"
"""The field of the model's configuration that holds layers and settings."""
_RTOL = {torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""The relative tolerance for weights in half precision, above their rounding."""


@dataclasses.dataclass(frozen=True)
class Lerp:
    """inject(z, x) = (1 − a)·x + a·z."""

    a: float
    """The share of z: 0 for the pretrained network, below 1."""

    def __post_init__(self) -> None:
        if not 0 <= self.a < 1:
            raise ValueError(
                f"inject={self.a}: the share of z in inject(z, x) = (1 − a)·x + a·z must be at least 0 and below 1. "
                "With a = 1 the loop never reads x, so that its equilibrium does not depend on the text; try 0.5."
            )

    def __call__(self, z: Hidden, x: Hidden) -> Hidden:
        """The mix; for a = 0 the bits of x."""
        return x if self.a == 0 else torch.lerp(x, z, self.a)


def equilibrium_of(
    model: PreTrainedModel,
    layers: int | Iterable[int] | None = None,
    inject: float | Callable[[Hidden, Hidden], Hidden] | None = None,
    *,
    norm: Callable[[Hidden], Hidden] | None = None,
    solver: Solver | None = None,
    stop: Stop | None = None,
    gradient: GradientRule | None = None,
    eval_stop: Stop | None = None,
    on_failure: OnFailure | None = None,
    watch: Callable[[LayerOutput], Any] | None = None,
) -> PreTrainedModel:
    """The model itself, in which these layers are now one equilibrium z* = f(z*), f(z) = norm(layers(inject(z, x))).

    x is what enters the first of these layers, and z* what leaves the last; everything else is as before, names of
    parameters and ``generate`` included. Each position has its keys and values in the cache once per layer, however
    many evaluations the solve needs. ``equilibrium_of(model, inject=0.6)`` changes one setting of the same model.

    ``save_pretrained`` stores layers and settings in ``config.json``, and ``from_pretrained`` returns the plain network
    with these weights: make it an equilibrium again by ``equilibrium_of(model)``.

    Args:
        model: a causal language model whose decoder has ``layers`` that map hidden states to hidden states, such as
            Llama or Qwen3.
        layers: the number of a layer, or those of several in a row. None for those that the model or its configuration
            has already, and for their settings: then None stands below for what is set.
        inject: the share a of z in (1 − a)·x + a·z, from 0, which is the pretrained network to the bit, to below 1; or
            any function of z and x without parameters of its own. None for 0.5.
        norm: a function without parameters of its own, such as ``nn.RMSNorm(width, elementwise_affine=False)``; None
            for none.
        solver: proposes iterates, from z = x; None for ``Anderson()``.
        stop: tolerance and budget; None for 60 evaluations, and a relative tolerance of 1e-4, of 2e-3 for weights in
            float16 and of 1e-2 for bfloat16.
        gradient: how the gradient gets through the solve; None for ``Implicit`` with the same stop.
        eval_stop: tolerance and budget in evaluation; None for ``stop``.
        on_failure: "warn", "raise" or "ignore" when a solve, forward or backward, does not converge; None to warn.
        watch: called with the ``LayerOutput`` of each solve: its ``solution`` tells evaluations and residuals, and its
            ``f`` is for the measures of ``equilibria.stability``.

    Raises:
        TypeError, ValueError: the model has no such layers, or the equilibrium would not depend on its text.
    """
    decoder = _decoder(model)
    loop = _loop_in(decoder)
    if layers is None:
        numbers, base = _recorded(model, inject, norm) if loop is None else (loop.numbers, loop.settings)
    else:
        numbers = _numbers(layers, len(decoder.layers))
        base = _defaults(decoder.layers[numbers.start], stop)
    if loop is not None and loop.numbers != numbers:
        raise ValueError(
            f"layers={list(numbers)}: the layers {list(loop.numbers)} of this model are a loop already, and a model "
            "has one; give these to change their settings, or load the model again."
        )
    given = {"solver": solver, "stop": stop, "gradient": gradient, "on_failure": on_failure}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    settings = Settings(
        inject=base.inject if inject is None else inject if callable(inject) else Lerp(inject),
        norm=norm or base.norm,
        method=dataclasses.replace(base.method, **changes),
        eval_stop=eval_stop or base.eval_stop,
        watch=watch or base.watch,
    )
    _check_functions(settings, _like(decoder.layers[numbers.start]), model.config.get_text_config().hidden_size)
    if loop is None:
        Loop(decoder, numbers, settings)
    else:
        loop.settings = settings
    setattr(model.config, RECORD, _record(numbers, settings))
    if model.generation_config is not None:
        model.generation_config.disable_compile = True  # the number of evaluations depends on the data
    return model


def _decoder(model: Any) -> Any:
    decoder = model.get_decoder() if isinstance(model, PreTrainedModel) else None
    if not isinstance(getattr(decoder, "layers", None), nn.ModuleList):
        raise TypeError(
            f"equilibrium_of got a {type(model).__name__}, and needs a causal language model of transformers whose "
            "get_decoder() has a list of layers, such as LlamaForCausalLM or Qwen3ForCausalLM; for a model of peft "
            "give model.get_base_model()."
        )
    return decoder


def _numbers(layers: int | Iterable[int], count: int) -> range:
    """The layers as a range."""
    listed = [layers] if isinstance(layers, int) else list(layers)
    if listed and all(isinstance(number, int) for number in listed):
        found = range(listed[0], listed[0] + len(listed))
        if listed == list(found) and found.start >= 0 and found.stop <= count:
            return found
    raise ValueError(
        f"layers={layers}: a loop is one layer or several in a row, from 0 to {count - 1} in this model; try layers="
        f"range({count // 4}, {max(count // 4 + 1, 3 * count // 4)})."
    )


def _loop_in(decoder: Any) -> Loop | None:
    """The loop of the decoder; None if it has none."""
    places = (vars(layer).get("forward") for layer in decoder.layers)
    return next((place.loop for place in places if isinstance(place, Place)), None)


def _like(layer: nn.Module) -> Tensor:
    """A tensor of the dtype and on the device of the layer."""
    return next(parameter for parameter in layer.parameters() if parameter.is_floating_point())


def _defaults(layer: nn.Module, stop: Stop | None) -> Settings:
    """The default settings, with ``stop`` also for the gradient."""
    used = Stop(rtol=_RTOL.get(_like(layer).dtype, 1e-4), max_evals=60) if stop is None else stop
    method = Method(stop=used, gradient=Implicit(stop=used))
    return Settings(inject=Lerp(0.5), norm=None, method=method, eval_stop=None, watch=None)


def _check_functions(settings: Settings, like: Tensor, width: int) -> None:
    """Raise a ValueError if a function has parameters, changes the shape, or does not read x."""
    inject, norm, x = settings.inject, settings.norm, like.new_ones(1, 2, width)
    for name, function in (("inject", inject), ("norm", norm)):
        if isinstance(function, nn.Module) and any(True for _ in function.parameters()):
            raise ValueError(
                f"{name} is a {type(function).__name__} with parameters, which save_pretrained would leave out; give a "
                "function without parameters, such as nn.RMSNorm(width, elementwise_affine=False) or 0.5."
            )
    with torch.no_grad():
        z = x.cumsum(dim=-1) / x.shape[-1]
        one, other = inject(z, x), inject(z, z - x)
        for name, value in (("inject", one), ("norm", one if norm is None else norm(one))):
            if not isinstance(value, Tensor) or value.shape != x.shape or value.dtype != x.dtype:
                shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(
                    f"{name} returned {shape} for hidden states {tuple(x.shape)} of {x.dtype}; it must return a tensor "
                    "of the same shape and dtype, such as torch.lerp(x, z, 0.5)."
                )
    if torch.equal(one, other):
        raise ValueError(
            "inject(z, x) returned the same for two inputs x, so that the equilibrium would not depend on the text; "
            "mix x into it, for example inject=0.5 for (x + z)/2."
        )


def _record(numbers: range, settings: Settings) -> dict[str, Any]:
    """Layers and settings for ``config.json``; a function is False there, and must be given again."""
    inject, norm, eval_stop = settings.inject, settings.norm, settings.eval_stop
    return {
        "layers": list(numbers),
        "inject": inject.a if isinstance(inject, Lerp) else False,
        "norm": None if norm is None else False,
        "method": _encoded(settings.method),
        "eval_stop": None if eval_stop is None else _encoded(eval_stop),
    }


def _encoded(part: Any) -> Any:
    try:
        return part_to_json(part)
    except (TypeError, ValueError):  # a function for a norm, or a solver from outside the library
        return False


def _recorded(model: PreTrainedModel, inject: Any, norm: Any) -> tuple[range, Settings]:
    """Layers and settings from the model's configuration."""
    record = getattr(model.config, RECORD, None)
    if record is None:
        raise ValueError(
            f"equilibrium_of(model) without layers reads them from model.config.{RECORD}, and this model has none; "
            "give layers=range(…)."
        )
    given = {"inject": inject is not None, "norm": norm is not None}
    missing = [name for name, value in record.items() if value is False and not given.get(name)]
    if missing:
        raise ValueError(
            f"model.config.{RECORD} cannot hold the functions in {' and '.join(missing)}; give all settings again, "
            f"with layers={record['layers']}."
        )
    layers, stop = record["layers"], record["eval_stop"]
    settings = Settings(
        inject=Lerp(record["inject"]) if inject is None else inject,
        norm=norm,
        method=part_from_json(record["method"], Method),
        eval_stop=None if stop is None else part_from_json(stop, Stop),
        watch=None,
    )
    return range(layers[0], layers[-1] + 1), settings
