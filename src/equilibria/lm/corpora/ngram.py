"""witten_bell: the loss of an n-gram model, the baseline for the loss of a neural one.

Letters: N training tokens, L validation tokens, G different n-grams; h a context, w the token after it, k its length.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from equilibria.checks import check_whole, range_of


def witten_bell(train_ids: Int[Tensor, " N"], valid_ids: Int[Tensor, " L"], order: int, vocabulary_size: int) -> float:
    """The mean loss in nats per token of an interpolated Witten–Bell model with contexts of ``order`` tokens.

        p_k(w | h) = (c(h w) + n(h) · p_{k−1}(w | h')) / (c(h) + n(h))

    c counts in the training text, n(h) is the number of different tokens seen after h, and h' is h without its oldest
    token; p_k = p_{k−1} for a context that was never seen, and p_{−1} = 1 / V. The first validation token is not
    scored, since no model predicts it; the tokens after it are scored with the context that exists.

    Reference: Witten, Bell 1991, method C; Chen, Goodman 1999, section 2.4.

    Args:
        train_ids: the text in which n-grams are counted.
        valid_ids: the text to score.
        order: tokens of context: 0 is the unigram model, 1 the bigram model.
        vocabulary_size: V.

    Raises:
        ValueError: a number is too small, a text is too short, or an id is outside 0 … V − 1.
    """
    check_whole("witten_bell", order=order, vocabulary_size=vocabulary_size)
    if order < 0 or vocabulary_size < 1:
        raise ValueError(
            f"witten_bell(order={order}, vocabulary_size={vocabulary_size}): the order is at least 0 and the "
            "vocabulary has at least one token; try order=3 and len(corpus.vocabulary)."
        )
    if len(train_ids) == 0 or len(valid_ids) < 2:
        raise ValueError(
            f"witten_bell: {len(train_ids)} training and {len(valid_ids)} validation tokens, and at least 1 and 2 are "
            "needed; give longer texts."
        )
    low, high = range_of(train_ids, valid_ids)
    if low < 0 or high >= vocabulary_size:
        raise ValueError(
            f"witten_bell(vocabulary_size={vocabulary_size}): the ids reach from {low} to {high}, and "
            f"are 0 … {vocabulary_size - 1}; give len(corpus.vocabulary)."
        )
    p = torch.full((len(valid_ids),), 1 / vocabulary_size, dtype=torch.float64, device=valid_ids.device)
    train_contexts, valid_contexts = torch.zeros_like(train_ids), torch.zeros_like(valid_ids)
    for k in range(min(order, len(train_ids) - 1, len(valid_ids) - 1) + 1):
        # Contexts are numbered below N + L, so that the number of (h w) fits into 64 bits for every order.
        train_keys = train_contexts * vocabulary_size + train_ids[k:]
        valid_keys = valid_contexts * vocabulary_size + valid_ids[k:]
        keys, grams = torch.cat([train_keys, valid_keys]).unique(return_inverse=True)
        train_grams, valid_grams = grams.tensor_split([len(train_keys)])
        c_hw = train_grams.bincount(minlength=len(keys))
        p[k:] = _interpolate(p[k:], c_hw=c_hw, h_of=keys // vocabulary_size, grams=valid_grams)
        # The k + 1 tokens up to a position are the context of the next position.
        train_contexts, valid_contexts = train_grams[:-1], valid_grams[:-1]
    return -p[1:].log().mean().item()


def _interpolate(
    p: Float[Tensor, " L"], *, c_hw: Int[Tensor, " G"], h_of: Int[Tensor, " G"], grams: Int[Tensor, " L"]
) -> Float[Tensor, " L"]:
    """p_k from p_{k−1}, given c(h w) and h of every n-gram, and the n-gram at every position."""
    c_h = torch.zeros(int(h_of.max()) + 1, dtype=c_hw.dtype, device=c_hw.device).index_add_(0, h_of, c_hw)
    n_h = torch.zeros_like(c_h).index_add_(0, h_of, (c_hw > 0).to(c_hw.dtype))
    c, n = c_h[h_of[grams]], n_h[h_of[grams]]
    return torch.where(c > 0, (c_hw[grams] + n * p) / (c + n).clamp(min=1), p)
