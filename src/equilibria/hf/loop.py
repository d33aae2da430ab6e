"""Loop: consecutive decoder layers of transformers as the map of an equilibrium, in their own places of the model.

The model calls its layers one after another. The first ones of a loop only note their arguments and pass the hidden
states on; the last one solves z = f(z) for all of them. So the model, its parameters and their names stay as they are.

Letters: B batch, T time, D width. State ``z``, input ``x``, map ``f``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import Cache

from equilibria.core.maps import as_map
from equilibria.core.stop import Stop
from equilibria.fixed_point import Method, check_gathered
from equilibria.hf.view import check_cache, padding, view
from equilibria.layers.equilibrium import LayerOutput

Hidden = Float[Tensor, "B T D"]
_CALLS = "_equilibrium_calls"
"""The attribute of passed hidden states that holds the calls so far."""
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
"""The modules that drop a random share p of their input."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """f(z) = norm(layers(inject(z, x))), and how z = f(z) is solved."""

    inject: Callable[[Hidden, Hidden], Hidden]
    norm: Callable[[Hidden], Hidden] | None
    method: Method
    eval_stop: Stop | None
    watch: Callable[[LayerOutput], Any] | None


@dataclasses.dataclass(frozen=True)
class Call:
    """The arguments of a layer, without its hidden states."""

    args: tuple[Any, ...]
    named: Mapping[str, Any]

    @property
    def cache(self) -> Cache | None:
        """The cache among them, under whichever name it is given."""
        return next((value for value in (*self.args, *self.named.values()) if isinstance(value, Cache)), None)

    def given(self, cache: Cache | None) -> Call:
        """The arguments with another cache."""
        args = (cache if isinstance(value, Cache) else value for value in self.args)
        named = {name: cache if isinstance(value, Cache) else value for name, value in self.named.items()}
        return Call(tuple(args), named)


class Loop:
    """Layers of a decoder that follow each other.

    Args:
        decoder: the module with the ``layers``.
        numbers: those of the layers in the loop.
        settings: the map and the method.
    """

    def __init__(self, decoder: Any, numbers: range, settings: Settings) -> None:
        self.layers: list[nn.Module] = [decoder.layers[number] for number in numbers]
        self.numbers = numbers
        self.config = decoder.config
        self.settings = settings
        # Other libraries, such as accelerate, may have replaced the forward of this instance.
        self._own = [vars(layer).get("forward") for layer in self.layers]
        for index, layer in enumerate(self.layers):
            layer.forward = Place(self, index)

    def called(self, index: int, x: Hidden, call: Call) -> Hidden:
        """The result of layer ``index`` of the loop: x itself, and z* from the last one."""
        calls = () if index == 0 else getattr(x, _CALLS, ())
        if len(calls) != index:
            raise ValueError(
                f"{type(self.config).__name__}: the model changes the hidden states between the layers "
                f"{self.numbers[index] - 1} and {self.numbers[index]}, so that the two are no map of one state; give "
                "equilibrium_of layers with nothing in between, or one layer."
            )
        calls = (*calls, call)
        if len(calls) == len(self.layers):
            return self.solved(x, calls)
        passed = x.view_as(x)
        setattr(passed, _CALLS, calls)
        return passed

    def solved(self, x: Hidden, calls: tuple[Call, ...]) -> Hidden:
        """z* = f(z*) for x; its keys and values are added to the cache, if there is one.

        At padding f is 0, so that a row has the residual that it has alone.
        """
        self._check(calls)
        settings, cache = self.settings, calls[0].cache
        blank = self._padding(x, calls[0])
        # f may be evaluated again in a backward pass, when the cache holds these positions, too.
        past = None if cache is None else view(cache, self.numbers)

        def f(z: Hidden) -> Hidden:
            seen = None if past is None else view(past, self.numbers)
            value = self._through(settings.inject(z, x), calls, seen)
            return _blanked(value if settings.norm is None else settings.norm(value), blank)

        method = settings.method.with_stop(None if self.layers[0].training else settings.eval_stop)
        # From 0 a norm in the layers could keep z at 0: a fixed point, and the wrong one.
        solution = method.run(as_map(f), _blanked(x, blank))
        z: Any = solution.z
        if cache is not None:
            self._through(settings.inject(z, x), calls, cache)
        if settings.watch is not None:
            settings.watch(LayerOutput(output=z, z=z, f=as_map(f), solution=solution))
        return z

    def _through(self, hidden: Hidden, calls: tuple[Call, ...], cache: Cache | None) -> Hidden:
        for layer, own, call in zip(self.layers, self._own, calls, strict=True):
            given = call.given(cache)
            # Not layer(…): hooks of a layer belong to its place in the model, once per forward pass.
            forward: Any = type(layer).forward.__get__(layer) if own is None else own
            hidden = forward(hidden, *given.args, **given.named)
            if not isinstance(hidden, Tensor):
                raise TypeError(
                    f"{type(layer).__name__} returned a {type(hidden).__name__}, and a layer of a loop must return its "
                    "hidden states as one tensor, as those of Llama and Qwen3 do; choose another model."
                )
        return hidden

    def _padding(self, x: Hidden, call: Call) -> Bool[Tensor, "B T"] | None:
        position = call.named.get("cache_position")  # until transformers 5.2 the only exact count of a static cache
        if position is not None:
            seen = int(position[0])
        else:
            seen = 0 if call.cache is None else int(call.cache.get_seq_length(self.numbers[0]))
        return padding(call.named.get("attention_mask"), new=x.shape[1], seen=seen)

    def _check(self, calls: tuple[Call, ...]) -> None:
        if calls[0].cache is not None:
            check_cache(calls[0].cache, self.numbers)
        asked = {name for call in calls for name, value in call.named.items() if name.startswith("output_") and value}
        asked |= {name for name in _INNER if getattr(self.config, name, False)}
        if asked - {"output_hidden_states"}:
            raise ValueError(
                f"{', '.join(sorted(asked - {'output_hidden_states'}))}=True would collect the values of every "
                "evaluation of the solve; leave it out, since only the last one is of the equilibrium."
            )
        for number, layer in zip(self.numbers, self.layers, strict=True):
            check_gathered(layer)
            _check_pure(number, layer)


_INNER = ("output_attentions", "output_router_logits")
"""The settings of a configuration that collect values from inside a layer."""


class Place:
    """The ``forward`` of one layer of a loop.

    Args:
        loop: the loop.
        index: the number of the layer in the loop, from 0.
    """

    def __init__(self, loop: Loop, index: int) -> None:
        self.loop, self.index = loop, index

    def __call__(self, hidden_states: Hidden, *args: Any, **named: Any) -> Hidden:
        """The hidden states after this layer."""
        return self.loop.called(self.index, hidden_states, Call(args, named))


def _check_pure(number: int, layer: nn.Module) -> None:
    """Raise a ValueError if the layer would not give the same bits twice, or would forget its cache."""
    if not layer.training:
        return
    if getattr(layer, "gradient_checkpointing", False):
        raise ValueError(
            f"gradient checkpointing is on for layer {number}, which is in a loop and keeps one evaluation anyway; "
            f"switch it off there: model.get_decoder().layers[{number}].gradient_checkpointing = False."
        )
    for name, module in layer.named_modules():
        if not module.training:
            continue
        found = {"p": module.p} if isinstance(module, DROPOUTS) else vars(module)
        for setting, value in found.items():
            random = isinstance(module, DROPOUTS) or "dropout" in setting or "jitter" in setting
            if random and isinstance(value, float) and value > 0:
                raise ValueError(
                    f"{name or type(layer).__name__} of layer {number} has {setting}={value}, and draws at each "
                    "evaluation of f, which must give the same bits twice to have a fixed point; set it to 0.0 (for "
                    "LoRA lora_dropout=0.0), or call .eval() on the layers of the loop."
                )


def _blanked(state: Hidden, blank: Bool[Tensor, "B T"] | None) -> Hidden:
    return state if blank is None else state.masked_fill(blank[..., None], 0)
