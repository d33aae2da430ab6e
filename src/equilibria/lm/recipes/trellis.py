"""trellis: the published TrellisNets, by words and by characters, and their equilibria. Each needs a GPU.

The numbers of the deep networks are those of the authors' scripts (Bai, Kolter, Koltun 2019, "Trellis networks for
sequence modeling"); those of the equilibrium on WikiText-103 are from the code of Bai, Kolter, Koltun (2019, "Deep
equilibrium models"). For the equilibrium on the words of the Penn Treebank only the sizes are published, and for its
characters nothing. There, solver, tolerances, shallow stage, weight norm and segments are ours, and all other numbers
are those of the deep network, without its auxiliary losses, as in the paper. Deviations:

1. Depths are those of the scripts, 58, 140 and 75; the paper's tables say 60 and 70 for the networks on words.
2. With overlapping segments, the first segment of a stream is scored completely; theirs never scores the first 58 words
   of a stream.
3. Words are numbered by frequency, as the clusters of the softmax require; the script numbers them by first appearance.
4. The rate on WikiText-103 is divided after epochs 15 and 20, of the equilibrium also after 23; the code divides it on
   a plateau too.
5. Characters: 1,000 hidden channels, which give the published 13.4M parameters; the script's 1,050 give 14.5M.
6. The equilibrium on WikiText-103 has the sizes of the deep network, as in the paper's table; the code has 500, 1,500
   and 500. It solves a segment at once; the code solves two pieces of 50 words. It has one bias; the code adds two.
7. An equilibrium reads the last input of the previous segment, so the division into segments does not change it; the
   deep networks read 0 there, as in the scripts.
8. The equilibria on the Penn Treebank are solved by plain iteration with ``recurrence="scan"``, which does not change
   them: J is nearly block-subdiagonal in time, so its powers vanish quickly, and Anderson and Broyden do not exploit
   that. For the adjoint, Anderson needs the fewest evaluations.
9. Limits count evaluations of f, and every sample is solved on its own, as in the other recipes for WikiText-103.
10. The script has no sizes for the mixture of softmaxes; those of ``ptb-trellis-mos`` are chosen for 34M parameters.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from equilibria.cells.trellis.cell import TrellisConfig
from equilibria.core.stop import Stop
from equilibria.fixed_point import Method
from equilibria.gradients.implicit import Implicit
from equilibria.lm.corpora import (
    PENN_TREEBANK_CHARACTER_COUNTS,
    PENN_TREEBANK_COUNTS,
    WIKITEXT103_COUNTS,
    PennTreebank,
    PennTreebankCharacters,
    WikiText103,
)
from equilibria.lm.experiments import (
    Batches,
    Experiment,
    Faults,
    Logging,
    Milestones,
    NonMonotone,
    Optimisation,
    Stage,
    Training,
    Validation,
    network_of,
)
from equilibria.lm.model import AdaptiveConfig, Explicit, ExtraLosses, LanguageConfig, MixtureConfig
from equilibria.lm.recipes.epochs import steps_per_epoch
from equilibria.solvers.anderson import Anderson
from equilibria.solvers.broyden import Broyden
from equilibria.solvers.picard import Picard

_WORDS = TrellisConfig(width=400, hidden=1_000, outputs=400, dropout=0.28, weight_dropout=0.5, recurrence="scan")
_CHARACTERS = TrellisConfig(width=200, hidden=1_000, outputs=200, dropout=0.29, weight_dropout=0.26, recurrence="scan")
_WIKITEXT = TrellisConfig(width=512, hidden=1_600, outputs=512, dropout=0.1)


def ptb_trellis() -> Experiment:
    """24M parameters, 20M of them in the layer; the paper's equilibrium reaches a test perplexity of 57.1.

    Bai, Kolter, Koltun (2019), table 2: training takes 1.2 GB, and 8.5 GB for the deep network.
    """
    epoch = steps_per_epoch(PENN_TREEBANK_COUNTS["train"], batch_size=16, length=110)
    losses = ExtraLosses(activation=2.0, temporal_activation=1.0)
    return Experiment(
        name="ptb-trellis",
        corpus=PennTreebank(),
        model=_words(_WORDS, losses=losses),
        stages=_pre_trained(500 * epoch),
        training=_sgd(epoch, memory_depths=(12, 58)),
    )


def ptb_trellis_deep() -> Experiment:
    """24M parameters in 58 weight-tied layers; the paper's network reaches a test perplexity of 57.0.

    Bai, Kolter, Koltun (2019), table 2. Every segment of 110 words begins without memory, and its last 52 are scored.
    """
    epoch = steps_per_epoch(PENN_TREEBANK_COUNTS["train"], batch_size=16, length=110, overlap=58)
    losses = ExtraLosses(activation=2.0, temporal_activation=1.0, auxiliary=0.05)
    cell = dataclasses.replace(_deep(_WORDS), weight_norm=False)
    return Experiment(
        name="ptb-trellis-deep",
        corpus=PennTreebank(),
        model=_words(cell, losses=losses, explicit=Explicit(depth=58, auxiliary_every=12)),
        stages=(Stage(name="explicit", steps=500 * epoch),),
        training=_sgd(epoch, overlap=58, spectral_radius=0),
    )


def ptb_trellis_mos() -> Experiment:
    """34M parameters, and a mixture of 15 softmaxes; the published deep network reaches a test perplexity of 54.19.

    Bai, Kolter, Koltun (2019), "Trellis networks"; all but the sizes and the mixture is as in ptb-trellis-deep.
    """
    value = ptb_trellis_deep()
    assert isinstance(value.model, LanguageConfig)
    assert isinstance(value.model.cell, TrellisConfig)
    cell = dataclasses.replace(value.model.cell, width=280, hidden=1_300, outputs=480)
    model = dataclasses.replace(value.model, cell=cell, mixture=MixtureConfig(experts=15, dropout=0.29))
    return dataclasses.replace(value, name="ptb-trellis-mos", model=model)


def ptb_char_trellis() -> Experiment:
    """13.4M parameters; no such equilibrium is published, and the deep network reaches 1.158 bits per character.

    Bai, Kolter, Koltun (2019), "Trellis networks", on the characters of the Penn Treebank.
    """
    epoch = steps_per_epoch(PENN_TREEBANK_CHARACTER_COUNTS["train"], batch_size=24, length=140)
    return Experiment(
        name="ptb-char-trellis",
        corpus=PennTreebankCharacters(),
        model=_characters(_CHARACTERS),
        stages=_pre_trained(400 * epoch),
        training=_of_characters(epoch),
    )


def ptb_char_trellis_deep() -> Experiment:
    """13.4M parameters in 140 weight-tied layers; the published network reaches 1.158 bits per character.

    Bai, Kolter, Koltun (2019), "Trellis networks"; the script carries the memory from segment to segment.
    """
    epoch = steps_per_epoch(PENN_TREEBANK_CHARACTER_COUNTS["train"], batch_size=24, length=140)
    explicit = Explicit(depth=140, auxiliary_every=80)
    return Experiment(
        name="ptb-char-trellis-deep",
        corpus=PennTreebankCharacters(),
        model=_characters(_deep(_CHARACTERS), losses=ExtraLosses(auxiliary=0.3), explicit=explicit),
        stages=(Stage(name="explicit", steps=400 * epoch),),
        training=_of_characters(epoch, spectral_radius=0),
    )


def wikitext103_trellis() -> Experiment:
    """182M parameters, 44M of them in the layer; the paper's equilibrium reaches a test perplexity of 29.0.

    Bai, Kolter, Koltun (2019), table 3, "DEQ-TrellisNet": training takes 3.3 GB, and 24.7 GB for the deep network.
    """
    epoch = steps_per_epoch(WIKITEXT103_COUNTS["train"], batch_size=49, length=100)
    # As in `wikitext`: their code stops a batch at 1e-6·√(size of its state), and its adjoint solve never stops early.
    forward = Stop(rtol=0, atol=1e-6 * math.sqrt(100 * 2 * _WIKITEXT.channels), max_evals=45)
    backward = Implicit(solver=Broyden(rank=45), stop=Stop(rtol=0, atol=0, max_evals=45))
    solver = Broyden(rank=45)
    steps = 25 * epoch - 30_000
    implicit = Stage(name="implicit", steps=steps, method=Method(solver, forward, backward))
    return Experiment(
        name="wikitext103-trellis",
        corpus=WikiText103(),
        model=_wikitext(_WIKITEXT),
        stages=(network_of(40, name="shallow", steps=30_000), implicit),
        training=_of_wikitext(epoch, (15, 20, 23), batch_size=49, segment_length=100, eval_batch_size=4),
    )


def wikitext103_trellis_deep() -> Experiment:
    """182M parameters in 75 weight-tied layers; the paper's network of 70 reaches a test perplexity of 29.2.

    Bai, Kolter, Koltun (2019), table 3; with ``--model.explicit.checkpoint`` layers are recomputed, as in its 5.2 GB.
    """
    epoch = steps_per_epoch(WIKITEXT103_COUNTS["train"], batch_size=40, length=75)
    explicit = Explicit(depth=75, auxiliary_every=25)
    return Experiment(
        name="wikitext103-trellis-deep",
        corpus=WikiText103(),
        model=_wikitext(_deep(_WIKITEXT), losses=ExtraLosses(auxiliary=0.1), explicit=explicit),
        stages=(Stage(name="explicit", steps=25 * epoch),),
        training=_of_wikitext(epoch, (15, 20), batch_size=40, segment_length=75, eval_batch_size=1, spectral_radius=0),
    )


def _deep(cell: TrellisConfig) -> TrellisConfig:
    """The cell as in TrellisNet's code."""
    return dataclasses.replace(cell, carry_input=False, injection_init="normal", recurrence="delayed")


