"""The loss that a trainer minimises: a sum over tokens, so that its value does not depend on how batches are divided.

Letters: B batch, T time, O channels of the output.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from equilibria.hf.configuration import EquilibriumConfig
from equilibria.hf.edges import EDGE
from equilibria.lm.model import ExtraLosses

IGNORED = -100
"""The label of a token that is not scored."""


def targets_of(
    labels: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"] | None, config: EquilibriumConfig, *, counted: bool
) -> Int[Tensor, "B _"]:
    """Labels 1, 2, …, each of which the position before it predicts; −100 where that is padding; in torch.int64.

    Args:
        labels: the tokens themselves, and −100 where none is scored.
        mask: True at padding; None if there is none.
        config: the configuration, which names the edge.
        counted: True if a trainer has counted the labels, to divide by their number.

    Raises:
        ValueError: the edge is to be predicted, or a token that was counted follows padding.
    """
    targets = labels[:, 1:].long()  # cross_entropy takes no torch.int32
    if mask is not None:  # nothing can be predicted from padding, not even the first token of a text
        blind = (targets != IGNORED) & mask[:, :-1]
        if counted and bool(blind.any()):
            raise ValueError(
                f"num_items_in_batch counts {int(blind.sum())} labels of tokens that follow padding, from which "
                "nothing is predicted; for training pad after the texts (tokenizer.padding_side = 'right'), or give "
                "−100 there."
            )
        targets = targets.masked_fill(blind, IGNORED)
    if config.edge_token_id is not None and bool((targets == config.edge_token_id).any()):
        raise ValueError(
            f"labels hold the id {config.edge_token_id} of {EDGE!r}, which the model never predicts; give "
            "−100 there, as DataCollatorForLanguageModeling does at padding."
        )
    return targets


def scored(targets: Int[Tensor, "B _"], count: Tensor | int | None) -> Tensor | int:
    """The number that the summed loss is divided by: ``count``, or else that of the scored targets.

    Raises:
        ValueError: it is not above 0, so that there is no mean.
    """
    number = (targets != IGNORED).sum() if count is None else count
    if isinstance(number, Tensor):
        number = number.reshape(())  # for DataParallel it has the shape [1, 1]
    if not bool(number > 0):
        what = "labels score no token: all" if count is None else f"num_items_in_batch={int(number)}: all labels"
        raise ValueError(
            f"{what} are −100, follow padding, or belong to texts of one token, so the loss would be NaN and would "
            "make the weights NaN; leave such texts out of the data."
        )
    return number


def check_labels_come_with_their_count(labels: Tensor | None, count: Tensor | int | None) -> None:
    """Raise a ValueError if a trainer counts the labels and keeps them for a loss of its own."""
    if labels is None and count is not None:
        raise ValueError(
            "num_items_in_batch came without labels, as from a Trainer that makes the loss itself: its label smoothing "
            "would not shift the labels of this model, and counts the edge, which is never predicted; set "
            "label_smoothing_factor=0 and leave compute_loss_func out. For another loss override Trainer.compute_loss."
        )


def extra_loss(
    losses: ExtraLosses,
    output: Float[Tensor, "B T O"],
    kept: Float[Tensor, "B T O"],
    targets: Int[Tensor, "B T"],
    count: Tensor | int,
) -> Float[Tensor, ""] | None:
    """The extra losses of training: the mean over rows, each weighted by its share of the scored tokens.

    So batches of an accumulation and of several processes add up to the loss of all rows together, as their nll does.

    Args:
        losses: the extra losses.
        output: the output at all positions but the last.
        kept: the output after dropout, likewise.
        targets: the targets of these positions; those before the first and after the last scored one count as padding.
        count: number of scored tokens that the nll is divided by.
    """
    scored = targets != IGNORED
    terms = []
    for row, places in enumerate(scored):
        found = places.nonzero().flatten()
        if len(found):
            text = slice(int(found[0]), int(found[-1]) + 1)
            extra = losses.of(output[row : row + 1, text], kept[row : row + 1, text])
            if extra is None:
                continue
            terms.append(extra * len(found))
    return torch.stack(terms).sum() / count if terms else None
