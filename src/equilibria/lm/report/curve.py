"""Curve: a number over the steps of a run, thinned so that a log of any length can be drawn.

Letters: N points, K bins, M points of a line.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Float64
from numpy.lib.stride_tricks import sliding_window_view

BINS = 4096
"""Bins of a curve at most, and half as many at least once it has more points."""
DRAWN = 512
"""Bins of a drawn line at most: a picture has 700 to 900 pixels for them, and the line is 2.5 pixels thick."""


class Curve:
    """A number over the steps, thinned for drawing: neighbours are one bin, and all bins have one size.

    A bin keeps four of its points: the first, the lowest, the highest and the last. It also keeps the number and the
    sum of its finite values. While there are at most BINS points, each has a bin of its own, and nothing is lost.
    """

    def __init__(self) -> None:
        self.count, self.size = 0, 1
        self._bins = self._rest = np.empty((10, 0))  # count, sum, x and y of the four points
        self._borders: list[int] = []
        self._stage: Any = self

    def extend(self, x: Float64[np.ndarray, " N"], y: Float64[np.ndarray, " N"], stage: Any) -> None:
        """Add points, all of one stage; a value that is not finite interrupts the curve."""
        if len(x) and stage != self._stage:
            self._borders.append(self.count)
            self._stage = stage
        self.count += len(x)
        finite = np.isfinite(y)
        y = np.where(finite, y, math.nan)
        points = np.stack([finite.astype(float), np.nan_to_num(y), *([x, y] * 4)])
        self._rest = np.concatenate([self._rest, points], axis=1)
        while (whole := self._rest.shape[1] // self.size) > 0:
            taken = self.size * min(whole, BINS - self._bins.shape[1])
            self._bins = np.concatenate([self._bins, _merged(self._rest[:, :taken], self.size)], axis=1)
            self._rest = self._rest[:, taken:].copy()
            if self._bins.shape[1] == BINS:
                self._bins, self.size = _merged(self._bins, 2), 2 * self.size

    def line(self) -> tuple[Float64[np.ndarray, " M"], Float64[np.ndarray, " M"]]:
        """x and y of a line that looks like the one through all points."""
        bins = self._all()
        if self.size == 1:
            return bins[2], bins[3]
        bins = _merged(bins, math.ceil(bins.shape[1] / DRAWN))
        x, y, x_low, low, x_high, high, x_last, last = bins[2:]
        low_first = x_low <= x_high
        middle = [np.where(low_first, low, high), np.where(low_first, high, low)]
        xs = np.stack([x, np.minimum(x_low, x_high), np.maximum(x_low, x_high), x_last], axis=1)
        return xs.reshape(4 * bins.shape[1]), np.stack([y, *middle, last], axis=1).reshape(-1)

    def means(self, width: int) -> Iterator[tuple[Float64[np.ndarray, " K"], Float64[np.ndarray, " K"]]]:
        """For each stretch of one stage: x, and there the mean of the last ``width`` values of the stretch."""
        bins = self._all()
        starts = list(dict.fromkeys(border // self.size for border in self._borders))
        width = max(1, round(width / self.size))
        for start, end in zip(starts, [*starts[1:], bins.shape[1]], strict=True):
            padded = np.pad(bins[:2, start:end], ((0, 0), (width - 1, 0)))
            counts, sums = sliding_window_view(padded, width, axis=1).sum(axis=2)
            yield bins[8, start:end], np.where(counts > 0, sums / np.maximum(counts, 1), math.nan)

    def sample(self) -> tuple[Float64[np.ndarray, " K"], Float64[np.ndarray, " K"]]:
        """Values at even distances, and for how many points each stands."""
        values = self._all()[3]
        weights = np.full(len(values), float(self.size))
        weights[self._bins.shape[1] :] = self._rest.shape[1]
        return values, weights

    def _all(self) -> Float64[np.ndarray, "10 K"]:
        return np.concatenate([self._bins, _merged(self._rest, self.size)], axis=1)


def _merged(bins: Float64[np.ndarray, "10 N"], number: int) -> Float64[np.ndarray, "10 K"]:
    """Each ``number`` neighbours as one bin, and those that are left at the end as another one."""
    whole = bins.shape[1] // number
    if left := bins.shape[1] - whole * number:
        return np.concatenate([_merged(bins[:, :-left], number), _merged(bins[:, -left:], left)], axis=1)
    groups = bins.reshape(10, whole, number)
    at = np.arange(groups.shape[1])
    low = np.where(np.isnan(groups[5]), math.inf, groups[5]).argmin(axis=1)
    high = np.where(np.isnan(groups[7]), -math.inf, groups[7]).argmax(axis=1)
    sums, first, last = groups[:2].sum(axis=2), groups[2:4, :, 0], groups[8:, :, -1]
    return np.concatenate([sums, first, groups[4:6, at, low], groups[6:8, at, high], last])