def _model(cell: TrellisConfig, **choices: Any) -> LanguageConfig:
    """The common part of all models: a tied table from U(−0.1, 0.1), without scaling."""
    return LanguageConfig(cell=cell, tied=True, std=0.1 / math.sqrt(3), init="uniform", scaled=False, **choices)


def _words(cell: TrellisConfig, **choices: Any) -> LanguageConfig:
    """The model for the words of the Penn Treebank; the corpus is small, so the dropout rates are high."""
    return _model(cell, dropout=0.45, input_dropout=0.45, word_dropout=0.1, **choices)


def _characters(cell: TrellisConfig, **choices: Any) -> LanguageConfig:
    """The model for the characters of the Penn Treebank."""
    return _model(cell, dropout=0.1, input_dropout=0.1, word_dropout=0.02, **choices)


def _wikitext(cell: TrellisConfig, **choices: Any) -> LanguageConfig:
    """The model for WikiText-103, with TrellisNet's "split cross entropy": clusters of full width, slots from 0."""
    clusters = AdaptiveConfig(cutoffs=(2_800, 20_000, 76_000), division=1, slot_std=0.0)
    return _model(cell, dropout=0.1, input_dropout=0.1, adaptive=clusters, **choices)


def _pre_trained(steps: int) -> tuple[Stage, ...]:
    """A network of 12 layers for the first 15 % of the steps, then its equilibrium."""
    shallow = round(0.15 * steps)
    implicit = Stage(
        name="implicit",
        steps=steps - shallow,
        method=Method(
            Picard(),
            Stop(rtol=1e-3, max_evals=50),
            Implicit(solver=Anderson(window=3), stop=Stop(rtol=1e-3, max_evals=60)),
        ),
    )
    return network_of(12, name="shallow", steps=shallow), implicit


