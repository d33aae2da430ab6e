"""The arguments of the model's ``forward``: what has an exact meaning here, and what is refused in a sentence.

Letters: B batch, T time, D width, S stored positions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import Cache

from equilibria.core.stop import Stop
from equilibria.fixed_point import Method


def refuse(arguments: Mapping[str, Any]) -> None:
    """Raise a TypeError if an argument has a value: transformers passes on what it does not know."""
    given = sorted(name for name, value in arguments.items() if value is not None)
    if given:
        raise TypeError(
            f"EquilibriumForCausalLM.forward has no argument {', '.join(given)}; its arguments are those of its "
            "docstring."
        )


def given_cache(cache: Any, past_key_values: Any) -> Cache | None:
    """The cache, under whichever of its two names it was given."""
    if cache is not None and past_key_values is not None:
        raise ValueError("cache and past_key_values are two names of one argument; give one of them.")
    found = past_key_values if cache is None else cache
    if found is not None and not isinstance(found, Cache):
        raise TypeError(
            f"the cache is a {type(found).__name__}, and must be a Cache of transformers; try DynamicCache(), or none."
        )
    return found


def key_padding_mask(
    attention_mask: Tensor | None, position_ids: Tensor | None, *, seen: int, new: tuple[int, ...]
) -> Bool[Tensor, "B _"] | None:
    """True at padding, for the stored positions and the new ones; None if there is none.

    Args:
        attention_mask: 1 at text and 0 at padding, for all these positions; None for no padding.
        position_ids: the positions of the new tokens, which must count by one inside a text and continue that of the
            cache; None for those.
        seen: S, number of stored positions.
        new: B and T, numbers of rows and of new positions.

    Raises:
        ValueError: padding lies inside a text, or positions jump, as where several texts are packed into one row; or
            the mask has another shape, or other values than 0 and 1.
    """
    mask = None if attention_mask is None else _padding(attention_mask, new[0], seen + new[1])
    if position_ids is not None:
        _check_places(position_ids, *new)
        _check_steps(position_ids, None if mask is None else mask[:, seen:])
        if seen:
            _check_first(position_ids[:, 0], mask, seen)
    return mask


def checked_vectors(x: Any, *, width: int, dtype: torch.dtype) -> Float[Tensor, "B T D"]:
    """``inputs_embeds``, which holds vectors of this width, at least one, and of this dtype unless autocast is on.

    Raises:
        ValueError: it does not.
    """
    if not isinstance(x, Tensor) or x.ndim != 3 or x.shape[2] != width or not x.numel():
        found = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(
            f"inputs_embeds is {found}, and must be [rows, tokens, {width}], with at least one of each: the vectors of "
            "model.get_input_embeddings()(input_ids)."
        )
    if x.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
        raise ValueError(f"inputs_embeds is of {x.dtype}, and the weights of {dtype}; give inputs_embeds.to({dtype}).")
    return x


def kept_positions(logits_to_keep: Any, length: int) -> slice | Tensor:
    """The positions that get logits, of ``length`` ones: the last few, or those that a tensor names.

    Raises:
        ValueError: it is neither a number from 0 on, nor a tensor of positions inside the text.
    """
    if isinstance(logits_to_keep, int) and not isinstance(logits_to_keep, bool) and logits_to_keep >= 0:
        return slice(-logits_to_keep, None)
    found: Any = logits_to_keep
    if isinstance(found, Tensor) and found.ndim == 1 and found.dtype in (torch.int32, torch.int64):
        if found.device.type != "cpu" or bool(((found >= -length) & (found < length)).all()):
            return found
        found = found.tolist()
    raise ValueError(
        f"logits_to_keep={found!r}: give the number of last positions that get logits, 0 for all, or a tensor of "
        f"positions from {-length} to {length - 1}."
    )


def check_ids(
    name: str, ids: Tensor, size: int, *, shape: tuple[int, ...] | None = None, ignored: int | None = None
) -> None:
    """Raise a ValueError unless the argument ``name`` holds ids [B T] from 0 to ``size`` − 1, or ``ignored``.

    Their range is checked on a CPU alone, since another device would be waited for.
    """
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.dtype not in (torch.int32, torch.int64) or not ids.numel():
        kind = f"{tuple(ids.shape)} of {ids.dtype}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"{name} is {kind}, and must be [rows, tokens] of torch.int64, with at least one of each.")
    if shape is not None and tuple(ids.shape) != tuple(shape):
        raise ValueError(
            f"{name} has the shape {tuple(ids.shape)}, and must be {tuple(shape)}: one number for each token of the "
            "input; the model shifts them itself."
        )
    if ids.device.type != "cpu" or torch.compiler.is_compiling():
        return
    wrong = (ids < 0) | (ids >= size)
    wrong = wrong if ignored is None else wrong & (ids != ignored)
    if bool(wrong.any()):
        others = "" if ignored is None else f", or {ignored} where nothing is scored"
        raise ValueError(
            f"{name} holds {int(ids[wrong][0])}, and the ids of this model are 0 … {size - 1}{others}; encode the text "
            "with the tokenizer of the model."
        )


def _padding(attention_mask: Any, rows: int, length: int) -> Bool[Tensor, "B _"] | None:
    if not isinstance(attention_mask, Tensor) or tuple(attention_mask.shape) != (rows, length):
        found = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        raise ValueError(
            f"attention_mask has the shape {found}, and must be [rows, {length}] with {rows} rows, one number "
            "for each position in the cache and each new one: 1 at text, 0 at padding. Masks per pair of positions "
            "have no meaning for an equilibrium, whose cell masks by itself."
        )
    text = attention_mask == 1
    if bool(text.all()):
        return None
    if not bool((text | (attention_mask == 0)).all()):
        other = attention_mask[~text & (attention_mask != 0)][0].item()
        raise ValueError(
            f"attention_mask holds {other}, and must hold 1 at text and 0 at padding; a mask of numbers to add, or of "
            "the numbers of texts that are packed into one row, has another meaning."
        )
    starts = (text[:, 1:] & ~text[:, :-1]).sum(dim=1) + text[:, 0]
    if bool((starts > 1).any()):
        raise ValueError(
            f"attention_mask has padding between the tokens of {int((starts > 1).sum())} texts, such as after a prompt "
            "that continues, and the distance of two positions would count it; put padding before the text "
            "(tokenizer.padding_side = 'left'), or after a text that is complete."
        )
    return ~text


def _check_places(position_ids: Any, rows: int, length: int) -> None:
    if not isinstance(position_ids, Tensor) or tuple(position_ids.shape) not in ((rows, length), (1, length)):
        found = tuple(position_ids.shape) if isinstance(position_ids, Tensor) else type(position_ids).__name__
        raise ValueError(
            f"position_ids is {found}, and must be [{rows}, {length}], one number for each new token; it may be left "
            "out, since the model counts positions itself."
        )


def _check_steps(position_ids: Tensor, mask: Bool[Tensor, "B T"] | None) -> None:
    steps = position_ids.diff(dim=-1) == 1
    if mask is not None:
        steps = steps | mask[:, 1:] | mask[:, :-1]
    if not bool(steps.all()):
        raise ValueError(
            "position_ids jump inside a row, as where several texts are packed into one; positions enter this model by "
            "their distances in the row, so give each text a row of its own, with padding and attention_mask."
        )


def _check_first(first: Int[Tensor, " _"], mask: Bool[Tensor, "B _"] | None, seen: int) -> None:
    """Raise a ValueError unless the first new position follows the S stored ones, counted with or without padding."""
    stored = torch.tensor([seen], device=first.device) if mask is None else seen - mask[:, :seen].sum(dim=1)
    follows = (first == stored) | (first == seen)
    if mask is not None:
        follows = follows | mask[:, seen]
    if not bool(follows.all()):
        raise ValueError(
            f"position_ids begin at {first.tolist()}, and the cache holds {stored.tolist()} positions of these texts; "
            "positions enter this model by their distances, so a new token follows the last stored one: leave out "
            "position_ids, or crop the cache."
        )


def used_stop(method: Method, *, rtol: float | None, atol: float | None, max_evals: int | None) -> Method:
    """The method with these tolerances and this budget; None for its own."""
    given = {"rtol": rtol, "atol": atol, "max_evals": max_evals}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    stop: Stop = dataclasses.replace(method.stop, **changes)
    return method.with_stop(stop)


def check_text_at_the_end(attention_mask: Any) -> None:
    """Raise a ValueError if a prompt ends in padding, because the model cannot predict the next token from padding."""
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2 and attention_mask.numel():
        blind = int((attention_mask[:, -1] == 0).sum())
        if blind:
            raise ValueError(
                f"attention_mask has padding at the end of {blind} of {len(attention_mask)} rows, and what follows a "
                "text cannot be predicted from padding; put padding before the text (tokenizer.padding_side = 'left')."
            )


def check_weights(model: nn.Module, embedding: nn.Module) -> None:
    """Raise a ValueError if a weight is offloaded to the meta device, or if an adapter replaces the embedding.

    The solve and a tied head read weights directly, without calling the module that holds them. So accelerate does not
    load an offloaded weight, and PyTorch multiplies by uninitialised memory without an error. And peft adapts the
    vectors that the embedding returns, but not the table that a tied head reads.
    """
    for name, parameter in model.named_parameters() if "_hf_hook" in vars(model) else ():  # accelerate's mark
        if parameter.is_meta:
            raise ValueError(
                f"the weight {name} is on the meta device, as after an offload to disk or to another device, and a "
                "solve reads all weights at each evaluation; load the whole model onto one device, device_map='cpu' or "
                "'cuda:0'."
            )
    if any("base_layer" in name for name, _ in embedding.named_modules()):
        raise ValueError(
            "an adapter replaces the embedding: a head that reads the same table would not see it, and the vectors "
            "would be others once it is merged; leave the embedding out of target_modules and trainable_token_indices, "
            "or train all of it, modules_to_save=['embedding']."
        )


def check_no_gradient_of_a_cache() -> None:
    """Raise a ValueError while autograd records: a cache holds detached values."""
    if torch.is_grad_enabled():
        raise ValueError(
            "a cache has no gradient; use it under torch.no_grad(), or give use_cache=False and the whole text."
        )
