"""copying-lstm, copying-gru, copying-tcn: the copy-memory task with recurrent and convolutional networks."""

from __future__ import annotations

import dataclasses

from equilibria.lm.experiments import Experiment, Stage
from equilibria.lm.model import ConvolutionalConfig, RecurrentConfig
from equilibria.lm.recipes.copying import copying


def copying_lstm() -> Experiment:
    """The task of ``copying`` with an LSTM of 14,270 parameters.

    With ``--corpus.blank 400`` it is the task of Bai, Kolter, Koltun (2019), table 1, where the LSTM stays at 0.0501.
    """
    return _baseline("copying-lstm", RecurrentConfig(network="lstm", hidden=57))


def copying_gru() -> Experiment:
    """The task of ``copying`` with a GRU of 13,930 parameters.

    With ``--corpus.blank 400`` it is the task of Bai, Kolter, Koltun (2019), table 1, where the GRU stays at 0.0491.
    """
    return _baseline("copying-gru", RecurrentConfig(network="gru", hidden=65))


def copying_tcn() -> Experiment:
    """The task of ``copying`` with a TCN of 15,560 parameters, which sees every position of the past.

    With ``--corpus.blank 400`` it is the task of Bai, Kolter, Koltun (2019), table 1, where the TCN reaches 2.7e-5.
    """
    whole = _baseline("copying-tcn", ConvolutionalConfig())
    return dataclasses.replace(whole, training=whole.training.changed(betas=(0.9, 0.98)))  # as copying-400 has it


def _baseline(name: str, model: RecurrentConfig | ConvolutionalConfig) -> Experiment:
    """``copying`` with another model, in one stage of about the same duration; corpus and batches are the same."""
    whole = copying()
    stage = Stage(name="baseline", steps=8_000)  # no method: these networks solve nothing
    training = whole.training.changed(
        valid_every=1_000,
        optimiser="adam",
        learning_rate=1e-3,
        clip=1.0,
        spectral_radius=0,  # there is no Jacobian of a fixed point
    )
    return dataclasses.replace(whole, name=name, model=model, stages=(stage,), training=training)