def _sgd(epoch: int, **numbers: Any) -> Training:
    """Training for the words of the Penn Treebank: one validation per epoch, which may divide the rate."""
    return Training(
        optimisation=Optimisation(
            optimiser="sgd",
            learning_rate=20.0,
            decay=NonMonotone(window=10, divide=4.0, floor=0.02),
            weight_decay=1.2e-6,
            clip=0.225,
        ),
        batches=Batches(batch_size=16, segment_length=110),
        log=Logging(log_every=100),
        validation=Validation(valid_every=epoch, eval_batch_size=12),
        faults=Faults(checkpoint_every=epoch),
    ).changed(**numbers)


def _of_characters(epoch: int, **numbers: Any) -> Training:
    """Training for the characters of the Penn Treebank: of 400 epochs the last 180 and the last 50 have lower rates."""
    return Training(
        optimisation=Optimisation(
            optimiser="adam",
            learning_rate=2e-3,
            decay=Milestones(steps=(220 * epoch, 350 * epoch)),
            weight_decay=8e-7,
            clip=0.2,
        ),
        batches=Batches(batch_size=24, segment_length=140),
        log=Logging(log_every=100, measure_memory=False),
        validation=Validation(valid_every=epoch, eval_batch_size=10),
        faults=Faults(checkpoint_every=epoch),
    ).changed(**numbers)


def _of_wikitext(epoch: int, milestones: tuple[int, ...], **numbers: Any) -> Training:
    """Training for WikiText-103: of its 25 epochs, those after each of ``milestones`` have a lower rate."""
    decay = Milestones(steps=tuple(milestone * epoch for milestone in milestones))
    return Training(
        optimisation=Optimisation(optimiser="adam", learning_rate=1e-3, decay=decay, clip=0.07),
        log=Logging(log_every=200, measure_memory=False),
        validation=Validation(valid_every=epoch),
        faults=Faults(checkpoint_every=5_000),
    ).changed(**numbers)
