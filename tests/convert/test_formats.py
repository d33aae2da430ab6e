"""Published weights give here what their own forward pass gives, over three segments with memory."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from torch.testing import assert_close

import equilibria
from equilibria import Anderson, Method, Stop
from equilibria.core.trees import map_tensors
from equilibria.lm.convert import convert
from equilibria.lm.corpora import TextFolder
from equilibria.lm.experiments import network_of
from equilibria.lm.recipes import RECIPES

from .authors import (
    by_appearance,
    by_count,
    chain_f,
    deq_lm,
    deq_transformer,
    deq_trellisnet,
    split_softmax,
    transformer_f,
    transformer_segments,
    trellis_segments,
    trellisnet,
)

TRAIN = (
    "zeta beta beta gamma\nalpha delta beta epsilon\neta theta iota kappa beta gamma\nlambda mu nu xi omicron pi\n" * 3
)
VALID = "mu mu nu beta zeta\npi pi pi alpha eta theta\n" * 4
WORDS = by_count(TRAIN)
MEMORY, SEGMENTS = 5, [4, 4, 3]
EXACT = Method(Anderson(), Stop(rtol=1e-13, max_evals=400))


@pytest.fixture
def text(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for split, content in (("train", TRAIN), ("valid", VALID), ("test", VALID)):
        (folder / f"{split}.txt").write_text(content)
    return folder


def recipe(name, text, *, cell=None, **model):
    """A recipe of the library on a small text; the sizes of its model are those of the file."""
    value = RECIPES[name]()
    config = dataclasses.replace(value.model, **model)
    changes = {} if cell is None else {"cell": cell(config.cell)}
    return dataclasses.replace(
        value,
        corpus=TextFolder(root=text, unit="word"),
        model=dataclasses.replace(config, **changes),
        training=value.training.changed(device="cpu"),
    )


def remembering(length, **changes):
    """A cell, or a chain of blocks, with another memory."""

    def changed(cell):
        if hasattr(cell, "cells"):
            return dataclasses.replace(cell, cells=tuple(changed(block) for block in cell.cells))
        return dataclasses.replace(cell, memory=length, **changes)

    return changed


def log_probabilities(run, tokens, method):
    """Of the converted model, segment by segment, in float64 and with its memory."""
    model, memory, found = run.model.double(), None, []
    with torch.no_grad():
        for segment in tokens:
            output = model.layer(model.embedding(segment), memory, **({} if method is None else {"method": method}))
            found.append(model.read(output.output).log_softmax(-1))
            memory = output.memory
    return found


def batches(words):
    generator = torch.Generator().manual_seed(9)
    return torch.randint(len(words), (2, sum(SEGMENTS)), generator=generator).split(SEGMENTS, dim=1)


def compared(tmp_path, state, experiment, expected, *, method, words=WORDS, **options):
    """Convert the state dict, load the run, and compare; ``expected`` takes the weights in float64."""
    file = tmp_path / "weights.pth"
    torch.save(state, file)
    convert(file, experiment, **options).write(tmp_path / "run")
    run = equilibria.load(tmp_path / "run")
    assert list(run.vocabulary.tokens) == words
    tokens = batches(words)
    wide = {name: tensor.double() for name, tensor in state.items()}
    for mine, theirs in zip(log_probabilities(run, tokens, method), expected(wide, tokens), strict=True):
        assert_close(mine, theirs, rtol=0, atol=1e-9)
    return run


CLUSTERS = {
    "clusters": {"cutoffs": (4, 9, 14), "division": 2},
    "clusters over one table": {"cutoffs": (4, 9), "division": 1},
    "a plain softmax": {"cutoffs": (), "division": 1},
}
SLOW = [pytest.mark.slow]
CODES = {
    "2019": (2019, "wikitext103-medium-adaptive", "post", "clusters"),
    "2020": (2020, "wikitext103-medium-adaptive", "post", "a plain softmax"),
    "2021": (2021, "wikitext103-v2", "post", "clusters"),
    "2021, layer norm first": (2021, "wikitext103-v2-jacobian-preln", "pre-normalised", "clusters"),
    "deq-seq": (2023, "wikitext103-seq", "post", "clusters over one table"),
}


@pytest.mark.parametrize("code", [pytest.param(code, marks=SLOW * (code == "2020")) for code in CODES])
def test_deq_transformer(tmp_path, text, code):
    year, name, norm, clusters = CODES[code]
    softmax = {"words": len(WORDS), **CLUSTERS[clusters]}
    state = deq_transformer(**softmax, year=year)
    experiment = recipe(name, text, cell=remembering(MEMORY))
    if softmax["division"] == 1 and softmax["cutoffs"]:
        adaptive = dataclasses.replace(experiment.model.adaptive, cutoffs=softmax["cutoffs"])
        experiment = dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, adaptive=adaptive))

    def expected(w, tokens):
        f = functools.partial(transformer_f, w, kind=norm, heads=2)
        sizes = {"memory": MEMORY, "width": 8, "applications": None}
        return transformer_segments(w, tokens, f, softmax=softmax, **sizes)

    run = compared(tmp_path, state, experiment, expected, method=EXACT)
    assert (run.experiment.model.cell.norm, run.stage, run.step) == (norm, experiment.stages[-1], 0)


def test_deq_transformer_with_other_options(tmp_path, text):
    """DataParallel's names, no weight norm, word vectors of another width, and a window."""
    softmax = {"words": len(WORDS), "cutoffs": (4, 9), "division": 1}
    state = deq_transformer(**softmax, embed=6, normal=False, heads=4, inner=5, width=8, seed=3)
    state = {f"module.{name}": tensor for name, tensor in state.items()}
    experiment = recipe("wikitext103-v2", text, cell=remembering(MEMORY))
    adaptive = dataclasses.replace(experiment.model.adaptive, cutoffs=(4, 9))
    experiment = dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, adaptive=adaptive))

    def expected(w, tokens):
        w = {name.removeprefix("module."): tensor for name, tensor in w.items()}
        f = functools.partial(transformer_f, w, kind="post", heads=4)
        return transformer_segments(w, tokens, f, memory=MEMORY, width=8, applications=None, softmax=softmax)

    run = compared(tmp_path, state, experiment, expected, method=EXACT)
    cell = run.experiment.model.cell
    assert (cell.width, cell.heads, cell.inner, cell.weight_norm) == (8, 4, 5, False)
    assert run.experiment.model.adaptive.width == 6


