"""Segments: ranks partition the stream, rows continue, and a resumed reader is the uninterrupted one."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equilibria.lm.corpora import Segments, Stream

SHAPES = {
    "batch_size": st.integers(1, 4),
    "length": st.integers(1, 9),
    "world_size": st.integers(1, 3),
    "extra": st.integers(0, 60),
}


def counting(length: int, episode: int | None = None) -> Stream:
    """A stream in which every token is its own place, so that a segment shows where it comes from."""
    ids = torch.arange(length + 1)
    return Stream(tokens=ids[:-1], targets=ids[1:], episode=episode)


def same(first, second) -> bool:
    a, b = dataclasses.asdict(first), dataclasses.asdict(second)
    return all(torch.equal(a[key], b[key]) if torch.is_tensor(a[key]) else a[key] == b[key] for key in a)


@given(**SHAPES)
@settings(deadline=None)
def test_ranks_partition_the_stream(batch_size, length, world_size, extra):
    rows = batch_size * world_size
    stream = counting(rows + extra)
    read = []
    for rank in range(world_size):
        segments = Segments(stream, batch_size=batch_size, length=length, rank=rank, world_size=world_size)
        pieces = list(segments.one_epoch())
        assert len(pieces) == len(segments)
        assert all(piece.tokens.shape == (batch_size, length) for piece in pieces[:-1])
        read.append(torch.cat([piece.tokens for piece in pieces], dim=1))
        assert torch.equal(torch.cat([piece.targets for piece in pieces], dim=1), read[-1] + 1)
    # Row after row of rank after rank is the stream, cut to a multiple of the rows.
    assert torch.equal(torch.cat(read).flatten(), torch.arange((rows + extra) // rows * rows))


@given(position=st.integers(0, 40), **SHAPES)
@settings(deadline=None)
def test_resumed_is_uninterrupted(position, batch_size, length, world_size, extra):
    stream = counting(batch_size * world_size + extra)
    whole = Segments(stream, batch_size=batch_size, length=length, rank=world_size - 1, world_size=world_size)
    resumed = dataclasses.replace(whole, position=position)
    expected = itertools.islice(whole, position, position + 12)
    assert all(same(first, second) for first, second in zip(expected, resumed, strict=False))


@given(
    batch_size=st.integers(1, 3),
    world_size=st.integers(1, 2),
    episode=st.integers(1, 5),
    extra=st.integers(0, 9),
)
@settings(deadline=None)
def test_episodes_are_whole_and_fresh(batch_size, world_size, episode, extra):
    rows = batch_size * world_size
    stream = counting((rows + extra) * episode, episode=episode)
    starts = []
    for rank in range(world_size):
        for piece in Segments(stream, batch_size=batch_size, rank=rank, world_size=world_size).one_epoch():
            assert piece.resets
            assert torch.equal(piece.tokens, piece.tokens[:, :1] + torch.arange(episode))
            starts += piece.tokens[:, 0].tolist()
    assert sorted(starts) == [episode * i for i in range((rows + extra) // rows * rows)]


def test_memory_is_reset_at_the_start_of_an_epoch_only():
    segments = Segments(counting(10), batch_size=2, length=2)  # rows of 5: segments of 2, 2, 1
    pieces = list(itertools.islice(segments, 7))
    assert [piece.resets for piece in pieces] == [True, False, False, True, False, False, True]
    assert [piece.epoch for piece in pieces] == [0, 0, 0, 1, 1, 1, 2]
    assert [piece.index for piece in pieces] == [0, 1, 2, 0, 1, 2, 0]
    assert [piece.position for piece in pieces] == list(range(7))
    assert pieces[2].tokens.tolist() == [[4], [9]]
    assert pieces[1].tokens.is_contiguous()


def test_one_epoch_ends_with_the_epoch_of_its_position():
    segments = Segments(counting(10), batch_size=2, length=2, position=4)
    assert [piece.position for piece in segments.one_epoch()] == [4, 5]


def test_one_row_reads_every_target():
    segments = Segments(counting(11), batch_size=1, length=4)
    assert sum(piece.targets.numel() for piece in segments.one_epoch()) == 11


OVERLAPS = st.integers(1, 9).flatmap(lambda length: st.tuples(st.just(length), st.integers(0, length - 1)))


@given(cut=OVERLAPS, **{name: kind for name, kind in SHAPES.items() if name != "length"})
@settings(deadline=None)
def test_with_overlap_every_target_is_scored_exactly_once(cut, batch_size, world_size, extra):
    (length, overlap), rows = cut, batch_size * world_size
    scored = []
    for rank in range(world_size):
        numbers = {"length": length, "overlap": overlap, "rank": rank, "world_size": world_size}
        segments = Segments(counting(rows + extra), batch_size=batch_size, **numbers)
        pieces = list(segments.one_epoch())
        assert len(pieces) == len(segments)
        assert all(piece.scored == piece.targets[:, piece.skip :].numel() > 0 for piece in pieces)
        scored.append(torch.cat([piece.targets[:, piece.skip :] for piece in pieces], dim=1))
    assert torch.equal(torch.cat(scored).flatten(), 1 + torch.arange((rows + extra) // rows * rows))


def test_a_segment_with_overlap_reads_the_end_of_the_one_before_again_and_remembers_nothing():
    pieces = list(Segments(counting(20), batch_size=2, length=5, overlap=3).one_epoch())  # rows of 10
    assert [piece.tokens[0].tolist() for piece in pieces] == [
        [0, 1, 2, 3, 4],
        [2, 3, 4, 5, 6],
        [4, 5, 6, 7, 8],
        [6, 7, 8, 9],
    ]
    assert [piece.skip for piece in pieces] == [0, 3, 3, 3]
    assert [piece.scored for piece in pieces] == [10, 4, 4, 2]
    assert all(piece.resets for piece in pieces)
    assert [piece.skip for piece in Segments(counting(20), batch_size=2, length=5).one_epoch()] == [0, 0]


@given(position=st.integers(0, 40), cut=OVERLAPS, extra=st.integers(0, 60))
@settings(deadline=None)
def test_with_overlap_too_resumed_is_uninterrupted(position, cut, extra):
    whole = Segments(counting(2 + extra), batch_size=2, length=cut[0], overlap=cut[1])
    resumed = dataclasses.replace(whole, position=position)
    expected = itertools.islice(whole, position, position + 12)
    assert all(same(first, second) for first, second in zip(expected, resumed, strict=False))


def test_an_overlap_of_episodes_is_refused():
    with pytest.raises(ValueError, match=r"overlap=2\): each segment is a whole episode.*overlap=0"):
        Segments(counting(10, episode=5), batch_size=2, overlap=2)


@pytest.mark.parametrize(
    ("numbers", "sentence"),
    [
        ({"batch_size": 0}, r"batch_size=0\): batch_size is at least 1"),
        ({"batch_size": 11}, "11 streams need at least 11 tokens and the text has 10; try batch_size=10"),
        ({"batch_size": 3, "world_size": 4}, "12 streams need at least 12 tokens .*; try batch_size=2"),
        ({"batch_size": 1, "world_size": 11}, "or fewer processes"),
        ({"batch_size": 1, "rank": 2, "world_size": 2}, "ranks are 0 … 1"),
        ({"batch_size": 1, "position": -1}, r"position=-1\): position is at least 0"),
        ({"batch_size": 1, "overlap": 4}, r"overlap=4\): segments of 4 tokens.*at most 3"),
        ({"batch_size": 1, "overlap": -1}, r"overlap=-1\): overlap is at least 0"),
        ({"batch_size": 1, "length": 0}, "try length=64"),
        ({"batch_size": 1, "length": None}, "try length=64"),
    ],
)
def test_numbers_that_cannot_be_are_refused(numbers, sentence):
    with pytest.raises(ValueError, match=sentence):
        Segments(counting(10), **{"length": 4, **numbers})


def test_too_few_episodes_are_refused():
    with pytest.raises(ValueError, match="3 streams need at least 3 episodes and the text has 2; try batch_size=2"):
        Segments(counting(10, episode=5), batch_size=3)


@given(batch_size=st.integers(1, 4), length=st.integers(2, 9), overlap=st.integers(0, 8), extra=st.integers(0, 60))
@settings(deadline=None)
def test_official_rows_are_those_of_the_authors_loops(batch_size, length, overlap, extra):
    """Written as in their code: tokens trimmed and divided into rows, and targets one place further in the same row."""
    overlap = min(overlap, length - 1)
    stream = counting(batch_size * (overlap + 2) - 1 + extra)
    data = torch.arange(len(stream) + 1)
    columns = len(data) // batch_size
    data = data[: columns * batch_size].view(batch_size, columns)
    expected = []
    for i in range(0, columns - 1, length - overlap):
        if i + overlap >= columns - 1:
            continue
        width = min(length, columns - 1 - i)
        expected.append((data[:, i : i + width], data[:, i + 1 : i + 1 + width], overlap))
    segments = Segments(stream, batch_size=batch_size, length=length, overlap=overlap, official=True)
    found = [(piece.tokens, piece.targets, piece.skip) for piece in segments.one_epoch()]
    assert len(found) == len(expected) == len(segments)
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine[0], theirs[0])
        assert torch.equal(mine[1], theirs[1])
        assert mine[2] == theirs[2]


def test_official_rows_of_episodes_and_of_too_few_tokens_are_refused():
    with pytest.raises(ValueError, match="nothing to divide"):
        Segments(counting(12, episode=3), batch_size=2, official=True)
    with pytest.raises(ValueError, match="4 rows of 7 tokens leave no target to score; try a smaller batch_size"):
        Segments(counting(6), batch_size=4, length=3, official=True)
    with pytest.raises(ValueError, match="leave no target"):
        Segments(counting(11), batch_size=4, length=3, overlap=2, official=True)