@pytest.mark.parametrize("blocks", [1, 3])
def test_deq_lm(tmp_path, text, blocks):
    """Twelve applications from zero; the blocks read one memory, of the final state."""
    softmax = {"words": len(WORDS), "cutoffs": (4, 9, 14), "division": 2}
    state = deq_lm(blocks=blocks, **softmax)

    def expected(w, tokens):
        f = functools.partial(chain_f, w, heads=2, blocks=blocks)
        return transformer_segments(w, tokens, f, memory=MEMORY, width=8, applications=12, softmax=softmax)

    experiment = recipe("wikitext103-unrolled", text, cell=remembering(MEMORY))
    run = compared(tmp_path, state, experiment, expected, method=network_of(12).method)
    assert (len(run.experiment.model.cell.cells), run.experiment.model.cell.memory) == (blocks, "last")


@pytest.mark.parametrize(
    ("options", "recurrence"),
    [({}, "delayed"), ({"dropping": True}, "scan"), ({"normal": False, "experts": 3, "outputs": 7}, "delayed")],
)
def test_deq_trellisnet(tmp_path, text, options, recurrence):
    state = deq_trellisnet(words=len(WORDS), **options)
    below = "trellisnet.module." if options.get("dropping") else "trellisnet."
    sizes = {"hidden": 4, "outputs": options.get("outputs", 6), "experts": options.get("experts", 0)}

    def expected(w, tokens):
        return trellis_segments(w, tokens, below=below, applications=120, **sizes)

    def cell(config):
        return dataclasses.replace(config, recurrence=recurrence)

    experiment = recipe("ptb-trellis", text, cell=cell)
    run = compared(tmp_path, state, experiment, expected, method=EXACT)
    assert (run.experiment.model.cell.recurrence, run.experiment.model.cell.carry_input) == (recurrence, False)


def test_deq_trellisnet_with_its_split_softmax(tmp_path, text):
    state, cutoffs = deq_trellisnet(words=len(WORDS)), (4, 9)
    criterion = tmp_path / "criterion.pth"
    torch.save(split_softmax(width=6, cutoffs=cutoffs), criterion)
    experiment = recipe("wikitext103-trellis", text)
    adaptive = dataclasses.replace(experiment.model.adaptive, cutoffs=cutoffs)
    experiment = dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, adaptive=adaptive))

    def expected(w, tokens):
        w |= map_tensors(torch.Tensor.double, split_softmax(width=6, cutoffs=cutoffs))
        sizes = {"hidden": 4, "outputs": 6, "cutoffs": cutoffs}
        return trellis_segments(w, tokens, below="trellisnet.", applications=120, **sizes)

    compared(tmp_path, state, experiment, expected, method=EXACT, criterion=criterion)


@pytest.mark.parametrize("options", [{}, {"normal": False}, {"experts": 2, "outputs": 7}])
def test_trellisnet(tmp_path, text, options):
    """An explicit network of nine layers, with words numbered by first appearance."""
    state = trellisnet(words=len(WORDS), **options)
    sizes = {"hidden": 4, "outputs": options.get("outputs", 6), "experts": options.get("experts", 0)}

    def expected(w, tokens):
        return trellis_segments(w, tokens, below="network.0.module.full_conv.", applications=9, **sizes)

    experiment = recipe("ptb-trellis-deep", text)
    explicit = dataclasses.replace(experiment.model.explicit, depth=9, auxiliary_every=3)
    experiment = dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, explicit=explicit))
    words = by_appearance(TRAIN)
    assert words != WORDS
    compared(tmp_path, state, experiment, expected, method=None, words=words)


@pytest.mark.slow
def test_ids_by_the_frequency_in_all_texts(tmp_path, text):
    """As their loader counts the Penn Treebank; the flag says it for any text."""
    softmax = {"words": len(WORDS), "cutoffs": (4, 9, 14), "division": 2}
    words = by_count(TRAIN, VALID, VALID)
    assert words != WORDS
    experiment = recipe("wikitext103-v2", text, cell=remembering(MEMORY))

    def expected(w, tokens):
        f = functools.partial(transformer_f, w, kind="post", heads=2)
        return transformer_segments(w, tokens, f, memory=MEMORY, width=8, applications=None, softmax=softmax)

    run = compared(tmp_path, deq_transformer(**softmax), experiment, expected, method=EXACT, words=words, ids="all")
    assert run.evaluate("valid", max_segments=1).tokens > 0
